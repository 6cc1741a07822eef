"""Weights: the layout-independent names of a stage's parameters, their initial values and shards.

Initial values depend on (seed, module, name) only. A rank that holds a part of a parameter draws the complete tensor in
fp64 and keeps its part. So a model starts with the same weights under every layout.

>>> qkv = Parameter("layers.0.attention.qkv.weight", (4, 2), layer=0, std=0.02, tp_dim=0)
>>> full = draw(qkv, seed=0, module="language")
>>> parts = [shard(full, qkv, tp_rank=rank, tp_size=2) for rank in range(2)]
>>> parts[0].shape, bool((torch.cat(parts) == full).all())
(torch.Size([2, 2]), True)
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimogrid.core.base.hashing import draw_bits
from mimogrid.core.job.lora import MARK
from mimogrid.core.job.models import Parameter


_MEGATRON_PARTS = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.linear_proj": "attention.out",
    "self_attention.q_layernorm": "attention.q_norm",
    "self_attention.k_layernorm": "attention.k_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp.up",
    "mlp.linear_fc2": "mlp.down",
    # transformer-engine makes one layer of a norm and the linear layer that reads it.
    "self_attention.linear_qkv.layer_norm": "attention_norm",
    "mlp.linear_fc1.layer_norm": "mlp_norm",
}
_MEGATRON_ENDS = {
    "decoder.final_layernorm": "final_norm",
    "embedding.word_embeddings": "embedding",
    "output_layer": "output",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)[._](weight|bias)")


def layout_name(built: str, layers: range) -> str:
    """Return the layout-independent name of a parameter of Megatron's, in a stage that holds `layers`.

    >>> layout_name("decoder.layers.1.self_attention.linear_qkv.weight", range(4, 6))
    'layers.5.attention.qkv.weight'
    >>> layout_name("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", range(4, 6))
    'layers.5.attention_norm.weight'
    >>> layout_name("output_layer.weight", range(4, 6))
    'output.weight'
    >>> layout_name("decoder.layers.1.mlp.linear_fc1.lora.gate.a", range(4, 6))
    'layers.5.mlp.up.lora.gate.a'
    """
    beside, mark, pair = built.partition(MARK)
    if mark:
        return layout_name(f"{beside}.weight", layers).removesuffix(".weight") + mark + pair
    inside = _LAYER.fullmatch(built)
    if inside:
        index, part, kind = inside.groups()
        return f"layers.{layers[int(index)]}.{_MEGATRON_PARTS.get(part, part)}.{kind}"
    owner, _, kind = built.rpartition(".")
    return f"{_MEGATRON_ENDS.get(owner, owner)}.{kind}"


def draw(parameter: Parameter, *, seed: int, module: str) -> Tensor:
    """Return the initial value of a complete parameter, in fp64 on the CPU."""
    if not parameter.std:
        return torch.full(parameter.shape, parameter.constant, dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw_bits(seed, module, parameter.name))
    drawn = torch.randn(parameter.unpadded_shape, dtype=torch.float64, generator=generator) * parameter.std
    return torch.cat([drawn, drawn.new_zeros(parameter.padding, *parameter.shape[1:])])


def shard(full: Tensor, parameter: Parameter, *, tp_rank: int, tp_size: int) -> Tensor:
    """Return the shard of a parameter on one tp rank (for an expert's, on one expert_tp rank)."""
    if parameter.tp_dim is None:
        return full
    blocks = full.chunk(parameter.tp_blocks, dim=parameter.tp_dim)
    parts = [block.chunk(tp_size, dim=parameter.tp_dim)[tp_rank] for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=parameter.tp_dim)


def shard_shape(parameter: Parameter, *, tp_size: int) -> tuple[int, ...]:
    """Return the shape of the shard on one tp rank."""
    return tuple(n // tp_size if d == parameter.tp_dim else n for d, n in enumerate(parameter.shape))


class Shards(Protocol):
    """The groups of a module over which its parameters are sharded."""

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of one copy."""

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of the same experts; without experts only this rank."""


def cut_over(parameter: Parameter, groups: Shards) -> dist.ProcessGroup:
    """Return the ranks that hold the shards of a parameter."""
    return groups.tp if parameter.expert is None else groups.expert_tp


DRAWERS = 8
"""The most parameters that are drawn at a time, because each is complete and in fp64 meanwhile."""


def initialize(
    weights: Mapping[str, nn.Parameter],
    parameters: Sequence[Parameter],
    *,
    seed: int,
    module: str,
    groups: Shards,
) -> None:
    """Set the local weights of a stage to this rank's shards of their initial values, on several cores.

    One core draws about ten million values a second, and a model has billions.
    """

    @torch.no_grad()  # It holds for one thread only.
    def fill(parameter: Parameter) -> None:
        weight, over = weights[parameter.name], cut_over(parameter, groups)
        full = draw(parameter, seed=seed, module=module).to(weight.dtype)
        weight.copy_(shard(full, parameter, tp_rank=over.rank(), tp_size=over.size()))

    with ThreadPoolExecutor(max_workers=min(DRAWERS, os.cpu_count() or 1)) as drawers:
        list(drawers.map(fill, parameters))  # Reading the results raises what a thread raised.
