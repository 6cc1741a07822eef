"""Interruptions of a run: noted by the rank that reports a failure, and timed by the first rank when the run goes on.

failure.json           when the last world failed, and what its report says; removed when the run goes on
interruption.json      the interruption of a run that is not yet as far as it was
interruptions.jsonl    a line for each interruption that is over (`core.faults.interruptions`)
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.faults.diagnosis import STOPPED, DiagnosedError, HeartbeatRecord
from mimogrid.core.faults.interruptions import Interruption, following
from mimogrid.shell.run.folders import METRICS, write_json
from mimogrid.shell.world.preemption import StopRequest


FAILURE, PENDING, INTERRUPTIONS = "failure.json", "interruption.json", "interruptions.jsonl"


@attrs.define
class FailureNote:
    """Where a failure is to be noted; None: the run has no folder yet."""

    folder: Path | None = None


@contextlib.contextmanager
def noting_failure() -> Iterator[FailureNote]:
    """Note in a run's folder the failure that this rank reports; wake the rank that is at fault if it is stopped."""
    note = FailureNote()
    try:
        yield note
    except DiagnosedError as error:
        if note.folder is not None:
            facts = {
                "failed_s": error.diagnosis.faulty.since_s,
                "noticed_s": error.diagnosis.now_s,
                "report": str(error.diagnosis),
            }
            with contextlib.suppress(OSError):  # the failure itself is what is to be reported
                write_json(note.folder / FAILURE, facts)
        _wake(error.diagnosis.faulty)
        raise


def _wake(faulty: HeartbeatRecord) -> None:
    """Let a process of this host go on that is stopped, so that it can end: torchrun would wait for it for 30 s."""
    if faulty.state == STOPPED:
        with contextlib.suppress(OSError):
            os.kill(faulty.pid, signal.SIGCONT)


@contextlib.contextmanager
def ending_at_once(stop_request: StopRequest, folder: Path) -> Iterator[None]:
    """Let a signal end this process at once if the run in a folder fails meanwhile, and this rank hangs."""
    before = _read(folder / FAILURE)
    stop_request.is_in_vain = lambda: _read(folder / FAILURE) not in ({}, before)
    try:
        yield
    finally:  # this rank does not hang, and may have something to say
        stop_request.is_in_vain = lambda: False


@attrs.define
class GoingOn:
    """Times how a run goes on that had done some steps."""

    folder: Path
    interruption: Interruption

    def after(self, steps: int) -> Interruption | None:
        """Note that so many steps are done; return the interruption when it is over, and write it down."""
        is_first = not self.interruption.has_step
        self.interruption = self.interruption.after(steps, now_s=time.time())
        if self.interruption.is_over:
            _add(self.folder, self.interruption)
            (self.folder / PENDING).unlink(missing_ok=True)
            return self.interruption
        if is_first:  # when the last one was done, the metrics tell
            _keep(self.folder, self.interruption)
        return None


def going_on(folder: Path, start: int) -> GoingOn | None:
    """Return what times a run that resumes at step `start`, before its metrics are changed; None if it begins."""
    path = folder / METRICS
    if not path.is_file() or not (done := len(path.read_bytes().splitlines())):
        return None
    last_s = path.stat().st_mtime
    found = Interruption(done=done, resumed_at=start, last_s=last_s, **_failure(folder, last_s))
    if before := _pending(folder):
        ended, found = following(before, found)
        if ended:
            _add(folder, ended)
    _keep(folder, found)
    (folder / FAILURE).unlink(missing_ok=True)
    return GoingOn(folder, found)


def interruptions_of(folder: Path) -> list[dict[str, Any]]:
    """Return the interruptions of a run that are over, the first one first."""
    path = folder / INTERRUPTIONS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _add(folder: Path, interruption: Interruption) -> None:
    with (folder / INTERRUPTIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(interruption.facts) + "\n")


def _keep(folder: Path, interruption: Interruption) -> None:
    write_json(folder / PENDING, attrs.asdict(interruption))


def _pending(folder: Path) -> Interruption | None:
    """Return the interruption that was not over when the run ended again, if there is one."""
    found = _read(folder / PENDING)
    return Interruption(**found) if found else None


def _failure(folder: Path, last_s: float) -> dict[str, Any]:
    """Return the failure after a time that was noted, if there is one."""
    facts = _read(folder / FAILURE)
    return facts if facts and facts["noticed_s"] >= last_s else {}


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a file; none, if it is missing, or was being written when the run ended."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
