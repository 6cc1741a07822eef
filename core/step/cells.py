"""Cells: how the samples of a step are dealt to microbatches and dp ranks so that all of these take equally long.

A step is cut into *cells*, one for each microbatch and lane, microbatch by microbatch. A lane is a part of the dp ranks:
there are as many lanes as the least common multiple of the modules' dp sizes, and the most microbatches that any module
makes. So what a dp rank of any module has in a microbatch is a run of whole cells, and routes, shapes and messages
follow from where the cells begin.

Dealing is longest-processing-time first (Graham 1969), once over lanes and once over the cells of a lane. Costs are
seconds on each group of ranks, so a sample is a vector. Of the few least loaded lanes it goes to the one whose load
points least in its own direction: the smallest dot product, which adds least to the sum of squares. Then it goes to a
cell of the lane in the same way. Each lane puts its heaviest cell into the same microbatch, and so on down, since a
microbatch takes as long as its heaviest cell.

No cell has more positions in any module than the samples of an even cut would have at most, if all were as large as
the largest of the step. So balancing needs no more memory than the largest samples need without it. A cell with room
always exists: while samples are left, some cell has fewer than that many.

>>> dealt = deal([(4.0,), (1.0,), (1.0,), (2.0,)], [(4,), (1,), (1,), (2,)], microbatches=1, lanes=2)
>>> dealt.order, dealt.cells
((0, 1, 2, 3), (0, 1, 4))
"""

import heapq
import operator
from collections.abc import Sequence

import attrs

from mimogrid.core.base.samples import prefix_sums


LOOKED_AT = 4
"""How many of the least loaded lanes, and of the least loaded cells of a lane, are compared."""

Vector = Sequence[float]


@attrs.frozen
class Dealt:
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


def deal(costs: Sequence[Vector], sizes: Sequence[Sequence[int]], *, microbatches: int, lanes: int) -> Dealt:
    """Deal samples to cells; there are at least as many samples as cells.

    `costs` has the seconds of each sample on each group of ranks, and `sizes` its positions in each module.
    """
    groups = range(len(costs[0]))
    fits = samples_per_cell(len(costs), microbatches * lanes)
    most = [fits * max(column) for column in zip(*sizes, strict=True)]
    of_lanes = _Bins.empty(lanes, groups)
    of_cells = [_Bins.empty(microbatches, groups) for _ in range(lanes)]
    rooms = [[list(most) for _ in range(microbatches)] for _ in range(lanes)]
    found: list[list[list[int]]] = [[[] for _ in range(microbatches)] for _ in range(lanes)]
    for i in sorted(range(len(costs)), key=lambda i: (-max(costs[i], default=0.0), i)):
        cost, size, passed = costs[i], sizes[i], list[int]()
        lane = of_lanes.take(cost)
        while (cell := of_cells[lane].take(cost, rooms[lane], size)) is None:
            passed.append(lane)
            lane = of_lanes.take(cost)
        for other in passed:
            of_lanes.put_back(other)
        of_lanes.add(lane, cost)
        of_cells[lane].add(cell, cost)
        rooms[lane][cell] = list(map(operator.sub, rooms[lane][cell], size))
        found[lane][cell].append(i)
    by_load = [bins.heaviest_first() for bins in of_cells]
    cells = [sorted(found[lane][by_load[lane][k]]) for k in range(microbatches) for lane in range(lanes)]
    return Dealt(tuple(i for cell in cells for i in cell), prefix_sums([len(cell) for cell in cells]))


@attrs.frozen(eq=False)
class _Bins:
    """Bins with the load of each, as vectors, and a heap of them: the least of the largest loads first."""

    loads: list[list[float]]
    counts: list[int]
    heap: list[tuple[float, int, int]]

    @classmethod
    def empty(cls, count: int, groups: range) -> "_Bins":
        return cls([[0.0 for _ in groups] for _ in range(count)], [0] * count, [(0.0, 0, i) for i in range(count)])

    def take(
        self, cost: Vector, rooms: Sequence[Sequence[int]] = (), size: Sequence[int] = ()
    ) -> int | None:
        """Take the bin out of the heap that a sample goes to best; None if none has room for its size."""
        heap, loads = self.heap, self.loads
        seen: list[tuple[float, int, int]] = []
        best, least, looked = -1, 0.0, 0
        while heap and looked < LOOKED_AT:
            entry = heapq.heappop(heap)
            index = entry[2]
            if not rooms or all(map(operator.ge, rooms[index], size)):
                adds = sum(map(operator.mul, loads[index], cost))
                if best < 0 or adds < least:
                    best, least = len(seen), adds
                looked += 1
            seen.append(entry)
        taken = seen.pop(best) if looked else None
        for entry in seen:
            heapq.heappush(heap, entry)
        return taken[2] if taken else None

    def add(self, index: int, cost: Vector) -> None:
        """Add a sample to a bin that was taken, and put it back."""
        self.loads[index] = list(map(operator.add, self.loads[index], cost))
        self.counts[index] += 1
        self.put_back(index)

    def put_back(self, index: int) -> None:
        """Put a bin back that was taken."""
        heapq.heappush(self.heap, (max(self.loads[index], default=0.0), self.counts[index], index))

    def heaviest_first(self) -> list[int]:
        """Return all bins by their largest load."""
        return sorted(range(len(self.loads)), key=lambda i: (-max(self.loads[i], default=0.0), i))
