"""Progress: a search says how far it is, and ends where it is told to, with the best so far."""

from test_plan import question

from mimogrid.core.plan.planner import plan


def test_a_search_says_how_far_it_is():
    """More and more is examined and simulated, and the best time falls."""
    told = []
    found = plan(question(), watch=lambda progress: not told.append(progress))
    assert not found.stopped
    best = [progress.best_s for progress in told if progress.simulated]
    assert sorted(best, reverse=True) == best
    assert 0 < told[-1].simulated <= found.simulated


def test_a_search_that_is_stopped_has_a_layout_and_a_gap():
    """At once: the first layout that fits; the gap allows for all that was not looked at."""
    found, whole = plan(question(), watch=lambda _: False), plan(question())
    assert found.stopped
    assert found.best.step_s <= whole.best.step_s * (1 + found.gap) * (1 + 1e-9)
    assert found.simulated < whole.simulated
