"""Stragglers: who is slower than alike ranks, or than predicted, and why."""

import pytest

from mimogrid.core.faults.stragglers import StepTimes, mean, stragglers


def test_a_rank_is_compared_with_those_of_its_stages() -> None:
    """A stage that is slower than another has no straggler; a rank that is slower than its peers is one."""
    step_times = [
        StepTimes(0, "v.0", 1.0),
        StepTimes(1, "v.0", 1.1),
        StepTimes(2, "v.0", 1.7),
        StepTimes(3, "l.0", 9.0),
    ]
    (found,) = stragglers(step_times, above=1.5)
    assert (2, 1.1, "it computes slowly") == (found.step_times.rank, found.expected_s, found.cause)


def test_a_rank_alone_at_its_stage_is_compared_with_its_prediction() -> None:
    """Where there is one: in proportion to the other ranks, whatever the unit of the costs."""
    step_times = [
        StepTimes(0, "v.0", 1.0),
        StepTimes(1, "v.1", 1.1),
        StepTimes(2, "l.0", 6.0),
        StepTimes(3, "l.1", 2.0),
    ]
    plan = {0: 50.0, 1: 50.0, 2: 100.0, 3: 100.0}
    for unit in (0.01, 1.0, 1000.0):
        (found,) = stragglers(step_times, above=1.5, predicted={rank: s * unit for rank, s in plan.items()})
        assert (2, ["l"], pytest.approx(2.0)) == (found.step_times.rank, found.modules, found.expected_s)
        assert "rank 2 (module l, stage l.0)" in str(found)
        assert "3.0 times what its costs predict, 2 s" in str(found)
    assert not list(stragglers(step_times, above=1.5))


def test_a_stage_that_should_take_longer_has_no_straggler() -> None:
    """The costs say so, where peers are none; and what they say counts more than peers."""
    step_times = [StepTimes(0, "v.0", 1.0), StepTimes(1, "v.0", 3.0), StepTimes(2, "l.0", 9.0)]
    assert not list(stragglers(step_times, above=1.5, predicted={0: 1.0, 1: 3.0, 2: 9.0}))
    assert [1] == [s.step_times.rank for s in stragglers(step_times, above=1.5, predicted={2: 9.0})]
    assert [1] == [
        s.step_times.rank for s in stragglers(step_times, above=1.5, predicted={0: 1.0, 1: 1.0, 2: 9.0})
    ]


def test_the_slowest_comes_first() -> None:
    """In proportion to what is expected of it."""
    step_times = [
        StepTimes(0, "v.0", 1.0),
        StepTimes(1, "v.0", 2.0),
        StepTimes(2, "v.0", 9.0),
        StepTimes(3, "v.0", 1.0),
    ]
    assert [2, 1] == [s.step_times.rank for s in stragglers(step_times, above=1.5)]


def test_loading_is_named_where_it_makes_the_difference() -> None:
    """The cause is the greater part of what is too much."""
    peers = [StepTimes(0, "v.0", 1.0, load_s=0.5), StepTimes(1, "v.0", 3.0, load_s=2.0)]
    assert ["it waits for its data"] == [s.cause for s in stragglers(peers, above=1.5)]
    peers[1] = StepTimes(1, "v.0", 3.0, load_s=1.4)
    assert ["it computes slowly"] == [s.cause for s in stragglers(peers, above=1.5)]


def test_paces_are_averaged_rank_by_rank() -> None:
    """In the order of ranks of the steps."""
    steps = [
        [StepTimes(0, "a", 1.0, 0.0), StepTimes(5, "b", 2.0, 1.0)],
        [StepTimes(0, "a", 3.0, 1.0), StepTimes(5, "b", 2.0, 1.0)],
    ]
    assert [StepTimes(0, "a", 2.0, 0.5), StepTimes(5, "b", 2.0, 1.0)] == list(mean(steps))
