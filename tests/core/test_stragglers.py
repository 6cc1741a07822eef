"""Stragglers: who is slower than alike ranks, or than predicted, and why."""

from mimogrid.core.stragglers import Pace, mean, stragglers


def test_a_rank_is_compared_with_those_of_its_stages() -> None:
    """A stage that is slower than another has no straggler; a rank that is slower than its peers is one."""
    paces = [Pace(0, "v.0", 1.0), Pace(1, "v.0", 1.1), Pace(2, "v.0", 1.7), Pace(3, "l.0", 9.0)]
    (found,) = stragglers(paces, above=1.5)
    assert (2, 1.1, "it computes more slowly") == (found.pace.rank, found.expected_s, found.cause)


def test_a_rank_alone_at_its_stage_is_compared_with_its_prediction() -> None:
    """Where there is one."""
    (found,) = stragglers([Pace(0, "l.0", 3.0)], above=1.5, predicted={0: 1.0})
    assert "3.0 times its prediction" in str(found)
    assert not list(stragglers([Pace(0, "l.0", 3.0)], above=1.5))


def test_loading_is_named_where_it_makes_the_difference() -> None:
    """The cause is the greater part of what is too much."""
    peers = [Pace(0, "v.0", 1.0, load_s=0.5), Pace(1, "v.0", 3.0, load_s=2.0)]
    assert ["it waits for its data"] == [s.cause for s in stragglers(peers, above=1.5)]
    peers[1] = Pace(1, "v.0", 3.0, load_s=1.4)
    assert ["it computes more slowly"] == [s.cause for s in stragglers(peers, above=1.5)]


def test_paces_are_averaged_rank_by_rank() -> None:
    """In the order of ranks of the steps."""
    steps = [
        [Pace(0, "a", 1.0, 0.0), Pace(5, "b", 2.0, 1.0)],
        [Pace(0, "a", 3.0, 1.0), Pace(5, "b", 2.0, 1.0)],
    ]
    assert [Pace(0, "a", 2.0, 0.5), Pace(5, "b", 2.0, 1.0)] == list(mean(steps))
