"""Shards: how the parameters of a stage lie in flat buffers, and which part of these each data lane updates.

What is summed over the same ranks lies in one region: `common` parameters, those that both ends of the module
hold (`tied`; a region of their own, so that it is cut alike at both ends), and `experts`. In `common`, parameters
with gradients that are partial over tp come first.

Every parameter begins at a multiple of `ALIGNMENT`, and a region is padded until its lanes have equal parts
of such multiples. So however a parameter is cut, its values meet the same vector instructions as if it were
whole, and an update of parts is bitwise the update of the whole. The cuts are the same whether or not the lanes
share the update: one layout, of which a lane updates its own part or all.

>>> region = region_of({"a": 100, "b": 60}, lanes=2)
>>> region.size, [list(region.parts(lane)) for lane in (0, 1)]
(256, [[Part(name='a', start=0, stop=100)], [Part(name='b', start=0, stop=60)]])
"""

import math
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.models import Parameter
from mimogrid.core.optimizers import HALF, MAIN_BYTES, states_of
from mimogrid.core.topology import Module, StageInfo, Topology


ALIGNMENT = 64
"""Values; more than torch's kernels take at once on any CPU (two vectors of 512 bits in fp32 are 32)."""


@attrs.frozen
class Span:
    """Where a parameter lies in a region."""

    name: str
    start: int
    size: int


@attrs.frozen
class Part:
    """The values `start` to `stop` of a flattened parameter."""

    name: str
    start: int
    stop: int


@attrs.frozen
class Region:
    """Parameters one after the other, cut into equal parts for `lanes`."""

    spans: tuple[Span, ...]
    lanes: int
    size: int

    def lane(self, lane: int) -> range:
        """Return which values of the region a lane has."""
        each = self.size // self.lanes
        return range(lane * each, (lane + 1) * each)

    def parts(self, lane: int) -> Iterator[Part]:
        """Yield the parts of parameters that a lane has."""
        mine = self.lane(lane)
        for span in self.spans:
            start, stop = max(span.start, mine.start), min(span.start + span.size, mine.stop)
            if start < stop:
                yield Part(span.name, start - span.start, stop - span.start)


@attrs.frozen
class Layout:
    """The regions of a stage on a rank; the first `partial` values of `common` are partial over tp."""

    common: Region
    tied: Region
    experts: Region
    partial: int

    @property
    def regions(self) -> tuple[Region, Region, Region]:
        """All three."""
        return self.common, self.tied, self.experts


def region_of(sizes: Mapping[str, int], *, lanes: int) -> Region:
    """Lay parameters of these sizes one after the other."""
    spans: list[Span] = []
    end = 0
    for name, size in sizes.items():
        spans.append(Span(name, end, size))
        end += _rounded(size, ALIGNMENT)
    return Region(tuple(spans), lanes, _rounded(end, ALIGNMENT * lanes))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def layout_of(module: Module, info: StageInfo, sizes: Mapping[str, int]) -> Layout:
    """Lay out what trains of a stage on a rank; `sizes` are the values that the rank holds of each."""
    table = {parameter.name: parameter for parameter in info.parameters}
    sections: dict[str, list[str]] = {"partial": [], "whole": [], "tied": [], "experts": []}
    for name in sizes:
        sections[_section(module, table.get(name))].append(name)
    lanes = module.grid.extent("dp") * module.grid.extent("cp")
    copies = module.experts.extent("expert_dp") if module.experts else 1

    def region(names: list[str], lanes: int) -> Region:
        return region_of({name: sizes[name] for name in names}, lanes=lanes)

    return Layout(
        common=region(sections["partial"] + sections["whole"], lanes),
        tied=region(sections["tied"], lanes),
        experts=region(sections["experts"], copies),
        partial=region(sections["partial"], 1).size,
    )


def _section(module: Module, parameter: Parameter | None) -> str:
    if parameter is None:  # Of a module of the user's.
        return "whole"
    if parameter.expert is not None:
        return "experts"
    if parameter.copy is not None:
        assert not module.is_partial(parameter), parameter.name
        return "tied"
    return "partial" if module.is_partial(parameter) else "whole"


# -- bytes -------------------------------------------------------------------------------------------------


def optimizer_bytes(topology: Topology, rank: int) -> int:
    """Return the bytes that the optimizer keeps on a rank, as far as the plan knows its parameters.

    These are its states, and in half precision the weights that it updates; a count of steps is not in it.
    """
    spec = topology.spec
    width, states = MAIN_BYTES[spec.precision], len(states_of(spec.optimizer))
    total = 0
    for info in topology.stages_of(rank):
        module = topology.modules[info.stage.module]
        held = module.held(info, module.position(rank).get("ep", 0))
        sizes = {p.name: local_size(module, p) for p in held if p.name in info.trainable}
        for region, lane in zip(layout_of(module, info, sizes).regions, lanes_of(module, rank), strict=True):
            lanes = (lane,) if spec.optimizer.sharded else range(region.lanes)
            values = sum(part.stop - part.start for lane in lanes for part in region.parts(lane))
            main = sum(len(region.lane(lane)) for lane in lanes) if spec.precision in HALF else 0
            total += width * (states * values + main)
    return total


def lanes_of(module: Module, rank: int) -> tuple[int, int, int]:
    """Return which lane of each region a rank is."""
    lane = module.grid.group_of(rank, ("cp", "dp")).index(rank)
    copy = module.experts.group_of(rank, ("expert_dp",)).index(rank) if module.experts else 0
    return lane, lane, copy


def local_size(module: Module, parameter: Parameter) -> int:
    """Return how many values of a parameter a rank holds that holds any."""
    size = math.prod(parameter.shape)
    if parameter.tp_dim is None:
        return size
    if parameter.expert is not None and module.experts:
        return size // module.experts.extent("expert_tp")
    return size // module.grid.extent("tp")


# -- places ------------------------------------------------------------------------------------------------


Indices = tuple[int, ...]


def boxes(shape: Indices, start: int, stop: int) -> Iterator[tuple[Indices, Indices]]:
    """Cut the values `start` to `stop` of a flattened tensor into blocks of it, in order: (offsets, lengths).

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
    """The same inside of one row."""
    if start < stop:
        begin = index * math.prod(shape[1:])
        for offsets, lengths in boxes(shape[1:], start - begin, stop - begin):
            yield (index, *offsets), (1, *lengths)
