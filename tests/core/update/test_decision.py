"""Decisions: all ranks decide the same from the same records, and the norm does not depend on their order."""

import math

from hypothesis import example, given
from hypothesis import strategies as st

from mimogrid.core.job.spec import LossScaleSpec, OptimizerSpec, SkipSpec, TrainSpec
from mimogrid.core.update.decision import SkipState, decide, is_passed_over
from mimogrid.core.update.reductions import exact_terms, sum_of_terms


squares = st.lists(st.floats(0, 1e300), max_size=20)


@given(st.lists(squares, min_size=1, max_size=5), st.randoms(use_true_random=False))
@example([[1.0, 2.0**-60], [2.0**-60, 2.0**-53]], None)
def test_a_norm_does_not_depend_on_the_ranks_of_partials(ranks: list[list[float]], order: object) -> None:
    """Partials spread differently over ranks give the same sum to the last bit: the correctly rounded one."""
    every = [partial for rank in ranks for partial in rank]
    terms = [term for rank in ranks for term in exact_terms(rank)]
    assert sum_of_terms(every) == sum_of_terms(terms)
    if order is not None:
        order.shuffle(every)  # type: ignore[attr-defined]
    half = len(every) // 2
    assert sum_of_terms(terms) == sum_of_terms((*exact_terms(every[:half]), *exact_terms(every[half:])))


@given(squares, st.sampled_from([math.inf, math.nan]), squares)
def test_what_is_not_finite_stays_so(some: list[float], wrong: float, others: list[float]) -> None:
    """One partial that is not finite makes the norm of all infinite."""
    assert math.inf == sum_of_terms((*exact_terms(some), *exact_terms([wrong, *others])))


RULE = OptimizerSpec(loss_scale=LossScaleSpec(initial=16.0, interval=3, minimum=4.0))


@given(st.lists(st.booleans(), max_size=30))
def test_a_scale_falls_with_overflows_and_rises_with_good_steps(history: list[bool]) -> None:
    """It halves at every overflow, down to a floor, and doubles after a number of good steps in a row."""
    skip_state, expected, good = SkipState.first(RULE, "fp16"), 16.0, 0
    for finite in history:
        skip_state, skipped = decide(skip_state, RULE, loss=1.0, norm=1.0, finite=finite, half=True)
        assert finite == (not skipped)
        good = good + 1 if finite else 0
        if not finite:
            expected = max(expected / 2, 4.0)
        elif good == 3:
            expected, good = expected * 2, 0
        assert (expected, good) == (skip_state.scale, skip_state.good)


@given(st.booleans(), st.sampled_from([(math.nan, 1.0), (1.0, math.inf), (math.inf, 1.0)]))
def test_a_step_whose_loss_or_norm_is_not_finite_is_skipped(half: bool, wrong: tuple[float, float]) -> None:
    """In every precision; the loss scale falls if there is one."""
    skip_state = SkipState(scale=8.0)
    after, skipped = decide(skip_state, RULE, loss=wrong[0], norm=wrong[1], finite=True, half=half)
    assert "a loss or gradient was not finite" == skipped
    assert after.scale == (4.0 if half else 8.0)


def test_spikes_are_far_above_the_recent_median() -> None:
    """They count once the window is full. A lasting change of level is accepted after half a window."""
    rule = OptimizerSpec(skip_above=SkipSpec(norm=3.0, window=4))
    skip_state, found = SkipState(), []
    for norm in (9.0, 1.0, 1.0, 1.0, 3.5, 1.0, 9.0, 9.0, 9.0, 9.0):
        skip_state, skipped = decide(skip_state, rule, loss=1.0, norm=norm, finite=True, half=False)
        found.append(not skipped)
    assert [True, True, True, True, False, True, False, False, True, True] == found
    assert (9.0,) * 4 == skip_state.norms
    assert () == skip_state.losses


def test_a_loss_far_above_its_median_is_a_spike_too() -> None:
    """The reason names the loss and both numbers."""
    rule = OptimizerSpec(skip_above=SkipSpec(loss=2.0, window=1))
    skip_state, _ = decide(SkipState(), rule, loss=1.5, norm=1.0, finite=True, half=False)
    _, skipped = decide(skip_state, rule, loss=3.25, norm=1.0, finite=True, half=False)
    assert "the loss 3.25 is above 2 times its recent median 1.5" == skipped


@given(st.lists(st.integers(0, 20) | st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4))
def test_a_list_of_steps_means_single_ones_and_ranges(entries: list[int | tuple[int, int]]) -> None:
    """A range includes both ends."""
    listed: set[int] = set()
    for entry in entries:
        listed |= {entry} if isinstance(entry, int) else set(range(entry[0], entry[1] + 1))
    train = TrainSpec(skip_steps=tuple(entries))
    assert listed == {step for step in range(25) if is_passed_over(train, step)}


def test_a_scale_never_becomes_infinite() -> None:
    """Gradients of zero let it rise without end; an infinite scale would never fall again."""
    skip_state, rule = SkipState(scale=2.0**1022), OptimizerSpec(loss_scale=LossScaleSpec(interval=1))
    for expected in (2.0**1023, 2.0**1023):
        skip_state, _ = decide(skip_state, rule, loss=0.0, norm=0.0, finite=True, half=True)
        assert expected == skip_state.scale
