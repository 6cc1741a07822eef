"""Positions, by hand and by law; tests/shell/models compares them with another implementation."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.models.positions import (
    frame_bounds,
    frame_interval,
    frames_after_pooling,
    frames_after_stride,
    interpolation,
    learned_positions,
    merged,
    multimodal_positions,
    patch_positions,
    single_frames,
    sinusoid,
    windows,
)


GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


def doubled(grids: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Grids of patches that merge into these."""
    return [(frames, 2 * rows, 2 * columns) for frames, rows, columns in grids]


def test_text_counts() -> None:
    """Text alone has the same position on all axes, its index."""
    assert ((0, 1, 2),) * 3 == multimodal_positions(3, [], [])


def test_text_goes_on_after_the_larger_side() -> None:
    """Text after an image of 2 x 3 rows that begins at 1 goes on at 4."""
    assert (
        (0, 1, 1, 1, 1, 1, 1, 4),
        (0, 1, 1, 1, 2, 2, 2, 4),
        (0, 1, 2, 3, 1, 2, 3, 4),
    ) == multimodal_positions(8, range(1, 7), [(1, 2, 3)])


def test_text_goes_on_after_the_last_frame() -> None:
    """A clip that lasts longer than it is wide pushes the text after it by its length."""
    assert (0, 5, 10, 11) == multimodal_positions(4, range(3), [(3, 1, 1)], [5.0])[0]


def test_images_side_by_side() -> None:
    """Two images without text between them are two segments: the second begins after the first."""
    t, h, w = multimodal_positions(6, range(1, 6), [(1, 1, 2), (1, 3, 1)])
    assert (0, 1, 1, 3, 3, 3) == t
    assert (0, 1, 1, 3, 4, 5) == h
    assert (0, 1, 2, 3, 3, 3) == w


def test_frames_between_timestamps() -> None:
    """Frames that text separates are segments of their own, and none stands later in time than its place."""
    frames = [merged(frame, 2) for frame in single_frames((2, 2, 4))]
    t, _, w = multimodal_positions(7, [1, 2, 4, 5], frames)
    assert (0, 1, 1, 3, 4, 4, 6) == t
    assert (0, 1, 2, 3, 4, 5, 6) == w


def test_seconds_are_single_precision() -> None:
    """Frames stand where single precision puts them, which is not always where double precision would."""
    assert 25 * 1.16 < 29
    assert 25 * 4.2 == 105
    for seconds, position in ((1.16, 29), (4.2, 104)):
        interval = frame_interval(25, seconds)
        assert (0, position) == multimodal_positions(2, range(2), [(2, 1, 1)], [interval])[0]


def test_placeholders_are_as_many_as_rows() -> None:
    """Placeholders that are not one per row are a mistake of ours: they are checked long before."""
    with pytest.raises(AssertionError, match="2 placeholders for 3 rows"):
        multimodal_positions(5, [0, 1], [(1, 1, 3)])


@given(GRIDS, st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_positions_of_text_rise(grids: list[tuple[int, int, int]], gaps: list[int]) -> None:
    """Text stands after everything before it and has one position on all axes."""
    sizes = [math.prod(grid) for grid in grids]
    places, total = [], gaps[0]
    for size, gap in zip(sizes, gaps[1:], strict=False):
        places += range(total, total + size)
        total += size + gap
    axes = list(zip(*multimodal_positions(total, places, grids), strict=True))
    assert total == len(axes)
    for place in set(range(total)) - set(places):
        assert axes[place] == (max((max(before) for before in axes[:place]), default=-1) + 1,) * 3


@given(GRIDS, st.integers(1, 3))
def test_windows_are_a_permutation(grids: list[tuple[int, int, int]], size: int) -> None:
    """Each block is in one window; a window is within one frame, and within `size` x `size` blocks."""
    patches = doubled(grids)
    found = windows(patches, merge=2, size=size)
    assert list(range(sum(map(math.prod, grids)))) == sorted(found.order)
    assert sum(map(math.prod, patches)) == found.bounds[-1]
    assert list(found.order) == sorted(range(len(found.order)), key=found.inverse.__getitem__)
    rows, columns = patch_positions(patches, merge=2)
    ends = frame_bounds(patches)
    for start, stop in itertools.pairwise(found.bounds):
        blocks = found.order[start // 4 : stop // 4]
        assert 1 == len({sum(end <= 4 * block for end in ends) for block in blocks})
        for axis in (rows, columns):
            assert 1 == len({axis[4 * block] // (2 * size) for block in blocks})


@given(GRIDS)
def test_patches_in_merge_order(grids: list[tuple[int, int, int]]) -> None:
    """Each patch of a frame comes once, and four that follow one another are a square."""
    patches = doubled(grids)
    rows, columns = patch_positions(patches, merge=2)
    places = list(zip(rows, columns, strict=True))
    bounds = frame_bounds(patches)
    for start, stop in itertools.pairwise(bounds):
        assert stop - start == len(set(places[start:stop]))
    for first in range(0, len(places), 4):
        top, left = places[first]
        assert [(top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)] == places[
            first : first + 4
        ]


@given(GRIDS, st.integers(2, 7))
def test_weights_of_an_interpolation(grids: list[tuple[int, int, int]], side: int) -> None:
    """The weights of a patch sum to one, and the table's coordinates come out as the patch's."""
    patches = doubled(grids)
    found = interpolation(patches, side, merge=2)
    rows, _ = patch_positions(patches, merge=2)
    heights = [height for frames, height, width in patches for _ in range(frames * height * width)]
    for four, weights, row, height in zip(found.rows, found.weights, rows, heights, strict=True):
        assert 1 == pytest.approx(sum(weights), abs=1e-12)
        where = sum(weight * (place // side) for place, weight in zip(four, weights, strict=True))
        assert row * (side - 1) / (height - 1) == pytest.approx(where, abs=1e-9)


def test_interpolation_of_the_tables_own_size() -> None:
    """A frame of the table's size takes each position as it is."""
    found = interpolation([(1, 2, 2)], side=2, merge=2)
    assert (0, 1, 2, 3) == tuple(four[0] for four in found.rows)
    assert {(1.0, 0.0, 0.0, 0.0)} == set(found.weights)


def test_learned_positions() -> None:
    """With a class token the patches begin at 1."""
    assert (0, 1, 2, 3, 4) * 2 == learned_positions(2, 4, class_token=True)
    assert (0, 1, 2, 3) * 2 == learned_positions(2, 4, class_token=False)


def test_frames_of_audio() -> None:
    """Thirty seconds are 3000 frames, 1500 after the convolutions, 750 after pooling; odd ones round up, down."""
    assert (1500, 750) == (frames_after_stride(3000), frames_after_pooling(1500))
    assert (4, 3) == (frames_after_stride(7), frames_after_pooling(7))


def test_sinusoid() -> None:
    """Sines come first; the first pair turns by one radian a position, the last by 1/10000."""
    row = sinusoid(3, 6)
    assert (math.sin(3), math.cos(3)) == (row[0], row[3])
    assert pytest.approx((math.sin(3e-4), math.cos(3e-4)), rel=1e-12) == (row[2], row[5])
