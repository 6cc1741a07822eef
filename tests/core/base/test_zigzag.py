"""Zig-zag cuts a sequence into equal parts that cost the same under causal attention."""

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.zigzag import ZigZag


SIZES = st.integers(1, 8)
LENGTHS = st.integers(0, 5)


@given(size=SIZES, length=LENGTHS)
def test_every_position_has_one_owner(size: int, length: int) -> None:
    """The parts are ascending, equally long, and together everything once."""
    parts = [part.positions(2 * size * length) for part in ZigZag(0, size).everyone()]
    assert list(range(2 * size * length)) == sorted(p for part in parts for p in part)
    assert {2 * length} == {len(part) for part in parts}
    assert all(list(part) == sorted(part) for part in parts)


@given(size=SIZES, length=LENGTHS)
def test_every_rank_has_as_many_pairs(size: int, length: int) -> None:
    """A position attends to itself and to those before it: each rank has the same number of these pairs."""
    parts = [part.positions(2 * size * length) for part in ZigZag(0, size).everyone()]
    assert 1 == len({sum(p + 1 for p in part) for part in parts})


@given(size=SIZES, length=LENGTHS)
def test_what_was_gathered_comes_back_in_order(size: int, length: int) -> None:
    """Chunks of all parts, end to end and at these places, are the sequence."""
    whole = ZigZag(0, size)
    laid = [p for part in whole.everyone() for p in part.positions(2 * size * length)]
    places = whole.gathered()
    step = 2 * size * length // len(places)
    chunks = [laid[place * step : (place + 1) * step] for place in places]
    assert list(range(2 * size * length)) == [p for chunk in chunks for p in chunk]


def test_alone_it_is_everything() -> None:
    """A group of one cuts nothing, whatever the length."""
    assert (0, 1, 2) == ZigZag().positions(3)
