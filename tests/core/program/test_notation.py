"""Notation: what prints as text is read back from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import CASES
from jobs import program_of
from mimogrid.core.program.listing import from_text, to_text
from mimogrid.core.program.verify import listing_of
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Gather,
    Kind,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Update,
    Wait,
    WaitGather,
    WaitReduce,
    matching_op,
    parse,
)
from mimogrid.core.topology.topology import Stage


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]*", fullmatch=True)
STAGES = st.builds(Stage, NAMES, st.integers(0, 99), st.integers(0, 3))
COUNTS = st.integers(0, 999)
TRANSFERS = st.builds(Send, STAGES, st.sampled_from(Direction), COUNTS, STAGES) | st.builds(
    Recv, STAGES, st.sampled_from(Direction), COUNTS, STAGES
)
ACTIONS = st.one_of(
    st.builds(Compute, st.sampled_from([k for k in Kind if k is not Kind.BACKWARD_PART]), STAGES, COUNTS),
    st.builds(Compute, st.just(Kind.BACKWARD_PART), STAGES, COUNTS, COUNTS),
    TRANSFERS,
    st.builds(Wait, TRANSFERS),
    st.builds(Reduce, STAGES, COUNTS),
    st.builds(WaitReduce, STAGES, COUNTS),
    st.builds(Gather, STAGES, COUNTS),
    st.builds(WaitGather, STAGES, COUNTS),
    st.builds(Tie, STAGES),
    st.just(Norm()),
    st.just(Update()),
)


@given(ACTIONS)
def test_an_action_is_read_back(action: Action) -> None:
    """Parsing what an action prints gives the action."""
    assert action == parse(str(action))


@given(st.dictionaries(st.integers(0, 99), st.lists(ACTIONS, max_size=5).map(tuple), max_size=3))
def test_a_listing_is_read_back(listing: dict[int, tuple[Action, ...]]) -> None:
    """Parsing what a listing prints gives the listing."""
    assert listing == from_text(to_text(listing))


@pytest.mark.parametrize("case", ["dp2 dp3", "generator", "tied", "three counts"])
def test_a_program_is_read_back(case: str) -> None:
    """A whole program goes through text unchanged."""
    listing = listing_of(program_of(CASES[case], batch=24))
    assert listing == from_text(to_text(listing))


@given(TRANSFERS)
def test_the_other_end_of_the_matching_op(transfer: Send | Recv) -> None:
    """A send's other end is a receive, and the other way round; one of the two is at the source."""
    assert transfer == matching_op(matching_op(transfer))
    assert {True, False} == {transfer.at_source, matching_op(transfer).at_source}


WRONG = [
    "",
    "F0",
    "v.0",
    "v.0 X1",
    "v.0 F",
    "v F0",
    "v.0 SEND_F0 <- l.0",
    "v.0 RECV_F0",
    "v.0 NORM",
    "REDUCE0",
    "v.0 REDUCE",
    "v.0 WAIT_REDUCE 1",
    "v.0 WAIT_F0 -> l.0",
    "v.0 SEND_I0 -> l.0",
    "v.0  F0",
    "v.0 F01",
    "v.00 F1",
    "vision.0.0 F0",
]


@pytest.mark.parametrize("text", WRONG)
def test_anything_else_is_an_error(text: str) -> None:
    """What is no action is an error that quotes it."""
    with pytest.raises(ValueError, match="is no action"):
        parse(text)


def test_an_error_names_the_line() -> None:
    """Of a whole listing, the line that is wrong is named by its number."""
    with pytest.raises(ValueError, match=r"line 3: 'v\.0 X1' is no action"):
        from_text("rank 0\n    v.0 F0\n    v.0 X1\n")
    with pytest.raises(ValueError, match=r"line 1: 'v\.0 F0' stands before any 'rank R'"):
        from_text("v.0 F0")
    with pytest.raises(ValueError, match="line 3"):
        from_text("rank 0\n    NORM\nrank 0\n")
