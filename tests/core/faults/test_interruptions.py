"""Interruptions: every second from the last step until it is done again has a cause, and one interruption."""

import attrs
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.faults.interruptions import Interruption, following


spans = st.floats(0.0, 1e4)


@given(st.integers(1, 50), st.integers(0, 50), st.tuples(spans, spans, spans, spans))
def test_what_is_lost_is_the_sum_of_its_parts(
    done: int, behind: int, parts_s: tuple[float, float, float, float]
) -> None:
    """A failure within a step: the time in which it still ran, noticing, the restart, and what is repeated."""
    until_failure, noticing, restart, repeating = parts_s
    failed = 100.0 + until_failure
    noticed = failed + noticing
    at = max(0, done - behind)
    begun = Interruption(done=done, resumed_at=at, last_s=100.0, failed_s=failed, noticed_s=noticed)
    first = begun.after(at + 1, now_s=noticed + restart)
    found = first.after(max(done, at + 1), now_s=noticed + restart + repeating)
    assert found.is_over
    assert first.is_over == (done - at <= 1)
    assert found.noticing_s is not None
    parts = until_failure + found.noticing_s + found.restart_s + repeating
    assert abs(found.lost_s - parts) < 1e-6
    assert done - at == found.repeated


def test_a_run_that_nobody_saw_fail_has_one_gap() -> None:
    """All hosts were lost, or it was asked to stop: then nothing is repeated."""
    found = Interruption(done=4, resumed_at=4, last_s=10.0).after(5, now_s=70.0)
    assert found.is_over
    assert (None, 60.0, 0) == (found.noticing_s, found.restart_s, found.repeated)
    assert "went on: first step 60.0 s later, 0 steps repeated: 60.0 s lost" == str(found)


@attrs.define
class Run:
    """A run as a rank counts it: its steps, the interruption that is not over, and all that are."""

    steps: int = 0
    last_s: float = 0.0
    pending: Interruption | None = None
    over: list[Interruption] = attrs.field(factory=list)

    def goes_on(self, at: int) -> None:
        """Begin a world at a step."""
        found = Interruption(done=self.steps, resumed_at=at, last_s=self.last_s)
        if self.pending:
            ended, found = following(self.pending, found)
            self.over += [ended] if ended else []
        self.pending, self.steps = found, at

    def step(self, now_s: float) -> None:
        """Do a step, which takes until now."""
        self.steps, self.last_s = self.steps + 1, now_s
        if self.pending:
            self.pending = self.pending.after(self.steps, now_s=now_s)
        if self.pending and self.pending.is_over:
            self.over.append(self.pending)
            self.pending = None


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=8))
def test_interruptions_add_up(worlds: list[tuple[int, int]]) -> None:
    """Also those that come before the run is as far as it was: they have all steps done again, and all other time."""
    run, now_s, calm_s, executed, most = Run(), 0.0, 0.0, 0, 0
    for behind, count in (*worlds, (0, 100)):
        resumes = executed > 0
        if resumes:
            run.goes_on(max(0, run.steps - behind))
        for nth in range(count):
            step_s = 7.0 if nth == 0 else 1.0
            now_s += step_s
            run.step(now_s)
            calm_s += step_s if run.steps > most and not (resumes and nth == 0) else 0.0
            executed, most = executed + 1, max(most, run.steps)
        now_s += 0.5 if executed else 0.0  # between two worlds
    assert run.pending is None
    assert executed - most == sum(found.repeated for found in run.over)
    assert run.last_s - calm_s == sum(found.lost_s for found in run.over)
