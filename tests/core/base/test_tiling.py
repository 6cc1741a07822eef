"""Tilings: parts are accepted exactly where every value of the tensor is in one of them."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.tiling import Part, tiling_fault


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Part]]:
    """Draw a tensor and parts of it: cuts of it, and perhaps one more, one less or one that is moved."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    parts: list[Part] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        offsets, sizes = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        for start, size in ((0, cut), (cut, sizes[dim] - cut)):
            if size:
                at, of = list(offsets), list(sizes)
                at[dim], of[dim] = offsets[dim] + start, size
                parts.append((tuple(at), tuple(of)))
    change = draw(st.sampled_from(["none", "twice", "lost", "moved", "larger"]))
    i = draw(st.integers(0, len(parts) - 1))
    offsets, sizes = parts[i]
    if change == "twice":
        parts.append(parts[i])
    elif change == "lost":
        del parts[i]
    elif change == "moved":
        parts[i] = tuple(draw(st.integers(0, n)) for n in shape), sizes
    elif change == "larger":
        parts[i] = offsets, tuple(draw(st.integers(0, n + 1)) for n in sizes)
    return shape, parts


@given(boxes())
def test_parts_tile_where_every_value_is_in_one(drawn: tuple[tuple[int, ...], list[Part]]) -> None:
    """A count of each value by hand says the same."""
    shape, parts = drawn
    times = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    fits = all(math.prod(sizes) for _, sizes in parts)
    for offsets, sizes in parts:
        places = (range(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        for place in itertools.product(*places):
            fits = fits and place in times
            times[place] = times.get(place, 0) + 1
    assert (fits and set(times.values()) == {1}) == (not tiling_fault(shape, parts))


def test_a_fault_is_said_with_its_place() -> None:
    """Overlaps, holes, parts outside and parts of other dims are told apart."""
    assert "overlap, at [0, 0] and at [0, 1]" in tiling_fault((1, 3), [((0, 0), (1, 2)), ((0, 1), (1, 1))])
    assert "do not make [3] together" in tiling_fault((3,), [((0,), (1,)), ((2,), (1,))])
    assert "outside of [3]" in tiling_fault((3,), [((2,), (2,))])
    assert "has not the dims of [3]" in tiling_fault((3,), [((0, 0), (1, 3))])
    assert "empty" in tiling_fault((3,), [((0,), (3,)), ((1,), (0,))])
    assert not tiling_fault((0, 3), [((0, 0), (0, 3))])


def test_many_parts_take_no_quadratic_time() -> None:
    """A tensor in 20,000 parts is checked at once."""
    parts: list[Part] = [((0, i), (7, 1)) for i in range(20_000)]
    assert not tiling_fault((7, 20_000), parts)
    assert "overlap" in tiling_fault((7, 20_000), [*parts[:-1], ((0, 5), (7, 1))])
