"""The engine: layers of transformer-engine, from megatron-core's own specification.

One part is replaced: the core attention is the shell's, which rotates its inputs as local layers do and calls torch's
fused kernels. So both kinds of layers compute the same function. Two things differ: transformer-engine makes one layer
of a norm and the linear layer behind it, and it multiplies in other arithmetic.

In fp8 each product is scaled by the largest value of its own tensors. Nothing is kept from step to step, so there is
no state besides the weights. Checkpoints do not save what transformer-engine keeps as `_extra_state`.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mimogrid.core.base.errors import WorldError
from mimogrid.core.job.layer_engines import choose, unlike
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.megatron.attention import CoreAttention
from mimogrid.shell.megatron.layers import Layer, LocalLayerNorm, linears_of, mlp_of


FP8_RECIPE = "tensorwise"


@functools.cache
def missing(device: torch.device) -> str:
    """Return what a process lacks for transformer-engine's layers; "" if it lacks nothing."""
    if device.type != "cuda":
        return f"modules compute on {device.type}"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # It is compiled for one version of torch, and of CUDA.
        return f"transformer-engine cannot be imported ({error})"
    return ""


@functools.cache
def version() -> str:
    """Return the version of transformer-engine; "" if it is not installed."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return ""


def agree(names: Iterable[str], topology: Topology, group: dist.ProcessGroup, device: torch.device) -> None:
    """Check that all ranks of a job build their modules with the same kind of layers; joint over `group`.

    Layers that round differently would give dp ranks different weights. Raises WorldError on every rank if the
    machines of a module's ranks have different engines or versions, and PlanError if a machine lacks the engine that
    the job asks for.
    """
    mine = {name: choose(name, topology.spec, missing=missing(device), version=version()) for name in names}
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, mine, group=group)
    if facts := list(unlike(dict(zip(topology.ranks, every, strict=True)))):
        raise WorldError(
            f"ranks would compute the same module with different layers. {'; '.join(facts)}. "
            'Make their machines alike, or use engine = "local" for this module.'
        )


def config_of_fp8(fp8: str) -> dict[str, Any]:
    """Return the entries of Megatron's configuration that make its block open transformer-engine's fp8 autocast."""
    return {} if fp8 == "none" else {"fp8": fp8, "fp8_recipe": FP8_RECIPE}


def layer_of_megatron() -> ModuleSpec:
    """Return Megatron's specification of a dense layer of transformer-engine."""
    with warnings.catch_warnings():
        # megatron-core 0.16.1 importing its own deprecated names.
        warnings.filterwarnings("ignore", message=r"The 'megatron\.core\.transformer\.custom_layers")
        from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: PLC0415 -- slow, and for CUDA alone
            get_gpt_layer_with_transformer_engine_spec,
        )

    return get_gpt_layer_with_transformer_engine_spec()


def engine_spec(model: BuiltIn, *, layers: range) -> TransformerBlockSubmodules:
    """Return the specification of a stack of layers, numbered within the model, and its final norm."""
    specs = [_layer_spec(model, number) for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=LocalLayerNorm)


def _layer_spec(model: BuiltIn, number: int) -> ModuleSpec:
    layer = layer_of_megatron()
    layer.module, layer.params = Layer, {**(layer.params or {}), "layer": number}
    attention = layer.submodules.self_attention
    attention.params = {"attn_mask_type": AttnMaskType.causal if model.causal else AttnMaskType.padding}
    attention.submodules.core_attention = functools.partial(CoreAttention, layer=number)
    layer.submodules.mlp = mlp_of(linears_of(layer.submodules.mlp), ffn=model.ffn)
    return layer
