"""Modules built from megatron-core compute what a plain implementation computes, whatever the layout."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import plain
from mimogrid.core.base.errors import WorldError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Block, Gpt, Regressor, Vit
from mimogrid.core.job.spec import GridSpec, ModuleSpec
from mimogrid.core.models.segments import Emission
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.megatron import cpu
from mimogrid.shell.modules.construction import build_stage
from mimogrid.shell.modules.interface import StageModule, named_weights
from mimogrid.shell.modules.loss import cross_entropies
from mimogrid.shell.modules.packing import check_placeholders
from mimogrid.shell.modules.weights import shard
from stages import (
    CPU,
    Alone,
    batch_of,
    build,
    full_weights,
    gradients,
    inputs_of,
    run,
    step_with,
    topology_of,
    whole_share,
    world_of_one,
)


CLOSE = 1e-12


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """A world of one, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with world_of_one() as groups:
        yield groups
    torch.set_num_threads(threads)


# -- jobs --------------------------------------------------------------------------------------------------


def fan_in(**grid: object) -> Topology:
    """Two encoders of different widths feed a language model."""
    return topology_of(
        {
            "vision": module(Vit(layers=2, hidden=16, heads=4, kv_heads=2), "language", **grid),
            "audio": module(Vit(layers=2, hidden=24, heads=2), "language", **grid),
            "language": module(Gpt(layers=2, hidden=32, heads=4, kv_heads=2, vocab=24), **grid),
        },
        sequence=16,
        features={"vision": 5, "audio": 3},
    )


def chain(*, tied: bool = True, **grid: object) -> Topology:
    """Two encoders feed a block, that and one of them a language model, and that a regressor."""
    return topology_of(
        {
            "vision": module(Vit(layers=2, hidden=16, heads=2), "mixer", "language", **grid),
            "audio": module(Vit(layers=2, hidden=8, heads=2, ffn=20), "mixer", **grid),
            "mixer": module(Block(layers=2, hidden=16, heads=4, kv_heads=2), "language", **grid),
            "language": module(
                Gpt(layers=2, hidden=16, heads=4, vocab=16, tied_embeddings=tied), "head", **grid
            ),
            "head": module(Regressor(layers=2, hidden=24, heads=2, outputs=3), **grid),
        },
        sequence=32,
        features={"vision": 5, "audio": 3},
    )


def sources(**grid: object) -> Topology:
    """A block that nothing feeds, and a regressor that nothing feeds."""
    return topology_of(
        {
            "first": module(Block(layers=2, hidden=16, heads=2), "second", **grid),
            "second": module(Regressor(layers=2, hidden=16, heads=2), **grid),
            "third": module(Regressor(layers=2, hidden=8, heads=2), **grid),
        }
    )


def module(options: Vit | Block | Gpt | Regressor, *feeds: str, **grid: object) -> ModuleSpec:
    """A module on its grid."""
    name = type(options).__name__.lower()
    return ModuleSpec(model=name, options=options, feeds=feeds, grid=GridSpec(**grid))


RAGGED = {
    fan_in: (
        Sample(0, 5, {"vision": 4, "audio": 2}),
        Sample(1, 7, {}),
        Sample(2, 3, {"vision": 6, "audio": 3}, placeholders={"language": (0, 1, 2, 4, 5, 6, 8, 9, 10)}),
        Sample(3, 9, {"audio": 7}),
    ),
    chain: (
        Sample(0, 5, {"vision": 3, "audio": 2}),
        Sample(1, 1, {}),
        Sample(2, 6, {"vision": 1, "audio": 5}),
        Sample(3, 4, {"vision": 4}),
    ),
    sources: (Sample(0, 0, {"first": 3, "third": 1}), Sample(1, 0, {"third": 4}), Sample(2, 0, {"first": 5})),
}
JOBS = pytest.mark.parametrize("job", RAGGED, ids=lambda job: job.__name__)
PIPELINES = pytest.mark.parametrize("pp", [1, 2])


# -- names and initial weights -----------------------------------------------------------------------------


@JOBS
@PIPELINES
def test_named_weights_are_those_of_the_table(job, pp: int, alone: Alone) -> None:
    """A stage has the parameters of the core's table, in that order and of those shapes."""
    topology = job(pp=pp)
    for stages in build(topology, alone).values():
        for stage in stages:
            expected = [(p.name, p.shape) for p in stage.info.parameters]
            assert expected == [(n, tuple(w.shape)) for n, w in named_weights(stage).items()]


@JOBS
def test_initial_weights_do_not_depend_on_the_layout(job, alone: Alone) -> None:
    """The stages of a pipeline have the values that one stage has, copies of tied weights included."""
    whole = {name: named_weights(stages[0]) for name, stages in build(job(), alone).items()}
    for name, stages in build(job(pp=2), alone).items():
        for stage in stages:
            for weight_name, weight in named_weights(stage).items():
                assert torch.equal(whole[name][weight_name], weight), (name, weight_name)


def test_initial_weights_have_the_deviation_of_the_table(alone: Alone) -> None:
    """A weight is drawn with its standard deviation; a constant is constant."""
    weights = named_weights(build(fan_in(), alone)["language"][0])
    assert weights["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["layers.0.mlp.down.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert bool((weights["final_norm.weight"] == 1).all())
    assert bool((weights["layers.1.attention.qkv.bias"] == 0).all())


def test_only_what_the_plan_trains_takes_gradients(alone: Alone) -> None:
    """A frozen parameter requires no gradient; the gradient still passes through it."""
    options = Vit(layers=1, hidden=8, heads=2)
    vision = ModuleSpec(model="vit", options=options, feeds=("head",), trainable=("projector.*", "input.*"))
    head = module(Regressor(layers=1, hidden=8, heads=2))
    topology = topology_of({"vision": vision, "head": head}, features={"vision": 3})
    stages = build(topology, alone)
    step = step_with(topology, Sample(0, 0, {"vision": 3}), Sample(1, 0, {"vision": 2}))
    run(topology, stages, step, batch_of(step))["head"]["loss"].backward()
    expected = {"input.weight", "input.bias", "projector.head.weight", "projector.head.bias"}
    assert expected == {n for n, w in named_weights(stages["vision"][0]).items() if w.grad is not None}


# -- the same numbers as a plain implementation ------------------------------------------------------------


@JOBS
@PIPELINES
def test_losses_and_gradients_are_those_of_the_plain_model(job, pp: int, alone: Alone) -> None:
    """Ragged samples, shared key-value heads, several feeders, tied embeddings, a pipeline: exact in fp64."""
    topology = job(pp=pp)
    check_against_plain(topology, build(topology, alone), RAGGED[job])


@PIPELINES
def test_untied_embeddings_are_exact(pp: int, alone: Alone) -> None:
    """So is a language model with an output projection of its own."""
    topology = chain(tied=False, pp=pp)
    check_against_plain(topology, build(topology, alone), RAGGED[chain])


@PIPELINES
def test_samples_of_one_length_are_exact(pp: int, alone: Alone) -> None:
    """Without padding there is no mask, and the result is the same."""
    topology = fan_in(pp=pp)
    samples = tuple(Sample(i, 8, {"vision": 4, "audio": 4}) for i in range(3))
    check_against_plain(topology, build(topology, alone), samples)


@PIPELINES
def test_a_modality_that_nobody_has_gives_zero_gradients(pp: int, alone: Alone) -> None:
    """A module runs with zero rows; its gradients are zeros, not absent."""
    topology = fan_in(pp=pp)
    stages = build(topology, alone)
    check_against_plain(topology, stages, (Sample(0, 5, {"audio": 2}), Sample(1, 3, {})))
    assert all(not gradient.any() for gradient in gradients(stages)["vision"].values())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str, alone: Alone) -> None:
    """Recomputed activations equal the dropped ones, also if the input takes no gradient."""
    plan = sources()
    specs = {n: attrs.evolve(m, recompute=recompute) for n, m in plan.spec.modules.items()}
    # Not through `parse`: the plan does not offer recomputation yet.
    topology = attrs.evolve(plan, spec=attrs.evolve(plan.spec, modules=specs))
    check_against_plain(topology, build(topology, alone), RAGGED[sources])


def test_gradients_of_the_rows_that_come_in_are_exact(alone: Alone) -> None:
    """A stage passes back what its feeders need, one row of gradient per row."""
    topology = fan_in()
    language = build(topology, alone)["language"][0]
    step = step_with(topology, *RAGGED[fan_in])
    batch = batch_of(step)
    counts = {f: step.share("language", 0, 0).rows[f] for f in ("vision", "audio")}
    rows = {f: [torch.randn(n, 32, dtype=torch.float64) for n in counts[f]] for f in counts}
    flat = {f: torch.cat(parts).requires_grad_() for f, parts in rows.items()}
    language(inputs_of("language", batch) | flat, whole_share(step, "language"))["loss"].backward()

    leaves = {f: [part.clone().requires_grad_() for part in parts] for f, parts in rows.items()}
    _plain_language(topology, batch, leaves).backward()
    for feeder, parts in leaves.items():
        expected = torch.cat([p.grad if p.grad is not None else torch.zeros_like(p) for p in parts])
        torch.testing.assert_close(flat[feeder].grad, expected, rtol=CLOSE, atol=CLOSE)


def _plain_language(topology: Topology, batch: list, rows: Mapping[str, list[Tensor]]) -> Tensor:
    language, weights = topology.modules["language"], full_weights(topology)["language"]
    total = torch.zeros((), dtype=torch.float64)
    for index, data in enumerate(batch):
        fed = [rows[feeder][index] for feeder in ("vision", "audio")]
        x = plain._stack(language.model, weights, plain._enter(language, weights, fed, data["language"]))
        total = total + plain._loss(language.model, weights, x, data["language"])
    return total


def unjudged(batch: list) -> list:
    """The batch without its targets."""
    return [
        {name: {k: t for k, t in given.items() if k in ("rows", "tokens")} for name, given in data.items()}
        for data in batch
    ]


def check_against_plain(
    topology: Topology, stages: Mapping[str, list[StageModule]], samples: tuple[Sample, ...]
) -> None:
    """Losses and gradients of whole stages are those of the plain model."""
    step = step_with(topology, *samples)
    batch = batch_of(step)
    expected = full_weights(topology)
    expected_losses = plain.losses(topology, expected, batch)
    sum(expected_losses.values()).backward()

    outputs = run(topology, stages, step, batch)
    losses = {name: given["loss"] for name, given in outputs.items() if "loss" in given}
    assert expected_losses.keys() == losses.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected_losses[name].item(), rel=CLOSE, abs=CLOSE)
    sum(losses.values()).backward()
    for name, own in gradients(stages).items():
        assert_same_gradients(name, own, {n: _gradient(w) for n, w in expected[name].items()})


def assert_same_gradients(module: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """As `parity` compares: by the largest entry of a parameter, or a thousandth of the module's largest."""
    assert expected.keys() == found.keys()
    floor = 1e-3 * max(float(e.abs().max()) for e in expected.values())
    for name, gradient in found.items():
        scale = max(float(expected[name].abs().max()), floor, 1e-300)
        difference = float((gradient - expected[name]).abs().max()) / scale
        assert difference < CLOSE, (module, name, difference)


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


# -- evaluation, and what goes wrong -----------------------------------------------------------------------


@PIPELINES
def test_without_targets_a_last_stage_gives_logits_or_a_prediction(pp: int, alone: Alone) -> None:
    """One row of logits per position in use, one prediction per row."""
    topology = chain(pp=pp)
    step = step_with(topology, *RAGGED[chain])
    with torch.no_grad():
        outputs = run(topology, build(topology, alone), step, unjudged(batch_of(step)))
    count = sum(whole_share(step, "language").lengths)
    assert (count, 16) == tuple(outputs["language"]["logits"].shape)
    assert (count, 3) == tuple(outputs["head"]["prediction"].shape)


def test_placeholders_that_differ_from_their_description_are_an_error() -> None:
    """The error names the sample and both counts; samples without tokens are not checked."""
    topology = fan_in()
    samples = Sample(40, 5, {"vision": 2}), Sample(41, 5, {"vision": 3})
    step = step_with(topology, *samples)
    tokens = [of_sample["language"]["tokens"] for of_sample in batch_of(step)]
    check_placeholders(tokens, whole_share(step, "language"))
    tokens[1][0] = 9
    with pytest.raises(WorldError, match=r"sample 41: its tokens have 2 placeholders .* has 3"):
        check_placeholders(tokens, whole_share(step, "language"))


def test_a_cross_entropy_of_weight_zero_may_have_any_label(alone: Alone) -> None:
    """Labels of placeholders and of the last position are never looked at."""
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, -1, 99])
    weights = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    loss = weights @ cross_entropies(logits, labels, alone.tp)
    loss.backward()
    assert logits.grad is not None
    expected = -0.5 * logits.detach()[0].log_softmax(0)[2]
    assert expected.item() == pytest.approx(loss.item(), rel=CLOSE)
    assert not logits.grad[1:].any()


def test_the_gradient_of_the_cross_entropy_is_the_difference_quotient(alone: Alone) -> None:
    """Analytic and numeric gradients agree."""
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([1, 0, 4]), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: weights @ cross_entropies(x, labels, alone.tp), (logits,))


# -- modules of the user's ---------------------------------------------------------------------------------


class Doubler(nn.Module):
    """An own module: one linear layer."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One row for each."""
        assert inputs["lengths"].sum() == len(inputs["rows"])
        return {"rows": self.linear(inputs["rows"])}


def doubler(*, width: int, features: int) -> nn.Module:
    """Build a Doubler."""
    return Doubler(width, features)


def test_an_own_module_is_wrapped_and_drawn_from_the_seed(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It emits rows through a projector, and its weights follow from the seed and its name alone."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    own = ModuleSpec(
        model="test_modules:doubler",
        options={"width": 6, "features": 4},
        feeds=("head",),
        width=6,
        frozen=("linear.bias",),
    )
    head = module(Regressor(layers=1, hidden=8, heads=2))
    topology = topology_of({"own": own, "head": head})
    (info,) = topology.modules["own"].stages
    first, second = (build_stage(topology, info, alone, device=CPU, dtype=torch.float64) for _ in range(2))
    weights = named_weights(first)
    assert {
        "projector.head.weight": True,
        "projector.head.bias": True,
        "linear.weight": True,
        "linear.bias": False,
    } == {name: weight.requires_grad for name, weight in weights.items()}
    assert all(torch.equal(w, named_weights(second)[n]) for n, w in weights.items())
    step = step_with(topology, Sample(0, 0, {"own": 2}), Sample(1, 0, {"own": 1}))
    given = first({"rows": torch.randn(3, 4, dtype=torch.float64)}, whole_share(step, "own"))
    assert (3, 8) == tuple(given["head"].shape)
    assert given["head"].dtype == torch.float64


class Pairs(nn.Module):
    """An own module that emits the first of every two rows."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Half as many."""
        assert inputs["lengths"].tolist() == [4, 2]
        return {"rows": inputs["rows"][::2]}


def pairs() -> nn.Module:
    """Build Pairs."""
    return Pairs()


@pytest.mark.parametrize(("pool", "fits"), [(2, True), (1, False)])
def test_an_own_module_emits_as_many_rows_as_it_says(
    pool: int, fits: bool, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it reads is given by the sample, what it emits by `rows_out`, and anything else is said."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    emission = Emission(pool=pool)
    own = ModuleSpec(model="test_modules:pairs", options={}, feeds=("head",), width=8, rows_out=emission)
    topology = topology_of({"own": own, "head": module(Regressor(layers=1, hidden=8, heads=2))})
    (info,) = topology.modules["own"].stages
    stage = build_stage(topology, info, alone, device=CPU, dtype=torch.float64)
    step = step_with(topology, Sample(0, 0, {"own": 4}), Sample(1, 0, {"own": 2}))
    said = contextlib.nullcontext() if fits else pytest.raises(WorldError, match="as many as rows_out says")
    with said:
        given = stage({"rows": torch.zeros(6, 8, dtype=torch.float64)}, whole_share(step, "own"))
        assert len(given["head"]) == sum(step.share("head", 0, 0).rows["own"]) == 3


# -- the CPU in place of CUDA ------------------------------------------------------------------------------


def test_what_stands_in_for_cuda_goes_again() -> None:
    """After the context Megatron's files use torch itself again, and torch was never changed."""
    from megatron.core.tensor_parallel import mappings, random  # noqa: PLC0415

    before = (mappings.torch, random._CUDA_RNG_STATE_TRACKER, torch.cuda.current_device)
    with cpu.on_device(CPU):
        assert mappings.torch is not before[0]
        assert torch.cuda.current_device is before[2]
    assert before == (mappings.torch, random._CUDA_RNG_STATE_TRACKER, torch.cuda.current_device)


def test_a_forked_random_state_leaves_the_generator_alone() -> None:
    """Draws inside a fork continue the last fork of that name; draws outside do not depend on them."""
    torch.manual_seed(3)
    plain_draws = torch.rand(2)
    torch.manual_seed(3)
    states = cpu.CpuRandomStates({"model-parallel-rng": 5})
    outside = [torch.rand(())]
    inside = []
    for _ in range(2):
        with states.fork():
            inside.append(torch.rand(()))
    outside.append(torch.rand(()))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), torch.stack(inside))
    assert torch.equal(plain_draws, torch.stack(outside))


# -- bodies for worlds of several ranks --------------------------------------------------------------------


def check_tensor_parallel(rank: int, size: int, *, sequence_parallel: bool, pp: int = 1) -> None:
    """Check that losses and gradients over `size` ranks of an open gloo world are those of one rank."""
    ones = [dist.new_group([r]) for r in range(size)]
    groups = Alone.of(tp=dist.group.WORLD, one=ones[rank])
    with cpu.on_device(CPU):
        for job, samples in ((fan_in, RAGGED[fan_in]), (chain, RAGGED[chain])):
            topology = job(tp=size, pp=pp)
            if sequence_parallel:  # Not through `parse`: the plan does not offer it yet.
                modules = {n: attrs.evolve(m, sequence_parallel=True) for n, m in topology.modules.items()}
                topology = attrs.evolve(topology, modules=modules)
            step = step_with(topology, *samples)
            batch = batch_of(step)
            expected = full_weights(topology)
            expected_losses = plain.losses(topology, expected, batch)
            sum(expected_losses.values()).backward()
            stages = build(topology, groups)
            outputs = run(topology, stages, step, batch)
            losses = {name: given["loss"] for name, given in outputs.items() if "loss" in given}
            for name, loss in losses.items():
                assert math.isclose(loss.item(), expected_losses[name].item(), rel_tol=CLOSE)
            sum(losses.values()).backward()
            with torch.no_grad():
                logits = run(topology, stages, step, unjudged(batch))["language"]["logits"]
            judge = inputs_of("language", batch)
            each = functional.cross_entropy(logits, judge["labels"], reduction="none")
            again = torch.dot(each, judge["loss_weights"])
            assert math.isclose(again.item(), losses["language"].item(), rel_tol=CLOSE)
            found = gradients(stages)
            for name, module_ in topology.modules.items():
                parts = {}
                for parameter in module_.parameters:
                    if sequence_parallel and parameter.partial:
                        dist.all_reduce(found[name][parameter.name])
                    full = _gradient(expected[name][parameter.name])
                    parts[parameter.name] = shard(full, parameter, tp_rank=rank, tp_size=size)
                assert_same_gradients(name, found[name], parts)
    for group in ones:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
