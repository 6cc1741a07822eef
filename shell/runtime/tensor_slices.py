"""Tensor slices: where the tensors of a rank lie in the full tensors of a job, and how one rank puts them together.

A full tensor has a layout-independent name, ``module.parameter``. Of several ranks that hold the same values one gives
them, so that every value comes once. Padding (`Parameter.padding`) depends on the layout, so it is in no full tensor.
"""

from collections.abc import Iterator, Mapping

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.job.models import Parameter
from mimogrid.core.topology.topology import Stage
from mimogrid.core.update.buckets import ParameterRange, boxes
from mimogrid.core.update.reductions import counts_in_norm
from mimogrid.shell.modules.interface import named_weights
from mimogrid.shell.modules.weights import cut_over
from mimogrid.shell.runtime.exchange import compact, gather_objects
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.stage import StageRunner


Tensors = Mapping[str, torch.Tensor]


@attrs.frozen(eq=False)
class TensorSlice:
    """A rank's part of a full tensor, and where it begins in it."""

    tensor: torch.Tensor
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def within(self, full: torch.Tensor) -> torch.Tensor:
        """Return the part of a full tensor that has the place of the slice."""
        places = zip(self.offsets, self.tensor.shape, strict=True)
        return full[tuple(slice(start, start + size) for start, size in places)]


TensorSlices = Mapping[str, tuple[TensorSlice, ...]]
"""By full tensor the parts that a rank has: several, where a shard is of several blocks (`Parameter.tp_blocks`)."""


class StageSlices:
    """Where the parameters of a stage on this rank lie in the full parameters."""

    def __init__(self, runner: StageRunner) -> None:
        self._runner = runner
        self._table = {parameter.name: parameter for parameter in runner.info.parameters}
        self._shapes = {name: tuple(weight.shape) for name, weight in named_weights(runner.network).items()}
        self._position = runner.module.position(runner.rank)

    def gives(self, name: str) -> bool:
        """Whether this rank gives its values of a parameter that all dp ranks hold."""
        return counts_in_norm(self._position, self._runner.info, self._table.get(name))

    def whole(self, name: str, tensor: torch.Tensor) -> tuple[TensorSlice, ...]:
        """Return the slices of a tensor that has the shape of a parameter on this rank."""
        return tuple(self.slices(ParameterRange(name, 0, tensor.numel()), tensor.detach().reshape(-1)))

    def slices(self, part: ParameterRange, tensor: torch.Tensor) -> Iterator[TensorSlice]:
        """Yield the slices of some values of a parameter on this rank, flat and in order; or of one value for all."""
        parameter = self._table.get(part.name)
        padding = parameter.padding if parameter else 0
        if not tensor.dim():
            yield TensorSlice(tensor.view(1), (1,), (0,))
            return
        for piece in self._places(part, tensor, parameter):
            yield from _without_last_rows(piece, padding)

    def _places(
        self, part: ParameterRange, tensor: torch.Tensor, parameter: Parameter | None
    ) -> Iterator[TensorSlice]:
        shape = self._shapes[part.name]
        begin = 0
        for offsets, lengths in boxes(shape, part.start, part.stop):
            block = tensor[begin : begin + torch.Size(lengths).numel()].view(lengths)
            begin += block.numel()
            group = None if parameter is None else cut_over(parameter, self._runner.groups)
            if parameter is None or group is None or parameter.tp_dim is None or group.size() == 1:
                yield TensorSlice(block, shape, offsets)
            else:
                yield from _spread(block, shape, offsets, parameter, group)


def _without_last_rows(piece: TensorSlice, rows: int) -> Iterator[TensorSlice]:
    """Yield what remains of a slice when a full tensor loses so many rows at its end, if anything."""
    if not rows:
        yield piece
        return
    full = (piece.full_shape[0] - rows, *piece.full_shape[1:])
    kept = min(piece.tensor.shape[0], full[0] - piece.offsets[0])
    if kept > 0:
        yield TensorSlice(piece.tensor[:kept], full, piece.offsets)


def _spread(
    block: torch.Tensor,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    parameter: Parameter,
    group: dist.ProcessGroup,
) -> Iterator[TensorSlice]:
    """Yield where a block of a shard lies in the full parameter: apart, where it reaches into several `tp_blocks`."""
    dim = parameter.tp_dim
    assert dim is not None
    each = shape[dim] // parameter.tp_blocks
    full = tuple(size * group.size() if d == dim else size for d, size in enumerate(shape))
    start, stop = offsets[dim], offsets[dim] + block.shape[dim]
    for i in range(start // each, -(-stop // each)):
        first, last = max(start, i * each), min(stop, (i + 1) * each)
        moved = first + (i * (group.size() - 1) + group.rank()) * each
        there = tuple(moved if d == dim else offset for d, offset in enumerate(offsets))
        yield TensorSlice(block.narrow(dim, first - start, last - first), full, there)


def weights_of(runtime: RankRuntime) -> dict[Stage, Tensors]:
    """Return this rank's weights in the precision of the network, stage by stage; all ranks of the job call it."""
    runtime.complete_weights()
    return {stage: named_weights(runner.network) for stage, runner in runtime.stages.items()}


def gradients_of(runtime: RankRuntime) -> dict[Stage, Tensors]:
    """Return the summed gradients of this rank's weights, stage by stage; all ranks of the job call it."""
    for buffer in runtime.buffers.values():
        buffer.gather_gradients()
    return {
        stage: {name: w.grad for name, w in buffer.weights.items() if w.grad is not None}
        for stage, buffer in runtime.buffers.items()
    }


def full_tensors(runtime: RankRuntime, tensors: Mapping[Stage, Tensors]) -> dict[str, torch.Tensor]:
    """Put tensors of each stage together, which are named and shaped as its parameters; see `gather_slices`."""
    mine: dict[str, tuple[TensorSlice, ...]] = {}
    for stage, of_stage in tensors.items():
        places = StageSlices(runtime.stages[stage])
        for name, tensor in of_stage.items():
            if places.gives(name):
                mine[f"{stage.module}.{name}"] = places.whole(name, tensor)
    return gather_slices(runtime, mine)


def gather_slices(runtime: RankRuntime, slices: TensorSlices) -> dict[str, torch.Tensor]:
    """Put the slices of all ranks together on the first rank of the job, on the CPU; the others get nothing.

    All ranks of the job call it.
    """
    mine = [
        (name, attrs.evolve(part, tensor=compact(part.tensor)))
        for name, of_name in slices.items()
        for part in of_name
    ]
    full: dict[str, torch.Tensor] = {}
    for of_rank in gather_objects(runtime, mine):
        for name, part in of_rank:
            if name not in full:
                full[name] = torch.empty(part.full_shape, dtype=part.tensor.dtype)
            part.within(full[name]).copy_(part.tensor)
    return full
