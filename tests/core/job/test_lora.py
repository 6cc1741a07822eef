"""LoRA in the plan: what it adds to a module, what of the module trains, and what is refused."""

from typing import Any

import attrs
import pytest

import jobs
from mimogrid.core.job.lora import Lora, adapters
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.pricing.flops import stage_flops
from mimogrid.core.pricing.footprint import Computed, kept, saved_values, widened_bytes
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Stage, Topology
from mimogrid.core.update.contents import table_of
from mimogrid.core.update.trained import trained_lines


GPT = Gpt(layers=2, hidden=16, heads=4, kv_heads=2, ffn=48, vocab=32, gated=True)
LORA = Lora(rank=2, targets=("q_proj", "down"))


def spec(lora: Lora | None = LORA, *, model: Gpt = GPT, precision: str = "fp32", **fields: Any) -> JobSpec:
    """A language model with LoRA."""
    return JobSpec(
        modules={"language": ModuleSpec(model="gpt", options=model, lora=lora, **fields)},
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=2),
        precision=precision,
    )


def topology(**fields: Any) -> Topology:
    """Its topology."""
    return parse(spec(**fields), SourceFacts(sequence=64))


def test_only_what_lora_adds_trains() -> None:
    """And what `trainable` names besides; one line says so."""
    (info,) = topology().modules["language"].stages
    assert {f"layers.{n}.{p}.lora.{q}" for n in (0, 1) for p, q in PAIRS} == info.trainable
    (info,) = topology(trainable=("final_norm.*",)).modules["language"].stages
    assert {"final_norm.weight", "final_norm.bias"} <= info.trainable
    (line,) = trained_lines(topology())
    assert "language: 384 of " in line
    assert "layers.*.mlp.down.lora.down.b" in line


PAIRS = [
    ("attention.qkv", "q.a"),
    ("attention.qkv", "q.b"),
    ("mlp.down", "down.a"),
    ("mlp.down", "down.b"),
]


def test_tp_cuts_one_of_each_pair() -> None:
    """B beside outputs that are cut, A beside inputs that are; the other one is partial under sp."""
    cuts = {a.part: [(p.tp_dim, p.partial) for p in a.parameters(2)] for a in adapters(GPT, LORA)}
    assert {"q": [(None, True), (0, False)], "down": [(1, False), (None, True)]} == cuts


def test_its_products_are_counted() -> None:
    """Forward A and B; backward the gradients of both, and of inputs wherever something before trains."""
    text = 3
    with_lora, frozen = (
        stage_flops(jobs.step_with(t, text=text))[Stage("language", 0)]
        for t in (topology(), topology(lora=None, frozen=True))
    )
    pairs = 2 * (2 * text) * 2 * 2 * ((16 + 16) + (48 + 16))  # microbatch of 2 samples, rank 2, two layers
    assert pairs == with_lora.forward - frozen.forward
    assert pairs == with_lora.weight_gradient
    assert 0 == frozen.input_gradient < with_lora.input_gradient


def test_memory_is_that_of_what_trains() -> None:
    """Gradients and optimizer states are of A and B only; dropout keeps copies of what each A reads."""
    found = kept(topology(), 0)
    assert 384 * 4 == found.gradients
    assert 384 * 8 == found.optimizer
    computed = Computed(positions=10, pairs=0.0)
    module = topology().modules["language"]
    dropping = topology(lora=attrs.evolve(LORA, dropout=0.1)).modules["language"]
    plain, dropped = (saved_values(m, m.stages[0], computed, "none") for m in (module, dropping))
    assert 2 * 10 * 2 * (16 + 48) == dropped - plain


def test_a_base_in_half_precision_is_half_as_large() -> None:
    """In memory and in checkpoints; a product widens one matrix at a time, in forward and backward."""
    lora = attrs.evolve(LORA, base="bf16")
    half, whole = topology(lora=lora, trainable=("embedding.*",)), topology(trainable=("embedding.*",))
    layers = 16 * (32 + 16) + 16 * 96 + 48 * 16
    assert 2 * (2 * layers + 16 * 32) == kept(whole, 0).weights - kept(half, 0).weights
    assert kept(half, 0).gradients == kept(whole, 0).gradients
    described = table_of(half, {}, (), steps_taken=0)
    dtypes = {name: next(iter(of.dtypes)) for name, of in described.items()}
    assert "BF16" == dtypes["language.layers.0.attention.qkv.weight"] == dtypes["language.output.weight"]
    assert "F32" == dtypes["language.embedding.weight"] == dtypes["language.layers.0.mlp_norm.weight"]
    (info,) = half.modules["language"].stages
    assert 4 * 16 * 96 == widened_bytes(half, info.stage)
    assert 0 == widened_bytes(whole, whole.modules["language"].stages[0].stage)


@pytest.mark.parametrize(
    ("fields", "where", "words"),
    [
        ({"lora": Lora(rank=0, targets=("q",))}, "lora.rank", "must be 1 or more"),
        ({"lora": Lora(rank=99, targets=("q",))}, "lora.rank", "at most 16"),
        ({"lora": Lora(rank=2, targets=())}, "lora.targets", "is empty"),
        ({"lora": Lora(rank=2, targets=("q_prj",))}, "lora.targets", "Did you mean 'q_proj'"),
        ({"lora": Lora(rank=2, targets=("embedding",))}, "lora.targets", "no linear layer"),
        ({"lora": Lora(rank=2, targets=("layers.7.*",))}, "lora.targets", "Its linear layers: q, q_proj, k"),
        ({"lora": Lora(rank=2, targets=("q",), dropout=1.0)}, "lora.dropout", "below 1"),
        ({"lora": Lora(rank=2, targets=("q",), alpha=0.0)}, "lora.alpha", "above 0"),
        ({"lora": attrs.evolve(LORA, base="int4")}, "lora.base", "'int4' is not known"),
        ({"lora": attrs.evolve(LORA, base="fp16"), "precision": "bf16"}, "lora.base", "all values of fp16"),
        ({"frozen": True}, "modules.language", "says both lora and frozen"),
        ({"engine": "transformer_engine"}, "engine", "LoRA is beside local layers"),
        (
            {"lora": Lora(rank=2, targets=("gate",)), "model": attrs.evolve(GPT, experts=2)},
            "lora.targets",
            "experts and routers get no LoRA",
        ),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], where: str, words: str) -> None:
    """Before anything starts: the place, the fact, the way out."""
    found = [str(p) for p in problems_of(spec(**fields), SourceFacts(sequence=64)) if p.where.endswith(where)]
    assert any(words in problem for problem in found), found


def test_a_network_of_the_users_own_has_its_own() -> None:
    """The plan does not know its layers."""
    job = attrs.evolve(
        spec(), modules={"own": ModuleSpec(model="package.module:function", options={}, lora=LORA)}
    )
    assert any("the plan does not know its linear layers" in str(p) for p in problems_of(job, SourceFacts()))


def test_a_tower_may_share_one_pair() -> None:
    """Where its queries, keys and values are one layer on disk."""
    vit = Vit(layers=1, hidden=8, heads=2, features=5)
    (found,) = adapters(vit, Lora(rank=2, targets=("qkv",), fused_qkv=True))
    assert [(2, 8), (24, 2)] == [p.shape for p in found.parameters(2)]
