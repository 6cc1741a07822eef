"""LoRA trains alike on every layout: only its own parameters and those that `trainable` names."""

from typing import Any

import attrs
import pytest

from layouts import job
from mimogrid.core.job.lora import Lora
from mimogrid.core.job.spec import JobSpec, OptimizerSpec
from parity import Parity, assert_same


pytestmark = pytest.mark.world

EVERY = Lora(rank=3, targets=("all-linear",), alpha=5.0)
HALF = attrs.evolve(EVERY, base="bf16")
SHARED = OptimizerSpec(sharded=True)
GATED = {"gated": True, "kv_heads": 2, "activation": "silu"}


def lora_job(
    line: str,
    lora: Lora = EVERY,
    *,
    grid: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> JobSpec:
    """Return a job in which the language model has LoRA, and of the tower only the projector trains."""
    changes: dict[str, dict[str, Any]] = {"lm": {"lora": lora, "options": GATED | (model or {})}}
    if "enc" in line:
        changes["enc"] = {"trainable": ("projector.*",)}
    spec = job(line, changes=changes, **fields)
    if grid is None:
        return spec
    lm = spec.modules["lm"]
    return attrs.evolve(
        spec, modules={**spec.modules, "lm": attrs.evolve(lm, grid=attrs.evolve(lm.grid, **grid))}
    )


@pytest.mark.parametrize(
    "spec",
    [
        lora_job("enc(1,1,1)@0 lm(2,2,1)@1"),
        lora_job("enc(1,1,1)@0 lm(2,1,1)@1", grid={"sequence_parallel": True}),
        lora_job("lm(1,2,2)@0", attrs.evolve(EVERY, fused_qkv=True), schedule="zb-h1"),
        lora_job("lm(2,1,1)@0", grid={"cp": 2, "sequence_parallel": True}, data={"sequence": 32}),
        lora_job("lm(2,2,1)@0", HALF, grid={"sequence_parallel": True}, schedule="zb-h1"),
        lora_job("lm(2,1,2)@0", HALF, model={"experts": 4}, grid={"ep": 2}, optimizer=SHARED),
    ],
    ids=["tp2 pp2", "sp", "dp2 pp2 zb-h1 fused", "cp2 sp", "half tp2 pp2 sp", "half tp2 dp2 ep2"],
)
def test_a_layout_is_the_model(parity: Parity, spec: JobSpec) -> None:
    """The gradients of A and B are those of one process."""
    assert_same(parity, spec)


@pytest.mark.parametrize(
    "spec",
    [
        lora_job("lm(2,1,1)@0", attrs.evolve(EVERY, dropout=0.4)),
        lora_job("lm(2,1,2)@0", attrs.evolve(EVERY, dropout=0.4), grid={"sequence_parallel": True}),
    ],
    ids=["tp2", "tp2 dp2 sp"],
)
def test_the_same_values_are_dropped(parity: Parity, spec: JobSpec) -> None:
    """What A reads is dropped alike in every layout."""
    assert_same(parity, spec)
