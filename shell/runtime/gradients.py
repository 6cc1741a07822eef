"""Gradients: flat buffers per stage, summed over the ranks that the gradient plan names.

The gradient of every trainable parameter is a view of a buffer of its stage, and so is the parameter. Backward passes
add into the gradients. The program posts one sum for each bucket (`core.update.buckets`) and waits for it. A
parameter that a rank never touched has zeros there.

In half precision the network computes with bf16 or fp16 weights. Beside them are fp32 *main parameters*, which the
optimizer updates and checkpoints hold. Gradients are accumulated in fp32, too: autograd converts each one as it comes
(`Tensor.grad_dtype`). In fp32 and fp64 the main parameters are the weights.

If dp ranks share the update (ZeRO stage 1: Rajbhandari et al. 2020), a rank has the main parameters of its own shard of
each bucket only. Gradients are then reduce-scattered: a rank has sums in its own shard and only terms elsewhere. It
updates its shard, and at the begin of the next step the program gathers the weights. Until then the others are *stale*.
Whoever reads weights between two steps calls `complete` on all ranks. (gloo makes its reduce-scatter out of an
all-reduce and a copy. So there both ways give the same bits, and a reduce-scatter saves nothing.)

On a device that computes asynchronously a collective begins after all computing that was asked for before it was
posted: torch records an event on the current stream, and the stream of the backend waits for it. Waiting for the
collective holds up computing, not the host. Operations that are posted and waited for at once (embedding all-reduces)
are in order with computing anyway.
"""

from collections.abc import Iterator, Mapping

import attrs
import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.topology.topology import StageInfo, Topology
from mimogrid.core.update.buckets import Bucket, ParameterRange, Section, layout_of
from mimogrid.core.update.reductions import counts_in_norm, is_written_by
from mimogrid.shell.device.streams import Posted, Streams
from mimogrid.shell.world.groups import ModuleGroups


# Torch 2.13 gave both a new name, and warns of the old one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

SQUARED_AT_ONCE = 1 << 22
"""How many gradients are squared at once for the norm: 34 MB in fp64."""
REPLICA_AXES = ("dp", "cp", "expert_dp")
"""The axes along which ranks hold the same values of a parameter."""


@attrs.frozen(eq=False)
class Shard:
    """The values of a parameter that this rank updates, flat, with their gradient."""

    part: ParameterRange
    main: nn.Parameter


class Buffer:
    """One bucket on this rank: gradients, weights, and the main parameters that this rank updates."""

    def __init__(
        self,
        bucket: Bucket,
        weights: Mapping[str, nn.Parameter],
        full: Mapping[str, torch.Tensor],
        groups: ModuleGroups,
        streams: Streams,
        *,
        like: torch.Tensor,
        shared: bool,
    ) -> None:
        self.bucket = bucket
        self.shard_group = groups.expert_dp if bucket.section is Section.EXPERTS else groups.dp
        # The few gradients that are partial along tp are summed over more ranks than share the update.
        self._scatters = shared and bucket.section is not Section.PARTIAL
        self._reduce_group = groups.partial if bucket.section is Section.PARTIAL else self.shard_group
        self._streams = streams
        self._sum: Posted | None = None
        self._gather: Posted | None = None
        self._is_stale = False
        self.shared = shared
        shard = self.shard_group.rank()
        self.updated = range(shard, shard + 1) if shared else range(bucket.shards)
        self.own = slice(bucket.shard(self.updated[0]).start, bucket.shard(self.updated[-1]).stop)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.gradients = torch.zeros(bucket.size, dtype=dtype, device=like.device)
        self.weights = torch.zeros(bucket.size, dtype=like.dtype, device=like.device)
        main = torch.zeros_like(self.gradients) if dtype != like.dtype else self.weights
        for span in bucket.spans:
            weight, place = weights[span.name], slice(span.start, span.start + span.size)
            main[place] = full[span.name].flatten()
            self.weights[place] = main[place]
            weight.data = self.weights[place].view_as(weight)
            weight.grad_dtype = dtype
            weight.grad = self.gradients[place].view_as(weight)
        self._is_lowered = main is not self.weights
        self.main = main[self.own].clone() if self._is_lowered and shared else main[self.own]
        self.shards = tuple(self._shards())

    def _shards(self) -> Iterator[Shard]:
        for span in self.bucket.spans:
            start, stop = max(span.start, self.own.start), min(span.start + span.size, self.own.stop)
            if start < stop:
                main = nn.Parameter(self.main[start - self.own.start : stop - self.own.start])
                main.grad = self.gradients[start:stop]
                yield Shard(ParameterRange(span.name, start - span.start, stop - span.start), main)

    def parts(self, names: frozenset[str]) -> Iterator[torch.Tensor]:
        """Yield the gradients of these parameters in the shards that this rank updates, part by part."""
        starts = {span.name: span.start for span in self.bucket.spans}
        for part in (part for shard in self.updated for part in self.bucket.parts(shard)):
            if part.name in names:
                yield self.gradients[starts[part.name] + part.start : starts[part.name] + part.stop]

    @property
    def summed(self) -> torch.Tensor:
        """The gradients that are complete once they are summed: those of this rank's shard, if it has one."""
        return self.gradients[self.own]

    def reduce(self) -> None:
        """Post the sum of the gradients; nothing may touch them until it was waited for."""
        if not len(self.gradients):  # Own networks may have none.
            return
        if self._scatters:
            work = _reduce_scatter(self.summed, self.gradients, group=self._reduce_group, async_op=True)
        else:
            work = dist.all_reduce(self.gradients, group=self._reduce_group, async_op=True)
        self._sum = self._streams.posted(work, self.gradients, arrives=True)

    def wait(self) -> None:
        """Order what is computed from here on after the sum."""
        if self._sum is not None:
            self._sum.wait()
            self._sum = None

    def copy_model_to_main(self) -> None:
        """Copy the weights to the main parameters, where they are apart."""
        if self._is_lowered:
            self.main.copy_(self.weights[self.own])

    def copy_main_to_model(self) -> None:
        """Copy the main parameters that this rank has to its weights; those of other shards are stale from then on."""
        if self._is_lowered:
            self.weights[self.own] = self.main
        self._is_stale = self.shared and self.shard_group.size() > 1

    def gather(self) -> None:
        """Post the gather of stale weights; nothing may touch them until it was waited for."""
        if self._is_stale and len(self.weights):
            work = _all_gather(self.weights, self.weights[self.own], group=self.shard_group, async_op=True)
            self._gather = self._streams.posted(work, self.weights, arrives=True)

    def wait_for_weights(self) -> None:
        """Order what is computed from here on after the gather."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None
        self._is_stale = False

    def gather_gradients(self) -> None:
        """Gather the sums of all shards, for a reader of whole gradients."""
        if self._scatters and self.shard_group.size() > 1 and len(self.gradients):
            _all_gather(self.gradients, self.summed, group=self.shard_group)


class StageBuffer:
    """The gradients, weights and main parameters of one stage on this rank: a buffer for each bucket.

    `position` is the rank's (`Module.position`). `weights` are those of the network, and `full` their initial values
    before they were rounded to its precision.
    """

    def __init__(
        self,
        *,
        topology: Topology,
        position: Mapping[str, int],
        info: StageInfo,
        weights: Mapping[str, nn.Parameter],
        full: Mapping[str, torch.Tensor],
        groups: ModuleGroups,
        streams: Streams,
        shared: bool,
    ) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
        self._groups = groups
        sizes = {name: weight.numel() for name, weight in self.weights.items()}
        like = next(iter(self.weights.values()), torch.empty(0))  # There may be none.
        self.buffers = tuple(
            Buffer(bucket, self.weights, full, groups, streams, like=like, shared=shared)
            for bucket in layout_of(topology, info, sizes)
        )
        self._tied = [buffer for buffer in self.buffers if buffer.bucket.section is Section.TIED]
        table = {parameter.name: parameter for parameter in info.parameters}
        # If ranks share the update, each counts what it updates.
        counter = {**position, **{axis: 0 for axis in REPLICA_AXES if shared and axis in position}}
        self.counted = frozenset(n for n in self.weights if counts_in_norm(counter, info, table.get(n)))
        # Of these, those for which this rank writes states of the optimizer that are one value for all tp ranks.
        self.written = frozenset(n for n in self.weights if is_written_by(counter, info, table.get(n)))
        self._counted = [part for buffer in self.buffers for part in buffer.parts(self.counted)]

    def clear(self) -> None:
        """Set every gradient to zero."""
        for buffer in self.buffers:
            buffer.gradients.zero_()

    def tie(self) -> None:
        """All-reduce the gradients of tied weights over the two ends of the module."""
        for buffer in self._tied:
            dist.all_reduce(buffer.summed, group=self._groups.tie)

    def scale(self, factor: float) -> None:
        """Multiply every gradient by a factor."""
        for buffer in self.buffers:
            buffer.summed.mul_(factor)

    @property
    def is_finite(self) -> bool:
        """Whether every summed gradient on this rank is finite, counted in the norm or not."""
        # The extremes are NaN if any value is, and need no room.
        found = [
            extreme for buffer in self.buffers if len(buffer.summed) for extreme in buffer.summed.aminmax()
        ]
        return bool(torch.stack(found).isfinite().all()) if found else True

    def partials(self) -> list[float]:
        """Return the sums of squares whose total over all ranks is the square of the global norm.

        There are some for each part of a parameter that a shard of the bucket has. So the numbers are the same whether
        or not the ranks share the update. Large parts are squared piece by piece: fp64 takes room.
        """
        found = [
            piece.double().square().sum() for part in self._counted for piece in part.split(SQUARED_AT_ONCE)
        ]
        return list(torch.stack(found).tolist()) if found else []

    def copy_main_to_model(self) -> None:
        """Copy the main parameters that this rank has to its weights."""
        for buffer in self.buffers:
            buffer.copy_main_to_model()

    def complete(self) -> None:
        """Gather stale weights now; all ranks that share the update call it."""
        for buffer in self.buffers:
            buffer.gather()
        for buffer in self.buffers:
            buffer.wait_for_weights()

    def gather_gradients(self) -> None:
        """Gather the sums of all shards now; all ranks that share the update call it."""
        for buffer in self.buffers:
            buffer.gather_gradients()
