"""Segments: how many rows a module emits for a segment of the rows that it reads.

A segment is an image, a clip or a sound. Its grid says how its rows lie: (frames, height, width), or (length,).

>>> Emission(merge=2).rows((1, 4, 6))                # blocks of 2 x 2 patches become one row
6
>>> Emission(merge=2).grid((1, 4, 6))
(1, 2, 3)
>>> Emission(stride=2, pool=2).rows((13,))           # every other frame, and then the mean of each two
3
>>> Emission(extra=1).rows((2, 4, 6))                # a class token for each frame
50
>>> Emission(count=32).rows((1, 4, 6))               # 32 queries for each segment, whatever its size
32
"""

import math
from collections.abc import Sequence

import attrs

from mimogrid.core.base.samples import SegmentGrid, prefix_sums


Placed = tuple[tuple[int, ...], SegmentGrid]
"""The places of a sequence that the rows of a segment take, and their grid."""
PLANE = 3
"""How many sizes the grid of an image or a clip has."""


@attrs.frozen(kw_only=True)
class Emission:
    """How rows that are read become rows that are emitted, frame by frame, in the order of the attributes.

    Attributes:
        stride: of so many rows one remains; a last group that is not full is only seen by what comes before it.
        merge: so many by so many rows of a frame become one.
        pool: so many rows become one; a last group that is not full is dropped.
        extra: rows of each frame that come besides, or with a minus that are dropped.
        count: rows of each segment, whatever its grid; 0: these follow from the grid.
    """

    stride: int = 1
    merge: int = 1
    pool: int = 1
    extra: int = 0
    count: int = 0

    def rows(self, grid: SegmentGrid) -> int:
        """Return the rows emitted for a segment of a grid. Raises ValueError if the grid cannot be merged."""
        if min(self.stride, self.merge, self.pool) < 1:
            raise ValueError(f"{self} makes no rows")
        if self.count:
            return self.count
        frames, rows = self.frames(grid)
        return frames * max(rows // self.merge**2 // self.pool + self.extra, 0)

    def grid(self, grid: SegmentGrid) -> SegmentGrid:
        """Return how the rows lie that are emitted for a segment: merged, or (length,) where they are no plane."""
        if len(grid) == PLANE and self == Emission(merge=self.merge):
            return grid[0], *(side // self.merge for side in grid[1:])
        return (self.rows(grid),)

    def frames(self, grid: SegmentGrid) -> tuple[int, int]:
        """Return the number of frames, and the rows of each before they are merged.

        Raises ValueError if the grid cannot be merged.
        """
        if self.merge > 1 and (len(grid) != PLANE or any(side % self.merge for side in grid[1:])):
            raise ValueError(f"a grid of {grid} cannot be merged {self.merge} by {self.merge}")
        frames, sides = (grid[0], grid[1:]) if len(grid) == PLANE else (1, grid)
        return frames, math.prod(sides) // self.stride


ONE_EACH = Emission()
"""One row for each that is read."""


def placed(places: Sequence[int], grids: Sequence[SegmentGrid]) -> tuple[Placed, ...]:
    """Return the places that each segment takes, of those that all of them take; segments without rows take none.

    >>> placed((1, 2, 5), ((2,), (1, 1, 1)))
    (((1, 2), (2,)), ((5,), (1, 1, 1)))
    """
    starts = prefix_sums(list(map(math.prod, grids)))
    return tuple(
        (tuple(places[start:stop]), grid)
        for start, stop, grid in zip(starts, starts[1:], grids, strict=False)
    )


def is_whole(places: Sequence[int]) -> bool:
    """Whether places follow each other, with nothing between them."""
    return not places or places[-1] - places[0] + 1 == len(places)
