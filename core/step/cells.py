"""Cells: how the samples of a step are assigned to microbatches and dp ranks so that all of these take equally long.

A step is cut into *cells*, one for each microbatch and lane, microbatch by microbatch. There are as many lanes as the
least common multiple of the modules' dp sizes, and as many microbatches as that of their numbers of microbatches. So
what a dp rank of any module has in a microbatch is a run of whole cells, and routes, shapes and messages follow from
where the cells begin.

Assigning is longest-processing-time first (Graham 1969), once over lanes and once over the cells of a lane. Costs are
seconds on each group of ranks, so a sample is a vector. Of the two least loaded lanes it goes to the one whose load
points less in its own direction: the smaller dot product, which adds less to the sum of squares. Then it goes to a
cell of the lane in the same way.

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

import heapq
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
    groups = len(costs[0])
    of_lanes = _Bins.empty(lanes, groups)
    of_cells = [_Bins.empty(microbatches, groups) for _ in range(lanes)]
    rooms = [[tuple(most)] * microbatches for _ in range(lanes)]
    found: list[list[list[int]]] = [[[] for _ in range(microbatches)] for _ in range(lanes)]
    largest = list(map(max, costs))
    for i in sorted(range(len(costs)), key=largest.__getitem__, reverse=True):
        cost, size = costs[i], sizes[i]
        lane = of_lanes.best(cost)
        cell = of_cells[lane].best(cost)
        left = tuple(map(operator.sub, rooms[lane][cell], size))
        if min(left) < 0:
            place = _with_room(of_cells, rooms, size)
            if place is None:
                return None
            lane, cell = place
            left = tuple(map(operator.sub, rooms[lane][cell], size))
        of_lanes.add(lane, cost)
        of_cells[lane].add(cell, cost)
        rooms[lane][cell] = left
        found[lane][cell].append(i)
    in_order = _in_microbatches(of_cells, joined)
    cells = [sorted(found[lane][in_order[lane][k]]) for k in range(microbatches) for lane in range(lanes)]
    return CellAssignment(
        tuple(i for cell in cells for i in cell), prefix_sums([len(cell) for cell in cells])
    )


def _in_microbatches(of_cells: "Sequence[_Bins]", joined: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the cells of each lane in the order of the microbatches that they are put into."""
    totals = [
        math.fsum(column) for column in zip(*(load for bins in of_cells for load in bins.loads), strict=True)
    ]
    busiest = totals.index(max(totals))
    found: list[tuple[int, ...]] = []
    for first in range(0, len(of_cells), joined[busiest]):
        lanes = [[load[busiest] for load in bins.loads] for bins in of_cells[first : first + joined[busiest]]]
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
    """Bins, each with its load by group and its number of samples.

    The heap has an entry of each bin, by its largest load. It may also have some from before its load grew, which are
    dropped where they come up.
    """

    loads: list[Vector]
    counts: list[int]
    heap: list[tuple[float, int, int]]

    @classmethod
    def empty(cls, count: int, groups: int) -> "_Bins":
        zero = (0.0,) * groups
        return cls([zero] * count, [0] * count, [(0.0, 0, i) for i in range(count)])

    def best(self, cost: Vector) -> int:
        """Return the bin that a sample goes to best."""
        heap, loads = self.heap, self.loads
        first = self._least()
        if len(cost) == 1 or len(loads) == 1:
            return first[2]
        heapq.heappop(heap)
        second = self._least()
        heapq.heappush(heap, first)
        one, other = loads[first[2]], loads[second[2]]
        less = sum(map(operator.mul, other, cost)) < sum(map(operator.mul, one, cost))
        return second[2] if less else first[2]

    def _least(self) -> tuple[float, int, int]:
        """Return the first entry of the heap that holds."""
        heap, counts = self.heap, self.counts
        while heap[0][1] != counts[heap[0][2]]:
            heapq.heappop(heap)
        return heap[0]

    def add(self, index: int, cost: Vector) -> None:
        """Add a sample to a bin."""
        load = self.loads[index] = tuple(map(operator.add, self.loads[index], cost))
        self.counts[index] += 1
        heapq.heappush(self.heap, (max(load), self.counts[index], index))
