"""Positions: where rows and tokens stand, as each family of models counts them.

A *grid* is the size of a segment in patches: frames, rows, columns. An image has one frame. Towers of the
Qwen-VL families read the patches of a frame block by block, so that the ``merge x merge`` patches that become
one row lie next to each other. This is *merge order*; here it is for one frame of 2 x 4 patches:

>>> patch_positions([(1, 2, 4)], merge=2)
((0, 0, 1, 1, 0, 0, 1, 1), (0, 1, 0, 1, 2, 3, 2, 3))

Every function returns tuples; the shell makes tensors of them. Bounds are cumulative: they begin with 0, and
segment i is ``bounds[i]`` to ``bounds[i + 1]``.
"""

import functools
import itertools
import math
import struct
from collections.abc import Iterable, Sequence

import attrs

from mimogrid.core.base.samples import prefix_sums


Grid = tuple[int, int, int]
"""Frames, rows and columns of a segment."""

Ints = tuple[int, ...]
Axes = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Positions on the axes time, row and column."""


# -- grids


def merged(grid: Grid, merge: int) -> Grid:
    """Return the grid of what remains when each block of ``merge x merge`` patches becomes one row.

    >>> merged((1, 4, 6), 2)
    (1, 2, 3)
    """
    frames, rows, columns = grid
    assert rows % merge == 0 == columns % merge, f"{rows} x {columns} patches in blocks of {merge} x {merge}"
    return frames, rows // merge, columns // merge


def single_frames(grid: Grid) -> tuple[Grid, ...]:
    """Return the frames of a clip as segments of their own, which text (a timestamp) may separate.

    >>> single_frames((2, 4, 6))
    ((1, 4, 6), (1, 4, 6))
    """
    return ((1, *grid[1:]),) * grid[0]


# -- a language sequence


def multimodal_positions(
    total: int, placeholders: Sequence[int], grids: Sequence[Grid], intervals: Sequence[float] = ()
) -> tuple[Ints, Ints, Ints]:
    """Return the positions (time, row, column) of the `total` tokens of a language sequence.

    The `placeholders` are the places that take the rows of segments, in order; `grids` are the segments'
    grids after merging. Text counts on in all three axes. A segment begins where the text before it ended,
    and the text after it goes on from the segment's largest position + 1. (transformers 5 goes on from the
    larger of the segment's sides. Both are the same unless a clip lasts longer than its sides.)

    `intervals` is empty, or says how far apart the frames of each segment stand (see `frame_interval`).

    >>> multimodal_positions(7, [1, 2, 3, 4], [(1, 2, 2)])
    ((0, 1, 1, 1, 1, 3, 4), (0, 1, 1, 2, 2, 3, 4), (0, 1, 2, 1, 2, 3, 4))
    """
    sizes = [math.prod(grid) for grid in grids]
    assert sum(sizes) == len(placeholders), f"{len(placeholders)} placeholders for {sum(sizes)} rows"
    spans: list[Axes] = []
    place = position = 0
    for first, size, grid, interval in zip(
        prefix_sums(sizes)[:-1], sizes, grids, intervals or itertools.repeat(1.0, len(grids)), strict=True
    ):
        if size:
            start = placeholders[first]
            assert placeholders[first + size - 1] == start + size - 1, "text stands inside a segment"
            spans.append(_text(position, start - place))
            position += start - place
            spans.append(_segment(position, grid, interval))
            place, position = start + size, 1 + max(map(max, spans[-1]))
    spans.append(_text(position, total - place))
    t, h, w = (tuple(itertools.chain.from_iterable(axis)) for axis in zip(*spans, strict=True))
    return t, h, w


def _text(position: int, length: int) -> Axes:
    """Return the positions of text that begins at a position."""
    counted = range(position, position + length)
    return counted, counted, counted


def _segment(position: int, grid: Grid, interval: float) -> Axes:
    """Return the positions of a segment's rows; the segment begins at a position."""
    frames, rows, columns = grid
    times = [position + int(_single(frame * interval)) for frame in range(frames)]
    height, width = range(position, position + rows), range(position, position + columns)
    t, h, w = zip(*itertools.product(times, height, width), strict=True)
    return t, h, w


def frame_interval(tokens_per_second: float, seconds: float) -> float:
    """Return how many positions lie between two frames that are so many seconds apart.

    Processors hand out seconds in single precision. Positions are cut to integers, so the product is rounded
    as it is in single precision: 1.16 seconds at 25 tokens a second are 29 positions, and not 28.

    >>> frame_interval(25, 1.16), 25 * 1.16
    (29.0, 28.999999999999996)
    """
    return _single(tokens_per_second * _single(seconds))


def _single(value: float) -> float:
    """Round to single precision."""
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


# -- the patches of a tower


def patch_positions(grids: Iterable[Grid], merge: int) -> tuple[Ints, Ints]:
    """Return the row and the column of every patch in its frame, in merge order."""
    rows: list[int] = []
    columns: list[int] = []
    for frames, height, width in grids:
        plane = _merge_order(height, width, merge)
        rows.extend([row for row, _ in plane] * frames)
        columns.extend([column for _, column in plane] * frames)
    return tuple(rows), tuple(columns)


# Images of a batch often have the same size.
@functools.lru_cache(maxsize=256)
def _merge_order(height: int, width: int, merge: int) -> tuple[tuple[int, int], ...]:
    """Return (row, column) of the patches of one frame, in merge order."""
    assert height % merge == 0 == width % merge, f"{height} x {width} patches in blocks of {merge} x {merge}"
    blocks = itertools.product(range(0, height, merge), range(0, width, merge))
    inside = tuple(itertools.product(range(merge), range(merge)))
    return tuple((top + row, left + column) for top, left in blocks for row, column in inside)


def frame_bounds(grids: Iterable[Grid]) -> Ints:
    """Return the bounds of what attends to each other in layers of full attention: the patches of a frame.

    >>> frame_bounds([(1, 2, 2), (2, 4, 2)])
    (0, 4, 12, 20)
    """
    return tuple(prefix_sums([rows * columns for frames, rows, columns in grids for _ in range(frames)]))


@attrs.frozen
class Windows:
    """Windows of a tower with local attention.

    Attributes:
        order: blocks of patches (`merge` x `merge` each, as numbered in merge order) in the order of windows.
        bounds: bounds of the windows, in patches.
    """

    order: Ints
    bounds: Ints

    @property
    def inverse(self) -> Ints:
        """Where each block lies in the order of windows; it undoes `order`."""
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))


def windows(grids: Iterable[Grid], merge: int, size: int) -> Windows:
    """Return the windows of `size` x `size` blocks; those at the right and lower edges may be smaller.

    >>> windows([(1, 4, 6)], merge=2, size=2)
    Windows(order=(0, 1, 3, 4, 2, 5), bounds=(0, 16, 24))
    """
    order: list[int] = []
    lengths: list[int] = []
    start = 0
    for frames, height, width in (merged(grid, merge) for grid in grids):
        for _ in range(frames):
            for top, left in itertools.product(range(0, height, size), range(0, width, size)):
                rows, columns = range(top, min(top + size, height)), range(left, min(left + size, width))
                order.extend(start + row * width + column for row in rows for column in columns)
                lengths.append(len(rows) * len(columns) * merge**2)
            start += height * width
    return Windows(tuple(order), tuple(prefix_sums(lengths)))


# -- learned positions


def learned_positions(images: int, patches: int, *, class_token: bool) -> Ints:
    """Return the learned position of every row of some images; a class token comes first and has position 0.

    >>> learned_positions(2, 3, class_token=True)
    (0, 1, 2, 3, 0, 1, 2, 3)
    """
    return tuple(range(patches + class_token)) * images


@attrs.frozen
class Interpolation:
    """How to take positions from a learned square table for grids of any size.

    A patch's embedding is the sum of four rows of the table by four weights, in the order upper left, upper
    right, lower left, lower right.
    """

    rows: tuple[tuple[int, int, int, int], ...]
    weights: tuple[tuple[float, float, float, float], ...]


def interpolation(grids: Iterable[Grid], side: int, merge: int) -> Interpolation:
    """Return the bilinear interpolation of a table of ``side x side`` positions, patches in merge order.

    The corners of a frame are those of the table.
    """
    rows: list[tuple[int, int, int, int]] = []
    weights: list[tuple[float, float, float, float]] = []
    for frames, height, width in grids:
        plane = _merge_order(height, width, merge)
        vertical = [_between(row, height, side) for row in range(height)]
        horizontal = [_between(column, width, side) for column in range(width)]
        taps = [_four(vertical[row], horizontal[column], side) for row, column in plane]
        rows.extend([four for four, _ in taps] * frames)
        weights.extend([four for _, four in taps] * frames)
    return Interpolation(tuple(rows), tuple(weights))


def _between(index: int, size: int, side: int) -> tuple[int, int, float]:
    """Return the two places of a table's axis that an index lies between, and how near it is to the second."""
    first, rest = divmod(index * (side - 1), max(size - 1, 1))
    return first, min(first + 1, side - 1), rest / max(size - 1, 1)


def _four(
    vertical: tuple[int, int, float], horizontal: tuple[int, int, float], side: int
) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]]:
    upper, lower, down = vertical
    left, right, across = horizontal
    return (
        (upper * side + left, upper * side + right, lower * side + left, lower * side + right),
        ((1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across),
    )


# -- audio


def frames_after_stride(frames: int) -> int:
    """Return the frames that a convolution of width 3, padding 1 and stride 2 makes of `frames`.

    Whisper has one of stride 1 before it, so frame i of the two reads frames 2i - 2 to 2i + 2: the last ones of
    a clip depend on two frames of the padding after it, which processors do not leave at zero.

    >>> [frames_after_stride(frames) for frames in (1, 2, 3, 4)]
    [1, 1, 2, 2]
    """
    return (frames + 1) // 2


def frames_seen(frames: int) -> int:
    """Return how many frames the positions of `frames` depend on, where more frames follow.

    >>> [frames_seen(frames) for frames in (1, 2, 3, 4)]
    [3, 3, 5, 5]
    """
    return 2 * frames_after_stride(frames) + 1


def frames_after_pooling(frames: int) -> int:
    """Return the frames that remain when every two become one; a last one alone is dropped."""
    return frames // 2


def sinusoid(position: int, width: int) -> tuple[float, ...]:
    """Return the fixed embedding of a position: `width / 2` sines, then as many cosines.

    The wavelengths rise from 2 pi to 2 pi * 10000 in equal steps of their logarithm.
    """
    pairs = width // 2
    step = math.log(10_000) / (pairs - 1)
    angles = [position * math.exp(-step * index) for index in range(pairs)]
    return (*map(math.sin, angles), *map(math.cos, angles))
