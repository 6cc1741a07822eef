"""Buckets: how the parameters of a stage lie in flat buffers, and which part of a buffer each rank updates.

Parameters whose gradients are all-reduced over the same ranks may share a bucket (`Section`): common parameters,
those with gradients that are partial along tp, tied parameters (one bucket of their own, cut alike at both ends of
the module), and experts. Each bucket is reduced in one call. A bucket is full when it has `bucket_mb` of gradients.
Buckets are numbered in the order in which a backward completes them, so the last layers are in the first bucket.

A bucket is cut into equal *shards*, one for each of the ranks that hold the same values. With a sharded update each
rank updates its own shard, else it updates all of them; the cuts are the same. Every parameter starts at a multiple
of `ALIGNMENT`, and so does every shard. So each value meets the same vector instructions, whether its
parameter is cut or not, and an update of the parts is bitwise the update of the complete parameter.

>>> bucket = bucket_of(Section.COMMON, {"a": 100, "b": 60}, shards=2)
>>> bucket.size, [list(bucket.parts(shard)) for shard in (0, 1)]
(256, [[ParameterRange(name='a', start=0, stop=100)], [ParameterRange(name='b', start=0, stop=60)]])

Buckets are an idea of PyTorch's DistributedDataParallel (Li et al., VLDB 2020), sharded updates one of ZeRO
(Rajbhandari et al. 2020).
"""

import bisect
import enum
import functools
import itertools
import math
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.job.models import Parameter
from mimogrid.core.job.optimizers import states_of
from mimogrid.core.job.precision import HALF, MAIN_BYTES
from mimogrid.core.topology.topology import UNKNOWN, Module, Stage, StageInfo, Topology


ALIGNMENT = 64
"""In values. Torch's CPU kernels process fewer at once (two vectors of 512 bits are 32 values in fp32)."""
MEGA = 1_000_000


class Section(enum.Enum):
    """The kinds of parameters that may share a bucket: their gradients are all-reduced over the same ranks."""

    COMMON = "common"
    PARTIAL = "partial along tp"
    TIED = "tied"
    EXPERTS = "experts"

    __hash__ = object.__hash__  # there is one object of each


@attrs.frozen
class Span:
    """Where a parameter lies in a bucket."""

    name: str
    start: int
    size: int


@attrs.frozen
class ParameterRange:
    """The values `start` to `stop` of a flattened parameter."""

    name: str
    start: int
    stop: int


@attrs.frozen
class Bucket:
    """Parameters one after the other in a flat buffer of `size` values, cut into `shards` equal parts."""

    section: Section
    spans: tuple[Span, ...]
    shards: int
    size: int

    def shard(self, shard: int) -> range:
        """Return the values of the bucket that a shard has."""
        each = self.size // self.shards
        return range(shard * each, (shard + 1) * each)

    def values_in(self, shard: range) -> int:
        """Return how many values of parameters lie in a part of the bucket."""
        return self._values_before(shard.stop) - self._values_before(shard.start)

    def _values_before(self, place: int) -> int:
        starts, before = self._starts
        last = bisect.bisect_left(starts, place) - 1
        return before[last] + min(place - starts[last], self.spans[last].size) if last >= 0 else 0

    @functools.cached_property
    def _starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where each parameter begins, and how many values of parameters lie before it."""
        sizes = itertools.accumulate((span.size for span in self.spans), initial=0)
        return tuple(span.start for span in self.spans), tuple(sizes)

    def parts(self, shard: int) -> Iterator[ParameterRange]:
        """Yield the ranges of parameters that a shard has."""
        mine = self.shard(shard)
        for span in self.spans:
            start, stop = max(span.start, mine.start), min(span.start + span.size, mine.stop)
            if start < stop:
                yield ParameterRange(span.name, start - span.start, stop - span.start)


def bucket_of(section: Section, sizes: Mapping[str, int], *, shards: int) -> Bucket:
    """Lay parameters of these sizes one after the other."""
    spans: list[Span] = []
    end = 0
    for name, size in sizes.items():
        spans.append(Span(name, end, size))
        end += _rounded(size, ALIGNMENT)
    return Bucket(section, tuple(spans), shards, _rounded(end, ALIGNMENT * shards))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def layout_of(topology: Topology, info: StageInfo, sizes: Mapping[str, int]) -> tuple[Bucket, ...]:
    """Return the buckets of a stage on a rank; `sizes` has the local size of each parameter that trains, in values.

    The parameters of a user's own module are known only after it is built, so they go into one bucket, the last.
    A host program's network may have other parameters than the plan has for the stage. They are distributed over
    the planned buckets, because the program reduces those.
    """
    module = topology.modules[info.stage.module]
    place = {parameter.name: i for i, parameter in enumerate(info.parameters)}
    sections: dict[Section, list[str]] = {}
    for parameter in info.parameters:
        if parameter.name in sizes:
            sections.setdefault(_section(module, parameter), []).append(parameter.name)
    if info.parameters != topology.stages[info.stage].parameters:
        planned = _planned(topology, info.stage, 0)
        return tuple(
            bucket_of(bucket.section, {name: sizes[name] for name in names}, shards=bucket.shards)
            for bucket, names in zip(planned, _distributed(planned, sections, sizes), strict=True)
        )
    full = _values_in_bucket(topology)
    cut = [
        (section, names)
        for section, own in sections.items()
        for names in ([own] if section is Section.TIED else _cut(own, sizes, full))
    ]
    cut.sort(key=lambda each: -place[each[1][0]])
    if UNKNOWN in info.trainable:
        cut.append((Section.COMMON, [name for name in sizes if name not in place]))
    return tuple(
        bucket_of(section, {name: sizes[name] for name in names}, shards=_shard_count(module, section))
        for section, names in cut
    )


def _values_in_bucket(topology: Topology) -> int:
    spec = topology.spec
    return max(int(spec.optimizer.bucket_mb * MEGA / MAIN_BYTES[spec.precision]), 1)


def _cut(names: list[str], sizes: Mapping[str, int], full: int) -> list[list[str]]:
    """Cut names, which are in forward order, into runs from the end; a run ends when it has at least `full` values."""
    runs: list[list[str]] = [[]]
    held = 0
    for name in reversed(names):
        if held >= full:
            runs.append([])
            held = 0
        runs[-1].append(name)
        held += sizes[name]
    return [run[::-1] for run in runs]


def _distributed(
    planned: tuple[Bucket, ...], sections: Mapping[Section, list[str]], sizes: Mapping[str, int]
) -> Iterator[list[str]]:
    """Distribute names, which are in forward order, from the end over the planned buckets of their section.

    Each bucket gets an equal part of what is left, or a little more. Later buckets stay empty if there is too little.
    """
    assert set(sections) <= {bucket.section for bucket in planned}, "the plan does not reduce this section"
    left = {section: [*names] for section, names in sections.items()}
    for i, bucket in enumerate(planned):
        names = left.setdefault(bucket.section, [])
        to_come = sum(other.section is bucket.section for other in planned[i:])
        even = sum(sizes[name] for name in names) / to_come
        run: list[str] = []
        while names and (to_come == 1 or sum(sizes[name] for name in run) < even):
            run.append(names.pop())
        yield run[::-1]


def _section(module: Module, parameter: Parameter) -> Section:
    if parameter.expert is not None:
        return Section.EXPERTS
    if parameter.copy is not None:
        assert not module.is_partial(parameter), parameter.name
        return Section.TIED
    return Section.PARTIAL if module.is_partial(parameter) else Section.COMMON


def _shard_count(module: Module, section: Section) -> int:
    if section is Section.EXPERTS:
        assert module.experts is not None
        return module.experts.extent("expert_dp")
    return module.grid.extent("dp") * module.grid.extent("cp")


# -- ranks -------------------------------------------------------------------------------------------------


def sharing_ranks(module: Module, rank: int, section: Section) -> tuple[int, ...]:
    """Return the ranks that hold the same values as `rank`, in the order of their shards."""
    if section is Section.EXPERTS:
        assert module.experts is not None
        return module.experts.group_of(rank, ("expert_dp",))
    return module.grid.group_of(rank, ("cp", "dp"))


def shared_by(module: Module, rank: int, section: Section) -> tuple[int, ...]:
    """Return the ranks over which the gradients of a section are all-reduced."""
    if section is Section.PARTIAL:
        return module.grid.group_of(rank, ("tp", "cp", "dp"))
    return sharing_ranks(module, rank, section)


def buckets_of(topology: Topology, info: StageInfo, rank: int) -> tuple[Bucket, ...]:
    """Return the planned buckets of a stage on a rank. A stage of an own module has one, of unknown size (0)."""
    return _planned(topology, info.stage, topology.modules[info.stage.module].ep_rank_of(rank))


@functools.lru_cache(maxsize=4096)
def _planned(topology: Topology, stage: Stage, ep: int) -> tuple[Bucket, ...]:
    module, info = topology.modules[stage.module], topology.stages[stage]
    sizes = {p.name: local_size(module, p) for p in module.held(info, ep) if p.name in info.trainable}
    return layout_of(topology, info, sizes)


def share_of(topology: Topology, stage: Stage, bucket: int) -> float:
    """Return the share of a bucket in its stage's gradients; equal shares if the plan does not know the sizes."""
    return _shares(topology, stage)[bucket]


@functools.lru_cache(maxsize=4096)
def _shares(topology: Topology, stage: Stage) -> tuple[float, ...]:
    sizes = [each.size for each in _planned(topology, stage, 0)]
    return tuple(size / sum(sizes) if all(sizes) else 1 / len(sizes) for size in sizes)


# -- bytes -------------------------------------------------------------------------------------------------


def optimizer_bytes(topology: Topology, rank: int) -> int:
    """Return the bytes that the optimizer keeps on a rank, as far as the plan knows its parameters.

    These are the states and, in half precision, the main parameters. The count of steps is left out.
    """
    spec = topology.spec
    width, states = MAIN_BYTES[spec.precision], len(states_of(spec.optimizer))
    total = 0
    for info in topology.role(rank).stages:
        module = topology.modules[info.stage.module]
        buckets = buckets_of(topology, info, rank)
        shares = {bucket.section for bucket in buckets} if spec.optimizer.sharded else ()
        owns = {section: sharing_ranks(module, rank, section).index(rank) for section in shares}
        for bucket in buckets:
            if spec.optimizer.sharded:
                own = owns[bucket.section]
                mine = bucket.shard(own)
                values, main = bucket.values_in(mine), len(mine)
            else:
                values, main = sum(span.size for span in bucket.spans), bucket.size
            total += width * (states * values + (main if spec.precision in HALF else 0))
    return total


def local_size(module: Module, parameter: Parameter) -> int:
    """Return how many values of a parameter a rank holds, if it holds any."""
    size = math.prod(parameter.shape)
    if parameter.tp_dim is None:
        return size
    if parameter.expert is not None and module.experts:
        return size // module.experts.extent("expert_tp")
    return size // module.grid.extent("tp")


# -- places ------------------------------------------------------------------------------------------------


Indices = tuple[int, ...]


def boxes(shape: Indices, start: int, stop: int) -> Iterator[tuple[Indices, Indices]]:
    """Cut the values `start` to `stop` of a flattened tensor into blocks of the tensor, in order: (offsets, lengths).

    >>> list(boxes((4, 3), 2, 10))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if len(shape) < 2:  # noqa: PLR2004
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _within(shape, last, start, stop)
        return
    yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * len(shape[1:])), (last - first, *shape[1:])
    yield from _within(shape, last, last * row, stop)


def _within(shape: Indices, index: int, start: int, stop: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield the blocks inside one row, the row `index` of the first dim."""
    if start < stop:
        begin = index * math.prod(shape[1:])
        for offsets, lengths in boxes(shape[1:], start - begin, stop - begin):
            yield (index, *offsets), (1, *lengths)
