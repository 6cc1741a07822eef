"""Interruptions of a run: noted by the rank that reports a failure, and timed by the first rank when the run goes on.

failure.json           when the last world failed, and what its report says; removed once it is timed
interruptions.jsonl    a line for each time that the run went on (`core.faults.interruptions`)
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.faults.diagnosis import DiagnosedError
from mimogrid.core.faults.interruptions import Interruption
from mimogrid.shell.run.folders import METRICS, write_json


FAILURE, INTERRUPTIONS = "failure.json", "interruptions.jsonl"


@attrs.define
class FailureNote:
    """Where a failure is to be noted; None: the run has no folder yet."""

    folder: Path | None = None


@contextlib.contextmanager
def noting_failure() -> Iterator[FailureNote]:
    """Note in a run's folder the failure that this rank reports."""
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
        raise


@attrs.define
class GoingOn:
    """Times how a run goes on that had done some steps; `first_s` is when the first step was done again."""

    folder: Path
    done: int
    resumed_at: int
    last_s: float
    first_s: float | None = None

    def after(self, steps: int) -> Interruption | None:
        """Note that so many steps are done; return the interruption when it is over, and write it down."""
        now = time.time()
        self.first_s = self.first_s or now
        if steps < self.done:
            return None
        failure = _failure(self.folder, self.last_s)
        found = Interruption(
            done=self.done,
            resumed_at=self.resumed_at,
            last_s=self.last_s,
            first_s=self.first_s,
            again_s=now,
            failed_s=failure.get("failed_s"),
            noticed_s=failure.get("noticed_s"),
        )
        facts = {**attrs.asdict(found), "lost_s": found.lost_s, "report": failure.get("report")}
        with (self.folder / INTERRUPTIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        (self.folder / FAILURE).unlink(missing_ok=True)
        return found


def going_on(folder: Path, start: int) -> GoingOn | None:
    """Return what times a run that resumes at step `start`, before its metrics are changed; None if it begins."""
    path = folder / METRICS
    if not path.is_file() or not (done := len(path.read_bytes().splitlines())):
        return None
    return GoingOn(folder, done, start, path.stat().st_mtime)


def interruptions_of(folder: Path) -> list[dict[str, Any]]:
    """Return the interruptions of a run, the first one first."""
    path = folder / INTERRUPTIONS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _failure(folder: Path, last_s: float) -> dict[str, Any]:
    """Return the failure after a time that was noted, if there is one."""
    try:
        facts: dict[str, Any] = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if facts["noticed_s"] >= last_s else {}
