"""Weights: the parameters of a built stage under their layout-independent names, drawn and cut.

Every value follows from (seed, module, name): the full tensor is drawn in fp64 wherever a part of it is
needed, and each rank keeps its part. So a model begins with the same weights under every layout.

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
from mimogrid.core.job.models import Parameter


_MEGATRON_PARTS = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.linear_proj": "attention.out",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp.up",
    "mlp.linear_fc2": "mlp.down",
    # Of transformer-engine, which makes one layer of a norm and what reads it.
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
    """Return the layout-independent name of a parameter of megatron's in a stage that holds `layers`.

    >>> layout_name("decoder.layers.1.self_attention.linear_qkv.weight", range(4, 6))
    'layers.5.attention.qkv.weight'
    >>> layout_name("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", range(4, 6))
    'layers.5.attention_norm.weight'
    >>> layout_name("output_layer.weight", range(4, 6))
    'output.weight'
    """
    inside = _LAYER.fullmatch(built)
    if inside:
        index, part, kind = inside.groups()
        return f"layers.{layers[int(index)]}.{_MEGATRON_PARTS.get(part, part)}.{kind}"
    owner, _, kind = built.rpartition(".")
    return f"{_MEGATRON_ENDS.get(owner, owner)}.{kind}"


def draw(parameter: Parameter, *, seed: int, module: str) -> Tensor:
    """Return the initial value of a whole parameter, in fp64 on the CPU."""
    if not parameter.std:
        return torch.full(parameter.shape, parameter.constant, dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw_bits(seed, module, parameter.name))
    return torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * parameter.std


def shard(full: Tensor, parameter: Parameter, *, tp_rank: int, tp_size: int) -> Tensor:
    """Return the part of a parameter that one tp rank (of an expert's, one expert_tp rank) holds."""
    if parameter.tp_dim is None:
        return full
    blocks = full.chunk(parameter.tp_blocks, dim=parameter.tp_dim)
    parts = [block.chunk(tp_size, dim=parameter.tp_dim)[tp_rank] for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=parameter.tp_dim)


def shard_shape(parameter: Parameter, *, tp_size: int) -> tuple[int, ...]:
    """Return the shape of the part that one tp rank holds."""
    return tuple(n // tp_size if d == parameter.tp_dim else n for d, n in enumerate(parameter.shape))


class Shards(Protocol):
    """The groups of a module over which its parameters are cut."""

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of one copy."""

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of the same experts; the rank alone where there are none."""


def cut_over(parameter: Parameter, groups: Shards) -> dist.ProcessGroup:
    """Return the ranks that hold the shards of a parameter."""
    return groups.tp if parameter.expert is None else groups.expert_tp


DRAWERS = 8
"""How many parameters are drawn at a time at most: each is whole, in fp64, while it is."""


def initialize(
    weights: Mapping[str, nn.Parameter],
    parameters: Sequence[Parameter],
    *,
    seed: int,
    module: str,
    groups: Shards,
) -> None:
    """Fill the local weights of a stage with this rank's part of their initial values, on as many cores as there are.

    One core draws some ten million values a second, of which a model has thousands of millions.
    """

    @torch.no_grad()  # which is a thread's own
    def fill(parameter: Parameter) -> None:
        weight, over = weights[parameter.name], cut_over(parameter, groups)
        full = draw(parameter, seed=seed, module=module).to(weight.dtype)
        weight.copy_(shard(full, parameter, tp_rank=over.rank(), tp_size=over.size()))

    with ThreadPoolExecutor(max_workers=min(DRAWERS, os.cpu_count() or 1)) as drawers:
        list(drawers.map(fill, parameters))  # which raises what a drawer raised
