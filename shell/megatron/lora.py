"""LoRA: what is beside the linear layers of a stage (`core.job.lora`), on any layout.

A pair multiplies by A and then by B, so what crosses ranks is only `rank` wide. Beside a layer whose outputs tp cuts,
A reads what the layer reads: under sequence parallelism a part of the positions, which are gathered before B. Beside a
layer whose inputs tp cuts, each rank's columns of A give a part of a sum, which is added up before B; under sequence
parallelism each rank then keeps its positions.

The same input is dropped alike in every layout, and in each pair anew (`draws`).

Shapes in names: T positions of this rank's row, P those that a linear layer reads.
"""

from collections.abc import Iterable, Sequence

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mimogrid.core.job.lora import Adapter, Lora, adapters
from mimogrid.core.job.models import BuiltIn
from mimogrid.shell.megatron.draws import beside, dropped
from mimogrid.shell.megatron.layers import Layer, ReadsRow
from mimogrid.shell.megatron.names import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore


@attrs.frozen(eq=False)
class Ranks:
    """The tp ranks of a stage, and whether they share the positions between linear layers."""

    tp: dist.ProcessGroup
    sequence_parallel: bool

    @property
    def size(self) -> int:
        """How many they are."""
        return self.tp.size()

    def before(self, read_PR: Tensor, *, column: bool) -> Tensor:
        """Return what B reads of what A gives on each rank."""
        if self.size == 1:
            return read_PR
        across = {
            (True, False): copy_to_tensor_model_parallel_region,
            (True, True): gather_from_sequence_parallel_region,
            (False, False): reduce_from_tensor_model_parallel_region,
            (False, True): reduce_scatter_to_sequence_parallel_region,
        }[column, self.sequence_parallel]
        found: Tensor = across(read_PR, group=self.tp)
        return found


class Pair(nn.Module):
    """A and B of one linear layer, as far as this rank holds them."""

    def __init__(
        self,
        adapter: Adapter,
        lora: Lora,
        ranks: Ranks,
        *,
        draw: int,
        dtype: torch.dtype,
        weight_grads: WeightGradStore,
    ) -> None:
        super().__init__()
        self.column, self.ranks, self.weight_grads = adapter.column, ranks, weight_grads
        self.dropout, self.draw = lora.dropout, draw
        width_in, width_out = adapter.width_in, adapter.width_out
        if adapter.column:
            width_out //= ranks.size
        else:
            width_in //= ranks.size
        self.first = 0 if adapter.column else width_in * ranks.tp.rank()
        self.a = nn.Parameter(torch.empty(lora.rank, width_in, dtype=dtype))
        self.b = nn.Parameter(torch.empty(width_out, lora.rank, dtype=dtype))

    def forward(self, input_P: Tensor, keys_P: Tensor | None) -> Tensor:
        """Return the product; what is dropped hangs on the keys of the positions."""
        if keys_P is not None and self.training and self.dropout:
            input_P = dropped(input_P, beside(keys_P, self.draw), self.dropout, first=self.first)
        read = self.weight_grads.multiply(lambda a: functional.linear(input_P, a), self.a, input_P)
        read = self.ranks.before(read, column=self.column)
        return self.weight_grads.multiply(lambda b: functional.linear(read, b), self.b, read)


class Beside(nn.ModuleDict, ReadsRow):
    """The pairs beside one weight, by the names of its parts.

    `groups` times, the outputs of the weight are some of each part: those of a key-value group, or of the gate and of
    what it opens. `widths` are those of the parts, in order.
    """

    def __init__(self, pairs: dict[str, Pair], *, scale: float, groups: int, widths: dict[str, int]) -> None:
        super().__init__(pairs)
        self.scale, self.groups, self.widths = scale, groups, widths
        self.column = all(pair.column for pair in pairs.values())

    def forward(self, input_P: Tensor) -> Tensor:
        """Return what is added to the outputs of the weight."""
        keys = None
        if self.row is not None:
            keys = self.row.keys_between if self.column else self.row.keys
        given: dict[str, Tensor] = {part: pair(input_P, keys) * self.scale for part, pair in self.items()}
        if len(self.widths) == 1:
            return next(iter(given.values()))
        like = next(iter(given.values()))
        parts = [
            given[part].unflatten(-1, (self.groups, -1))
            if part in given
            else like.new_zeros(*like.shape[:-1], self.groups, width)
            for part, width in self.widths.items()
        ]
        return torch.cat(parts, dim=-1).flatten(-2)


def attach(
    layers: Iterable[Layer],
    numbers: Sequence[int],
    model: BuiltIn,
    lora: Lora,
    *,
    tp: dist.ProcessGroup,
    sequence_parallel: bool,
    dtype: torch.dtype,
    weight_grads: WeightGradStore,
) -> None:
    """Put pairs beside the linear layers of a stage; `numbers` are those of its layers within the model."""
    ranks = Ranks(tp, sequence_parallel)
    chosen: dict[tuple[int, str], list[tuple[int, Adapter]]] = {}
    for place, adapter in enumerate(adapters(model, lora)):
        chosen.setdefault((adapter.layer, adapter.weight.partition(f"{adapter.layer}.")[2]), []).append(
            (place, adapter)
        )
    for number, layer in zip(numbers, layers, strict=True):
        for name, where in _PLACES.items():
            found = chosen.get((number, name), ())
            if not found:
                continue
            pairs = {
                adapter.part: Pair(adapter, lora, ranks, draw=place, dtype=dtype, weight_grads=weight_grads)
                for place, adapter in found
            }
            groups, widths = _parts(name, model, lora, tp.size())
            module, _, linear = where.partition(".")
            beside_weight = Beside(pairs, scale=lora.scale, groups=groups, widths=widths)
            getattr(getattr(layer, module), linear).lora = beside_weight
            layer.readers.append(beside_weight)


_PLACES = {
    "attention.qkv": "self_attention.linear_qkv",
    "attention.out": "self_attention.linear_proj",
    "mlp.up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
}
"""Where Megatron's layer has a linear layer."""


def _parts(name: str, model: BuiltIn, lora: Lora, tp: int) -> tuple[int, dict[str, int]]:
    """Return how many groups the outputs of a weight are on a rank, and the width of each part of one."""
    if name == "attention.qkv" and not lora.fused_qkv:
        width = model.head_width
        return model.kv_heads // tp, {"q": model.heads // model.kv_heads * width, "k": width, "v": width}
    if name == "mlp.up" and model.gated:
        return 1, {"gate": model.ffn // tp, "up": model.ffn // tp}
    return 1, {"whole": 0}
