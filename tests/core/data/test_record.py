"""A record describes a sample, and writes positions in a short form."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.samples import Sample
from mimogrid.core.data.record import Record, expanded, runs_of


@given(st.sets(st.integers(0, 60)))
def test_runs_are_positions(positions: set[int]) -> None:
    """Runs are the shortest way to write positions, and are read back to them."""
    ascending = sorted(positions)
    runs = runs_of(ascending)
    assert list(expanded(runs)) == ascending
    assert all(first + count < other for (first, count), (other, _) in itertools.pairwise(runs))


def test_rows_follow_from_segments() -> None:
    """Two modules, and several segments of one."""
    segments = {"vision": ((1, 2, 2), (2, 4, 2)), "audio": ((9,),)}
    record = Record(id="a", length=4, units=1.5, runs=((0, 2), (5, 3)), segments=segments)
    assert record.described(7, "language") == Sample(
        id=7,
        length=4,
        rows={"vision": 20, "audio": 9},
        placeholders={"language": (0, 1, 5, 6, 7)},
        units={"language": 1.5},
        segments=segments,
    )


def test_a_text_alone_lacks_every_modality() -> None:
    """There is no entry for what a sample lacks."""
    sample = Record(id="a", length=4, units=2.0, runs=(), segments={}).described(0, "language")
    assert (sample.rows, sample.placeholders, sample.segments) == ({}, {}, {})
