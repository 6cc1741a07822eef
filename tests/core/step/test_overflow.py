"""A sample that is too long is refused, cut at the end, or has nothing; what is said of it is what it then is."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import job
from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.core.step.overflow import fitted
from mimogrid.core.step.step import step_of


TOPOLOGY = job("v vit > l; l gpt > r; r regressor", batch=1, microbatches=1)
GRAPH = TOPOLOGY.graph
PLACES = st.one_of(st.none(), st.sets(st.integers(0, 30), max_size=6))


@given(
    st.integers(0, 30), st.integers(0, 8), PLACES, st.integers(1, 20), st.sampled_from(["truncate", "drop"])
)
def test_what_is_taken_fits(length, rows, places, sequence, overflow):
    """It is the sample if that fits, its first positions if all rows are among them, or else nothing."""
    where = {} if places is None else {"l": tuple(sorted(places))}
    rows = rows if places is None else len(places)
    sample = Sample(id=3, length=length, rows={"v": rows}, placeholders=where)
    taken = fitted(sample, GRAPH, sequence=sequence, overflow=overflow)
    assert sample.id == taken.id
    if rows + length <= sequence:
        assert sample is taken
    elif taken.length:
        assert "truncate" == overflow
        assert attrs.evolve(sample, length=sequence - rows) == taken
        assert max(taken.placeholders.get("l", ()), default=-1) < sequence
    else:
        last = max(where.get("l", range(rows)), default=-1)
        assert overflow == "drop" or rows >= sequence or last >= sequence
        assert (0, {}, {"v": 0, "l": 0, "r": 0}) == (taken.length, taken.rows, GRAPH.rows_out(taken))


def test_what_is_dropped_weighs_nothing():
    """The counts that losses are divided by are those of the other samples."""
    long, short = Sample(id=0, length=40, rows={"v": 2}), Sample(id=1, length=3, rows={"v": 2})
    dropped = fitted(long, GRAPH, sequence=8, overflow="drop")
    assert step_of(TOPOLOGY, (dropped, short)).units == step_of(TOPOLOGY, (short,)).units


def test_a_sample_whose_weights_are_not_known_is_not_cut():
    """How much of them a cut leaves is in no description."""
    sample = Sample(id=5, length=40, rows={}, units={"l": 7.5})
    with pytest.raises(PlanError, match=r"sample 5: has 32 positions too many, and describes units for l"):
        fitted(sample, GRAPH, sequence=8, overflow="truncate")
    assert 0 == fitted(sample, GRAPH, sequence=8, overflow="drop").length
