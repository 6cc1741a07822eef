"""Transformer-engine's layers: the same parameters and the same function as local ones.

Transformer-engine itself runs on CUDA only. Here megatron-core's own specification is built with stand-ins for
its classes that hold the parameters under their names.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.extensions import transformer_engine_spec_provider as provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec as Specification
from torch import Tensor, nn
from torch.nn import functional

from layouts import job
from mimogrid.core.base.errors import WorldError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.layer_engines import Choice
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import JobSpec, ModuleSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron import engine
from mimogrid.shell.megatron.attention import CoreAttention
from mimogrid.shell.megatron.layers import linears_of
from mimogrid.shell.modules import construction
from mimogrid.shell.modules.interface import StageModule, named_weights
from mimogrid.shell.world.launch import Pool
from stages import Alone, batch_of, build, gradients, run, step_with, topology_of, world_of_one


Opened = Callable[[JobSpec], Job]


class NormLinear(nn.Module):
    """What `TELayerNormColumnParallelLinear` holds and computes; with more state that is no weight."""

    def __init__(self, size: int, out: int, *, config: Any, skip_bias_add: bool, **_: object) -> None:
        super().__init__()
        dtype = config.params_dtype
        self.layer_norm_weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.layer_norm_bias = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.weight = nn.Parameter(torch.zeros(out, size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out, dtype=dtype))
        self.size, self.eps, self.skip = size, config.layernorm_epsilon, skip_bias_add

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the product, and the bias if somebody else adds it."""
        normed = functional.layer_norm(
            hidden, (self.size,), self.layer_norm_weight, self.layer_norm_bias, self.eps
        )
        bias = None if self.skip else self.bias
        return functional.linear(normed, self.weight, bias), self.bias if self.skip else None

    def get_extra_state(self) -> Tensor:
        """Scales of fp8, which transformer-engine puts into every state."""
        return torch.zeros(1)


class RowLinear(nn.Linear):
    """What `TERowParallelLinear` holds and computes on one rank."""

    def __init__(self, size: int, out: int, *, config: Any, **_: object) -> None:
        super().__init__(size, out, dtype=config.params_dtype)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the product and the bias, which somebody else adds."""
        return functional.linear(hidden, self.weight), self.bias


STAND_INS = {
    extension.TELayerNormColumnParallelLinear: NormLinear,
    extension.TERowParallelLinear: RowLinear,
}


def megatrons() -> Specification:
    """Megatron's specification, as it makes it where transformer-engine is installed."""
    with (
        patch.object(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, create=True),
        patch.object(provider, "is_te_min_version", lambda *_: True),
    ):
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()


def with_stand_ins() -> Specification:
    """The same with the stand-ins."""
    layer = megatrons()
    attention, mlp = layer.submodules.self_attention.submodules, linears_of(layer.submodules.mlp)
    for owner, names in ((attention, ("linear_qkv", "linear_proj")), (mlp, ("linear_fc1", "linear_fc2"))):
        for name in names:
            setattr(owner, name, STAND_INS[getattr(owner, name)])
    return layer


@pytest.fixture
def alone() -> Iterator[Alone]:
    """A world of one."""
    with world_of_one() as groups:
        yield groups


def test_both_engines_hold_and_compute_the_same(alone: Alone) -> None:
    """Parameters by name, shape and initial value; loss and every gradient, of an encoder and a causal model."""
    topology = topology_of(
        {
            "vision": ModuleSpec(
                model="vit", options=Vit(layers=2, hidden=8, heads=2, features=5), feeds=("language",)
            ),
            "language": ModuleSpec(
                model="gpt", options=Gpt(layers=2, hidden=16, heads=4, kv_heads=2, vocab=11)
            ),
        },
        sequence=32,
    )
    local = build(topology, alone)
    with (
        patch.object(construction, "choose", lambda *_, **__: Choice("transformer_engine", "")),
        patch.object(engine, "layer_of_megatron", with_stand_ins),
    ):
        fused = build(topology, alone)
    step = step_with(
        topology, Sample(0, 5, {"vision": 3}), Sample(1, 4, {"vision": 1}), Sample(2, 6, {"vision": 0})
    )
    found = []
    for stages in (local, fused):
        loss = run(topology, stages, step, batch_of(step))["language"]["loss"]
        loss.backward()
        found.append((loss.detach(), weights_of(stages), gradients(stages)))
    (loss, weights, grads), (other_loss, other_weights, other_grads) = found
    assert any("layer_norm_weight" in name for name, _ in fused["language"][0].named_parameters())
    assert any("_extra_state" in name for name in fused["language"][0].state_dict())
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=0)
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_grads, grads, rtol=1e-9, atol=1e-12)


def weights_of(stages: dict[str, list[StageModule]]) -> dict[str, dict[str, Tensor]]:
    """Every parameter by module and name."""
    return {
        name: {n: w.detach() for stage in own for n, w in named_weights(stage).items()}
        for name, own in stages.items()
    }


def test_the_specification_is_megatrons_but_for_attention() -> None:
    """Norms before linears are part of these; attention is the shell's, causal or not as the model is."""
    for model, mask in (
        (Vit(layers=2, hidden=8, heads=2), "padding"),
        (Gpt(layers=2, hidden=8, heads=2, vocab=5), "causal"),
    ):
        with patch.object(engine, "layer_of_megatron", megatrons):
            layers = engine.engine_spec(model, layers=range(2)).layer_specs
        for layer in layers:
            parts, attention = layer.submodules, layer.submodules.self_attention
            assert IdentityOp is parts.input_layernorm is parts.pre_mlp_layernorm
            assert extension.TELayerNormColumnParallelLinear is attention.submodules.linear_qkv
            assert extension.TELayerNormColumnParallelLinear is linears_of(parts.mlp).linear_fc1
            assert CoreAttention is attention.submodules.core_attention.func
            assert mask == attention.params["attn_mask_type"].name


@pytest.mark.world
def test_ranks_of_a_module_with_different_machines_are_refused(pool: Pool, opened: Opened) -> None:
    """With the ranks, and what each found; unless the job leaves nothing to the machines."""
    unlike = opened(job("enc(1,1,1)@0 lm(1,1,2)@1", precision="bf16"))
    said = (
        r"modules\.lm: local on ranks \[1\] \(transformer-engine is not installed\), "
        r"transformer_engine 2\.11\.0 on ranks \[2\]\."
    )
    with pytest.raises(WorldError, match=said):
        pool.run("bodies:with_engine", 3, unlike, {2: "2.11.0"})
    said = r"modules\.lm: transformer_engine 2\.9\.0 on ranks \[1\], transformer_engine 2\.11\.0 on ranks \[2\]\."
    with pytest.raises(WorldError, match=said):
        pool.run("bodies:with_engine", 3, unlike, {0: "2.8.0", 1: "2.9.0", 2: "2.11.0"})
    asked = {"lm": {"engine": "local"}}
    pool.run(
        "bodies:with_engine",
        3,
        opened(job("enc(1,1,1)@0 lm(1,1,2)@1", precision="bf16", changes=asked)),
        {2: "2.11.0"},
    )
