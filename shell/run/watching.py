"""Watching: what a run does now, read from the files in its folder. Nothing is written, and no rank is asked.

Each rank notes what it does in its heartbeat. Looked at again and again, heartbeats also tell for what share of the
time a rank computes: `RunWatch` takes such *looks* and keeps the last of them. The metrics say the rest. The memory of
a rank is that of its process, where that is on this host.
"""

import contextlib
import json
import os
import resource
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.faults.diagnosis import GONE, HeartbeatRecord
from mimogrid.core.schedule.actions import Compute, parse
from mimogrid.shell.device import machine
from mimogrid.shell.job import jobfile
from mimogrid.shell.run import run_lock
from mimogrid.shell.run.folders import HEARTBEATS, METRICS, RECORD, report_of
from mimogrid.shell.world import heartbeat


LOOKS = 400
"""How many looks at a rank its share of computing is of."""
TAIL_BYTES = 1 << 16
"""How much of the end of the metrics is read: many steps of any job."""


@attrs.frozen
class RankState:
    """What a rank does.

    Attributes:
        record: its heartbeat.
        computing: the share of looks in which it computed; None before the first.
        memory_bytes: the memory of its process now; None on another host.
    """

    record: HeartbeatRecord
    computing: float | None
    memory_bytes: int | None


@attrs.frozen
class RunState:
    """What a run does.

    Attributes:
        folder: its folder.
        state: "training", "finished", or "not running".
        steps: how many steps the job has; None if its record does not say.
        metrics: the lines of its last steps, oldest first (`shell.run.metrics`).
        ranks: its ranks, in order; none where nothing runs.
    """

    folder: Path
    state: str
    steps: int | None
    metrics: tuple[dict[str, Any], ...]
    ranks: tuple[RankState, ...]

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last step that has a loss."""
        return next((line for line in reversed(self.metrics) if "loss" in line), {})

    @property
    def done(self) -> int:
        """How many steps are done."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0


class RunWatch:
    """Looks at the ranks of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looks: dict[int, deque[bool]] = {}

    def look(self) -> dict[int, HeartbeatRecord]:
        """Look at every rank once; return what each does."""
        records = {
            rank: record
            for rank, record in heartbeat.read(self._folder / HEARTBEATS).items()
            if record.state != GONE
        }
        for rank, record in records.items():
            self._looks.setdefault(rank, deque(maxlen=LOOKS)).append(_computes(record))
        return records

    def state(self) -> RunState:
        """Look once more, and return all that is known."""
        folder, ranks = self._folder, self.look()
        report, owner = report_of(folder), run_lock.read(folder)
        runs = bool(ranks) or (owner is not None and owner.is_of_this_machine and owner.lives())
        return RunState(
            folder=folder,
            state="training" if runs else "finished" if report is not None else "not running",
            steps=_steps(folder),
            metrics=tuple(_last_lines(folder / METRICS)),
            ranks=tuple(self._rank(record) for record in ranks.values()),
        )

    def _rank(self, record: HeartbeatRecord) -> RankState:
        looks = self._looks[record.rank]
        return RankState(record, sum(looks) / len(looks), _memory(record))


def _computes(record: HeartbeatRecord) -> bool:
    """Whether a rank is within an action that computes, and has not done its part of it."""
    with contextlib.suppress(ValueError):
        return isinstance(parse(record.doing), Compute) and not record.waits
    return False


def _memory(record: HeartbeatRecord) -> int | None:
    if record.host != os.uname().nodename:
        return None
    fields = " ".join(machine.lines(f"/proc/{record.pid}/statm")).split()
    return int(fields[1]) * resource.getpagesize() if len(fields) > 1 else None


def _steps(folder: Path) -> int | None:
    """Return how many steps the job of a run has."""
    with contextlib.suppress(Exception):  # a record that cannot be read is nothing to fail for here
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return jobfile.recorded(record["job"], folder / RECORD).train.steps
    return None


def _last_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the last metrics; a line that is being written is left out."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")[bool(start) :]
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def seconds_since(record: HeartbeatRecord) -> float:
    """Return for how long a rank has been doing what it does, by its host's clock."""
    return max(0.0, time.time() - record.since_s)
