"""Gradients: flat buffers per stage, summed over the ranks that the gradient plan names.

Every trainable parameter's gradient is a view of a buffer of its stage, and so is the parameter itself: backward
passes add into the one, a sum is one all-reduce for each bucket (`core.update.buckets`), posted and waited for
where the program says, and a parameter that a shard never touched counts as zeros there, not as absent.

In half precision the network computes with bf16 or fp16 weights, and beside them are fp32 *main* weights, which
the optimizer updates and checkpoints hold. Gradients are added up in fp32 too: autograd raises each as it comes
(`Tensor.grad_dtype`). In fp32 and fp64 the main weights are the weights.

Where the dp ranks share the update (ZeRO stage 1: Rajbhandari et al. 2020), a shard has the main weights of
its own part of each bucket only, updates it, and the shards gather the weights. The sum is an all-reduce there
too: gloo makes its reduce-scatter out of one, and so both ways see the same bits.

On a device that computes asynchronously a sum begins after all that computing was asked for before it was posted: torch
records an event on the current stream, for which the backend's own waits. Waiting for it holds up computing, not
the host. What is posted and waited for at once (ties, weights that shards gather) is in order with computing anyway.
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


LANES = ("dp", "cp", "expert_dp")
"""The axes along which ranks hold the same values of a parameter."""


@attrs.frozen(eq=False)
class Shard:
    """The values of a parameter that this rank updates: flat, with their gradient."""

    part: ParameterRange
    main: nn.Parameter


class Buffer:
    """One bucket on this rank: gradients, weights, and the main weights that this rank updates."""

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
        self._summing = groups.partial if bucket.section is Section.PARTIAL else self.shard_group
        self._streams = streams
        self._sum: Posted | None = None
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
        """Yield the gradient of each shard's part of these parameters, of those shards whose parts are updated here."""
        starts = {span.name: span.start for span in self.bucket.spans}
        for part in (part for shard in self.updated for part in self.bucket.parts(shard)):
            if part.name in names:
                yield self.gradients[starts[part.name] + part.start : starts[part.name] + part.stop]

    def reduce(self) -> None:
        """Post the sum of the gradients over the ranks that share it; nobody touches them until it is there."""
        if len(self.gradients):  # Own networks may have none.
            work = dist.all_reduce(self.gradients, group=self._summing, async_op=True)
            self._sum = self._streams.posted(work, self.gradients, arrives=True)

    def wait(self) -> None:
        """Let what is computed from here on happen after the sum."""
        if self._sum is not None:
            self._sum.wait()
            self._sum = None

    def copy_main_to_model(self) -> None:
        """Let the weights follow the main weights, on all shards."""
        if self._is_lowered:
            self.weights[self.own] = self.main
        if self.shared and self.shard_group.size() > 1 and len(self.weights):
            parts = list(self.weights.chunk(self.bucket.shards))
            dist.all_gather(parts, self.weights[self.own].clone(), group=self.shard_group)


class StageBuffer:
    """The gradients, and what is updated by them, of one stage on this rank: a buffer for each bucket.

    `position` is the rank's (`Module.position`). `weights` are those of the network, and `full` what they were
    drawn as, before they were rounded to its precision.
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
        like = next(iter(weights.values()), torch.empty(0))  # A module of the user's may have none.
        self.buffers = tuple(
            Buffer(bucket, self.weights, full, groups, streams, like=like, shared=shared)
            for bucket in layout_of(topology, info, sizes)
        )
        self._tied = [buffer for buffer in self.buffers if buffer.bucket.section is Section.TIED]
        table = {parameter.name: parameter for parameter in info.parameters}
        # Where shards share the update, what counts is counted by whoever updates it.
        counter = {**position, **{axis: 0 for axis in LANES if shared and axis in position}}
        self.counted = frozenset(n for n in self.weights if counts_in_norm(counter, info, table.get(n)))
        # Of those, who writes what there is one of for a parameter, however it is cut over tp.
        self.written = frozenset(n for n in self.weights if is_written_by(counter, info, table.get(n)))
        self._counted = [part for buffer in self.buffers for part in buffer.parts(self.counted)]

    def clear(self) -> None:
        """Set every gradient to zero."""
        for buffer in self.buffers:
            buffer.gradients.zero_()

    def tie(self) -> None:
        """Sum tied weights over the two ends of the module."""
        for buffer in self._tied:
            dist.all_reduce(buffer.gradients, group=self._groups.tie)

    def scale(self, factor: float) -> None:
        """Multiply every gradient by a factor."""
        for buffer in self.buffers:
            buffer.gradients.mul_(factor)

    @property
    def is_finite(self) -> bool:
        """Whether every gradient here is, counted in the norm or not."""
        found = [buffer.gradients.isfinite().all() for buffer in self.buffers]
        return bool(torch.stack(found).all()) if found else True

    def partials(self) -> list[float]:
        """Return the sums of squares whose total over all ranks is the square of the global norm.

        There is one for each part of a parameter that some shard would update if they shared the update. So
        they are the same numbers whether or not they do.
        """
        found = [part.double().square().sum() for part in self._counted]
        return list(torch.stack(found).tolist()) if found else []

    def copy_main_to_model(self) -> None:
        """Let the weights follow the main weights, on all shards."""
        for buffer in self.buffers:
            buffer.copy_main_to_model()
