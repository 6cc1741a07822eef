"""Towers: which position of the layers each row of a tower is, and which positions become an emitted row.

A tower reads rows segment by segment. Its layers have other positions: every frame of an image may begin with a class
token, and where layers look at windows, the positions of a window lie next to each other. Each emitted row is made of
`group` positions: of a block of patches that are merged, or of frames of sound that are averaged.

>>> tower_rows([(1, 1, 2), (1, 1, 1)], class_token=True)
TowerRows(rows=(1, 2, 4), class_tokens=(0, 3), emitted=(1, 2, 4), group=1, length=5)
>>> tower_rows([(1, 2, 4)], merge=2).emitted, tower_rows([(5,)], pool=2).emitted
((0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3))
"""

import math
from collections.abc import Sequence

import attrs

from mimogrid.core.base.samples import SegmentGrid
from mimogrid.core.models.positions import Ints, windows


@attrs.frozen
class TowerRows:
    """The rows of some segments.

    Attributes:
        rows: the position in the layers of each row, in the order in which rows are read.
        class_tokens: the position of each class token.
        emitted: the positions that emitted rows are made of, `group` for each row, in the order of the rows.
        group: how many positions make a row.
        length: positions in the layers.
    """

    rows: Ints
    class_tokens: Ints
    emitted: Ints
    group: int
    length: int


def tower_rows(
    grids: Sequence[SegmentGrid],
    *,
    merge: int = 1,
    pool: int = 1,
    window: int = 0,
    class_token: bool = False,
    emit_class_token: bool = False,
) -> TowerRows:
    """Return the rows of segments; the arguments are a tower's options of these names.

    A grid of one size is one frame, such as a clip of sound after the convolutions. With windows there are no class
    tokens.
    """
    rows: list[int] = []
    class_tokens: list[int] = []
    emitted: list[int] = []
    start = 0
    for count in frame_sizes(grids):
        first, kept = start + class_token, count - count % pool
        class_tokens.extend([start] * class_token)
        rows.extend(range(first, first + count))
        emitted.extend(range(start if emit_class_token else first, first + kept))
        start = first + count
    if window:
        block = merge**2
        places = windows([_image(grid) for grid in grids], merge, window).inverse
        rows = emitted = [places[row // block] * block + row % block for row in rows]
    return TowerRows(tuple(rows), tuple(class_tokens), tuple(emitted), merge**2 * pool, start)


def frame_sizes(grids: Sequence[SegmentGrid]) -> Ints:
    """Return the patches of each frame of some segments.

    >>> frame_sizes([(2, 4, 6), (5,)])
    (24, 24, 5)
    """
    frames = ((1, grid[0]) if len(grid) == 1 else (grid[0], math.prod(grid[1:])) for grid in grids)
    return tuple(count for frames, count in frames for _ in range(frames))


def _image(grid: SegmentGrid) -> tuple[int, int, int]:
    frames, height, width = grid
    return frames, height, width
