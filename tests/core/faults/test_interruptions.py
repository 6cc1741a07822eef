"""Interruptions: every second from the last step until it is done again has a cause."""

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.faults.interruptions import Interruption


spans = st.floats(0.0, 1e4)


@given(st.integers(0, 50), st.integers(0, 50), st.tuples(spans, spans, spans, spans))
def test_what_is_lost_is_the_sum_of_its_parts(
    done: int, resumed_at: int, parts_s: tuple[float, float, float, float]
) -> None:
    """A failure within a step: the time in which it still ran, noticing, the restart, and what is repeated."""
    until_failure, noticing, restart, repeating = parts_s
    failed = 100.0 + until_failure
    noticed = failed + noticing
    found = Interruption(
        done=done,
        resumed_at=resumed_at,
        last_s=100.0,
        first_s=noticed + restart,
        again_s=noticed + restart + repeating,
        failed_s=failed,
        noticed_s=noticed,
    )
    assert found.noticing_s is not None
    parts = until_failure + found.noticing_s + found.restart_s + repeating
    assert abs(found.lost_s - parts) < 1e-6
    assert max(0, done - resumed_at) == found.repeated


def test_a_run_that_nobody_saw_fail_has_one_gap() -> None:
    """All hosts were lost, or it was asked to stop: then nothing is repeated."""
    found = Interruption(done=4, resumed_at=4, last_s=10.0, first_s=70.0, again_s=70.0)
    assert (None, 60.0, 0) == (found.noticing_s, found.restart_s, found.repeated)
    assert "went on: first step 60.0 s later, 0 steps repeated: 60.0 s lost" == str(found)
