"""The engine: layers of transformer-engine, by megatron-core's own specification.

The specification is megatron's, with one change: attention itself is the shell's core attention, which turns its
inputs as local layers do and calls torch's fused kernels. So both kinds of layers compute the same function. What
differs is that a norm and the linear layer behind it are one, and in which arithmetic products are computed.

In fp8 each product scales by the largest value of the tensors at hand. Nothing is remembered from step to step, so
there is no state beside the weights: what transformer-engine keeps as `_extra_state` is no weight, and not saved.
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
from mimogrid.shell.megatron.layers import CoreAttention, LocalLayerNorm, linears_of, mlp_of


FP8_RECIPE = "tensorwise"


@functools.cache
def missing(device: torch.device) -> str:
    """Return what a process lacks for transformer-engine's layers; "": nothing."""
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
    """Return the version of transformer-engine, "" where there is none."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return ""


def agree(names: Iterable[str], topology: Topology, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare over all ranks of a job whose layers each would build its modules of; joint over `group`.

    Layers that round differently would give dp ranks different weights. Raises WorldError on every rank where the
    machines of a module's ranks differ in what they have, or in its version, and PlanError where one has not what
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
    """Return what megatron's configuration says of fp8; its block opens transformer-engine's autocast by it."""
    return {} if fp8 == "none" else {"fp8": fp8, "fp8_recipe": FP8_RECIPE}


def layer_of_megatron() -> ModuleSpec:
    """Return megatron's specification of a dense layer of transformer-engine's."""
    with warnings.catch_warnings():
        # megatron-core 0.16.1 importing its own deprecated names.
        warnings.filterwarnings("ignore", message=r"The 'megatron\.core\.transformer\.custom_layers")
        from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: PLC0415 -- slow, and for CUDA alone
            get_gpt_layer_with_transformer_engine_spec,
        )

    return get_gpt_layer_with_transformer_engine_spec()


def engine_spec(model: BuiltIn, *, layers: int) -> TransformerBlockSubmodules:
    """Return the specification of a stack of layers and the norm behind it."""
    layer = layer_of_megatron()
    attention = layer.submodules.self_attention
    attention.params = {"attn_mask_type": AttnMaskType.causal if model.causal else AttnMaskType.padding}
    attention.submodules.core_attention = CoreAttention
    layer.submodules.mlp = mlp_of(linears_of(layer.submodules.mlp), ffn=model.ffn)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=LocalLayerNorm)
