"""Cells: how the samples of a step are assigned to microbatches and dp ranks so that all of these take equally long.

A step is cut into *cells*, one for each microbatch and lane, microbatch by microbatch. There are as many lanes as the
least common multiple of the modules' dp sizes, and as many microbatches as that of their numbers of microbatches. So
what a dp rank of any module has in a microbatch is a run of whole cells, and routes, shapes and messages follow from
where the cells begin.

Assigning is longest-processing-time first (Graham 1969), once over lanes and once over the cells of a lane. Costs are
seconds on each group of ranks, so a sample is a vector. Of the two least loaded lanes it goes to the one whose load
points less in its own direction: the smaller dot product, which adds less to the sum of squares. Then it goes to a
cell of the lane in the same way.

If samples are longer than a cell should be, the other cells of a lane are made to differ, from nearly as heavy to as
far below the mean. A pipeline loses little where the next microbatch is nearly as heavy, and much at a single heavy
one: with few microbatches in flight, a stage waits for it as long as it takes in the other stages.

Then the cells of each lane are put into microbatches, by the group of ranks that is busiest. Where a dp rank of it has
several lanes, heavy cells of one meet light cells of the others, so that its shares become alike. The heaviest shares
of all dp ranks meet in one microbatch, which takes as long as the heaviest, and so on down. That microbatch is in the
middle of the step, and the lightest are at both ends, where the pipeline fills and drains.

A cell has limits. By default it has no more positions in any module than the samples of an even cut would have at
most, if all were as large as the largest of the step (`even_most`). So balancing needs no more memory than the largest
samples need without it. A cell with room always exists: while samples are left, some cell has fewer than that many.
Where microbatches have a limit of tokens (`tokens`), there may be no room left. Then there are too few of them.

>>> costs, sizes = [(4.0,), (1.0,), (1.0,), (2.0,)], [(4,), (1,), (1,), (2,)]
>>> assigned = assign_samples(costs, sizes, even_most(sizes, 2), microbatches=1, lanes=2, joined=(1,))
>>> assigned.order, assigned.cells
((0, 1, 2, 3), (0, 1, 4))
"""

import bisect
import math
import operator
from collections.abc import Sequence

import attrs

from mimogrid.core.base.samples import prefix_sums


Vector = Sequence[float]


@attrs.frozen
class CellAssignment:
    """How samples are laid out.

    Attributes:
        order: the place that each sample had before.
        cells: where each cell begins among them, and where the last one ends.
    """

    order: tuple[int, ...]
    cells: tuple[int, ...]


def samples_per_cell(samples: int, cells: int) -> int:
    """Return how many samples of the largest size fill a cell.

    >>> samples_per_cell(9, cells=4)
    3
    """
    return -(-samples // cells)


def even_most(sizes: Sequence[Sequence[int]], cells: int) -> tuple[int, ...]:
    """Return the most of each size in a cell of an even cut, if all samples were as large as the largest.

    >>> even_most([(4, 1), (1, 2), (1, 1)], cells=2)
    (8, 4)
    """
    fits = samples_per_cell(len(sizes), cells)
    return tuple(fits * max(column) for column in zip(*sizes, strict=True))


def assign_samples(
    costs: Sequence[Vector],
    sizes: Sequence[Sequence[int]],
    most: Sequence[int],
    *,
    microbatches: int,
    lanes: int,
    joined: Sequence[int],
) -> CellAssignment | None:
    """Assign samples to cells; None if there is no room left for a sample.

    `costs` has the seconds of each sample on each group of ranks. `sizes` has numbers of each sample, such as its
    positions in each module, and `most` what the samples of a cell may have of them together. `joined` has the number
    of neighbouring lanes that a dp rank of each group has.
    """
    largest = list(map(max, costs))
    falling = sorted(range(len(costs)), key=largest.__getitem__, reverse=True)
    means = [math.fsum(column) / (microbatches * lanes) for column in zip(*costs, strict=True)]
    longest = [0.0] * lanes
    if len(costs) >= 2 * microbatches * lanes:
        # The first samples go to one lane each, since these are empty. One sample for a cell has no other to shape it.
        longest = [largest[i] for i in falling[:lanes]]
    starts = [_slope(means, microbatches, of_lane) for of_lane in longest]
    of_lanes = _Bins.of([(0.0,) * len(means)] * lanes)
    of_cells = list(map(_Bins.of, starts))
    rooms = [[tuple(most)] * microbatches for _ in range(lanes)]
    found: list[list[list[int]]] = [[[] for _ in range(microbatches)] for _ in range(lanes)]
    for i in falling:
        cost, size = costs[i], sizes[i]
        lane_rank = of_lanes.best(cost)
        lane = of_lanes.rising[lane_rank][1]
        bins = of_cells[lane]
        cell_rank = bins.best(cost)
        cell = bins.rising[cell_rank][1]
        left = tuple(map(operator.sub, rooms[lane][cell], size))
        if min(left) < 0:
            place = _with_room(of_cells, rooms, size)
            if place is None:
                return None
            lane, cell = place
            bins = of_cells[lane]
            lane_rank, cell_rank = of_lanes.rank(lane), bins.rank(cell)
            left = tuple(map(operator.sub, rooms[lane][cell], size))
        of_lanes.add(lane_rank, cost)
        bins.add(cell_rank, cost)
        rooms[lane][cell] = left
        found[lane][cell].append(i)
    loads = [
        [tuple(map(operator.sub, load, start)) for load, start in zip(bins.loads, of_lane, strict=True)]
        for bins, of_lane in zip(of_cells, starts, strict=True)
    ]
    in_order = _in_microbatches(loads, joined)
    cells = [sorted(found[lane][in_order[lane][k]]) for k in range(microbatches) for lane in range(lanes)]
    return CellAssignment(
        tuple(i for cell in cells for i in cell), prefix_sums([len(cell) for cell in cells])
    )


STEEPEST = 0.9
"""How far the lightest cells of a lane may lie below the mean of a cell, as a part of it."""


def _slope(means: Sequence[float], cells: int, longest: float) -> list[Vector]:
    """Return what the cells of a lane count as loaded before they get a sample, the lightest first.

    `means` are those of a cell, by group, and `longest` is the cost of the longest sample of the lane. If it is longer
    than a cell should be, loads fall from it to as far below the mean.
    """
    rise = min(max(longest / max(means) - 1, 0.0), STEEPEST) if any(means) else 0.0
    steps = [2 * rise * (1 - k / max(cells - 1, 1)) for k in range(cells)]
    return [tuple(step * mean for mean in means) for step in steps]


def _in_microbatches(of_cells: Sequence[Sequence[Vector]], joined: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the cells of each lane in the order of the microbatches that they are put into, by their loads."""
    totals = [math.fsum(column) for column in zip(*(load for of in of_cells for load in of), strict=True)]
    busiest = totals.index(max(totals))
    found: list[tuple[int, ...]] = []
    for first in range(0, len(of_cells), joined[busiest]):
        lanes = [[load[busiest] for load in of] for of in of_cells[first : first + joined[busiest]]]
        shares, together = [0.0 for _ in lanes[0]], [list[int]() for _ in lanes[0]]
        for loads in lanes:
            light = sorted(range(len(shares)), key=shares.__getitem__)
            heavy = sorted(range(len(loads)), key=loads.__getitem__, reverse=True)
            for share, cell in zip(light, heavy, strict=True):
                shares[share] += loads[cell]
                together[share].append(cell)
        rising = sorted(range(len(shares)), key=shares.__getitem__)
        found += zip(*(together[i] for i in (*rising[::2], *reversed(rising[1::2]))), strict=True)
    return found


def _with_room(
    of_cells: "Sequence[_Bins]", rooms: Sequence[Sequence[Sequence[int]]], size: Sequence[int]
) -> tuple[int, int] | None:
    """Return the least loaded cell, by lane and number, that has room for a sample; None if none has."""
    having = (
        (lane, cell)
        for lane, of_lane in enumerate(rooms)
        for cell, room in enumerate(of_lane)
        if all(map(operator.ge, room, size))
    )
    return min(having, key=lambda place: (max(of_cells[place[0]].loads[place[1]]), place), default=None)


@attrs.frozen(eq=False)
class _Bins:
    """Bins with their loads by group; `rising` has their largest loads and their numbers, the least loaded first."""

    loads: list[Vector]
    rising: list[tuple[float, int]]

    @classmethod
    def of(cls, loads: Sequence[Vector]) -> "_Bins":
        return cls(list(loads), sorted((max(load), i) for i, load in enumerate(loads)))

    def best(self, cost: Vector) -> int:
        """Return the rank of the bin that a sample goes to best: 0 for the least loaded, or 1."""
        loads, rising = self.loads, self.rising
        if len(cost) == 1 or len(rising) == 1:
            return 0
        one, other = loads[rising[0][1]], loads[rising[1][1]]
        return int(sum(map(operator.mul, other, cost)) < sum(map(operator.mul, one, cost)))

    def rank(self, number: int) -> int:
        """Return the rank of a bin."""
        return self.rising.index((max(self.loads[number]), number))

    def add(self, rank: int, cost: Vector) -> None:
        """Add a sample to the bin of a rank."""
        _, number = self.rising.pop(rank)
        load = self.loads[number] = tuple(map(operator.add, self.loads[number], cost))
        bisect.insort(self.rising, (max(load), number))
