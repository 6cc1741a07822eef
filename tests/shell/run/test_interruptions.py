"""Interruptions as a run's folder has them, without a world."""

import json
import os
import signal
from pathlib import Path

from mimogrid.shell.run.folders import METRICS, write_json
from mimogrid.shell.run.interruptions import (
    FAILURE,
    PENDING,
    GoingOn,
    ending_at_once,
    going_on,
    interruptions_of,
)
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.preemption import SIGNALS, StopRequest, receiving_signals


def has_steps(folder: Path, steps: int, at_s: float) -> None:
    """Let a run have done so many steps, the last one at some time."""
    (folder / METRICS).write_text("{}\n" * steps)
    os.utime(folder / METRICS, (at_s, at_s))


def resumed(folder: Path, start: int) -> GoingOn:
    """A world that goes on from a step, and drops the metrics of later ones."""
    found = going_on(folder, start)
    assert found is not None
    has_steps(folder, start, 0.0)
    return found


def test_a_run_that_is_interrupted_again_has_a_line_for_each_time(tmp_path: Path) -> None:
    """A world that did no step is part of the restart; the step from which the run is behind is not forgotten."""
    has_steps(tmp_path, 10, 100.0)
    write_json(tmp_path / FAILURE, {"failed_s": 101.0, "noticed_s": 102.0, "report": "rank 1 failed"})
    resumed(tmp_path, 5)
    again = resumed(tmp_path, 5)
    assert again.after(6) is None
    has_steps(tmp_path, 7, 150.0)
    last = resumed(tmp_path, 5)
    (first,) = interruptions_of(tmp_path)
    assert (10, 5, 7, 2) == tuple(first[key] for key in ("done", "resumed_at", "reached", "starts"))
    assert (50.0, 1.0, 2, "rank 1 failed") == tuple(
        first[key] for key in ("lost_s", "noticing_s", "repeated", "report")
    )
    assert [last.after(steps) is None for steps in (6, 7, 8, 9, 10)] == [True] * 4 + [False]
    _, second = interruptions_of(tmp_path)
    assert (10, 5, 10, 150.0) == tuple(second[key] for key in ("done", "resumed_at", "reached", "last_s"))
    assert second["report"] is None
    assert not (tmp_path / PENDING).exists()
    assert not (tmp_path / FAILURE).exists()


def test_a_signal_is_in_vain_once_the_run_has_failed(tmp_path: Path) -> None:
    """A failure of a world before does not count, and a rank that has failed itself still has to say why."""
    request = StopRequest()
    write_json(tmp_path / FAILURE, {"noticed_s": 1.0})
    with ending_at_once(request, tmp_path):
        assert not request.is_in_vain()
        (tmp_path / FAILURE).unlink()
        assert not request.is_in_vain()
        (tmp_path / FAILURE).write_text(json.dumps({"noticed_s": 2.0}))
        assert request.is_in_vain()
    assert not request.is_in_vain()


def test_a_signal_to_a_run_that_has_stopped_does_not_end_it_otherwise() -> None:
    """It ends with the code for a run that is saved; the handlers of one that was not asked are gone."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with receiving_signals(StopRequest()):
            pass
        assert before == {number: signal.getsignal(number) for number in SIGNALS}
        request = StopRequest()
        with receiving_signals(request):
            request.accept()
        assert request.receive == signal.getsignal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ranks_of_an_earlier_larger_world_are_not_looked_at(tmp_path: Path) -> None:
    """They have left their heartbeats in the folder of the run, and their processes are gone."""
    for rank in (3, 1):
        heartbeat = Heartbeat(rank)
        heartbeat.keep_in(tmp_path)
    assert {1} == heartbeat.records(2).keys()
    assert {1, 3} == heartbeat.records(4).keys()
