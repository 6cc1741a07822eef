"""Floating point operations are those that a hand counts from real rows and tokens."""

import itertools

import attrs
import pytest

import jobs
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.pricing.flops import (
    Load,
    model_flops,
    module_units,
    of_units,
    sample_flops,
    stage_flops,
    sum_of,
)
from mimogrid.core.step.step import Step
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Stage


VIT = Vit(layers=2, hidden=8, heads=2, features=6)
GPT = Gpt(layers=2, hidden=16, heads=4, kv_heads=2, ffn=48, vocab=32)
ROWS, TEXT = 5, 3


def step_of_two(*, language=None, batch=4, microbatches=2, gpt=GPT, **vision):
    """Samples of five patches and three tokens: a vision encoder in front of a language model."""
    spec = JobSpec(
        modules={
            "vision": ModuleSpec(model="vit", options=VIT, feeds=("language",), **vision),
            "language": ModuleSpec(model="gpt", options=gpt, **(language or {})),
        },
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=batch, microbatches=microbatches),
    )
    return jobs.step_with(parse(spec, SourceFacts(sequence=64)), {"vision": (ROWS,)}, text=TEXT)


def vit_forward(rows):
    """By hand: the embedding, two layers (qkv 3H^2, out H^2, MLP 8H^2, attention 4 L^2 H), the projector."""
    entry = 2 * rows * 6 * 8
    layer = 2 * rows * (3 * 8 * 8 + 8 * 8 + 8 * 32 + 32 * 8) + 4 * rows * rows * 8
    return entry, layer, 2 * rows * 8 * 16


def gpt_forward(positions):
    """By hand: qkv of 4 heads and 2 key-value heads of width 4, a causal half, an MLP of 48, 32 logits."""
    linear = 2 * positions * (16 * (16 + 8 + 8) + 16 * 16 + 16 * 48 + 48 * 16)
    attention = 4 * positions * (positions + 1) / 2 * 16
    return linear, attention, 2 * positions * 16 * 32


def test_forward_is_the_count_by_hand():
    """A microbatch of two samples; the vision encoder is billed for its patches, not for tokens."""
    flops = stage_flops(step_of_two())
    entry, layer, projector = vit_forward(ROWS)
    assert 2 * (entry + 2 * layer + projector) == flops[Stage("vision", 0)].forward
    linear, attention, head = gpt_forward(ROWS + TEXT)
    assert 2 * (2 * (linear + attention) + head) == flops[Stage("language", 0)].forward


def test_samples_add_up_to_the_step():
    """Samples of other lengths cost other amounts; together they cost what the modules do."""
    step = step_of_two(frozen=("layers.0.*",))
    longer = [attrs.evolve(sample, length=sample.length + i) for i, sample in enumerate(step.samples)]
    step = Step(step.topology, tuple(longer))
    flops = sample_flops(step)
    assert sum(model_flops(step).values()) == pytest.approx(sum(flops), rel=1e-12)
    assert flops == sorted(set(flops))


def test_backward_is_twice_the_forward_without_unused_gradients():
    """Both gradients of every product; none of the first inputs, of which nothing before trains."""
    flops = stage_flops(step_of_two())
    entry, layer, projector = vit_forward(ROWS)
    whole = flops[Stage("vision", 0)]
    attention = 4 * ROWS * ROWS * 8
    assert 2 * (2 * (layer + attention) + projector) == whole.input_gradient
    assert 2 * (entry + 2 * (layer - attention) + projector) == whole.weight_gradient
    language = flops[Stage("language", 0)]
    assert 2 * language.forward == language.input_gradient + language.weight_gradient


def test_frozen_parts_cost_what_is_still_wanted_of_them():
    """Frozen with nothing trainable before: no backward. With something before: inputs only."""
    only_projector = stage_flops(step_of_two(trainable=("projector.*",)))[Stage("vision", 0)]
    assert (0.0, 2 * vit_forward(ROWS)[2]) == (only_projector.input_gradient, only_projector.weight_gradient)
    frozen = stage_flops(step_of_two(frozen=True))
    assert 0 == frozen[Stage("vision", 0)].input_gradient + frozen[Stage("vision", 0)].weight_gradient
    behind = stage_flops(step_of_two(language={"frozen": True}))[Stage("language", 0)]
    linear, attention, head = gpt_forward(ROWS + TEXT)
    assert 2 * (2 * (linear + 2 * attention) + head) == behind.input_gradient
    assert 0 == behind.weight_gradient


def test_a_frozen_layer_below_a_trainable_one_has_no_backward():
    """The first trainable layer needs no gradient of what it reads, but those inside of itself."""
    found = stage_flops(step_of_two(trainable=("layers.1.*",), grid=GridSpec(pp=2)))
    first, second = found[Stage("vision", 0)], found[Stage("vision", 1)]
    assert 0 == first.input_gradient + first.weight_gradient
    layer, attention = vit_forward(ROWS)[1], 4 * ROWS * ROWS * 8
    projector = vit_forward(ROWS)[2]
    # The norm before queries, keys and values trains, so gradients reach through them.
    assert 2 * (layer - attention) == second.weight_gradient
    assert 2 * (layer + attention + projector) == second.input_gradient


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_repeats_the_layers_or_their_attention(recompute):
    """And counts as no work of the model."""
    step = step_of_two(language={"recompute": recompute})
    plain, again = stage_flops(step_of_two())[Stage("language", 0)], stage_flops(step)[Stage("language", 0)]
    linear, attention, _ = gpt_forward(ROWS + TEXT)
    expected = {"none": 0, "selective": 2 * 2 * attention, "full": 2 * 2 * (linear + attention)}
    assert expected[recompute] == again.recomputed
    assert plain.model == again.model


def test_experts_count_as_often_as_a_token_goes_to_one():
    """The router sees all experts, the MLP `top_k` times."""
    sparse = attrs.evolve(GPT, experts=4, top_k=2)
    dense, found = (stage_flops(step_of_two(gpt=model))[Stage("language", 0)] for model in (GPT, sparse))
    positions = 2 * (ROWS + TEXT)
    more = 2 * (2 * positions * 16 * 4 + 2 * positions * 2 * 16 * 48)
    assert dense.forward + more == found.forward
    gated = attrs.evolve(sparse, gated=True, expert_ffn=6, dense_layers=(1,))
    mixed = stage_flops(step_of_two(gpt=gated))[Stage("language", 0)]
    one = 2 * positions * (16 * 4 + 2 * 3 * 16 * 6 + 3 * 16 * 48 - 2 * 2 * 16 * 48)
    assert dense.forward + one == mixed.forward
    assert dense.weight_gradient + more == found.weight_gradient


def test_stages_share_the_work_of_the_module():
    """However layers are split, the whole is the same, and ends belong to the ends."""
    whole = stage_flops(step_of_two())[Stage("language", 0)]
    parts = stage_flops(step_of_two(language={"grid": GridSpec(pp=2)}))
    assert whole == sum_of([parts[Stage("language", 0)], parts[Stage("language", 1)]])
    assert 2 * gpt_forward(ROWS + TEXT)[2] == (
        parts[Stage("language", 1)].forward - parts[Stage("language", 0)].forward
    )


def test_shares_of_a_microbatch_add_up_to_its_mean():
    """With ragged rows: the mean over microbatches of what their shares cost."""
    topology = jobs.job("v vit dp2 > l; l gpt pp2", batch=8, microbatches=2)
    step = jobs.step_with(topology, {"v": (1, 4, 0, 3, 2, 2, 5, 0)})
    for stage, mean in stage_flops(step).items():
        module = topology.modules[stage.module]
        shares = [step.share(module.name, dp_rank, k) for dp_rank in range(module.dp_size) for k in range(2)]
        loads = [Load.of(share.segments, causal=module.model.causal) for share in shares]
        parts = [of_units(topology.stages[stage], module_units(topology, module, load)) for load in loads]
        assert sum_of(itertools.chain.from_iterable(parts)) * 0.5 == mean


def test_a_step_of_all_microbatches_is_what_mfu_counts():
    """Per module, without recomputation."""
    step = step_of_two(language={"recompute": "full"})
    flops = stage_flops(step)
    assert {
        "vision": 2 * flops[Stage("vision", 0)].model,
        "language": 2 * flops[Stage("language", 0)].model,
    } == model_flops(step)


def test_a_language_model_that_nothing_feeds_has_its_work():
    """It reads no rows, and no other count is lost for that."""
    spec = JobSpec(
        modules={"language": ModuleSpec(model="gpt", options=GPT)},
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=4, microbatches=2),
    )
    step = jobs.step_with(parse(spec, SourceFacts(sequence=64)), {}, text=TEXT)
    linear, attention, head = gpt_forward(TEXT)
    assert 2 * (2 * (linear + attention) + head) == stage_flops(step)[Stage("language", 0)].forward
