"""Run folders: where a run writes, decided before anything starts.

Without a name a new ``runs/<job>-<n>`` is made. A named folder must be empty, or be the run to resume: that which
--resume names, or, where a launcher has restarted the ranks, that which they began.
"""

import json
import os
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.errors import PlanError, Problem
from mimogrid.core.spec import JobSpec


REPORT = "report.json"
CHECKPOINTS = "checkpoints"
OF_A_RUN = {REPORT, CHECKPOINTS, "heartbeats", "logs", "metrics.jsonl"}
"""Some of these are in the folder of every run, however early it ended."""


def claim(job: Path, named: str | None, resume: str | None) -> Path:
    """Return the folder of a run, made if need be. Raises PlanError for one that holds another run."""
    if resume is not None:
        return _resumed(Path(resume), named)
    if named is None:
        return _fresh(Path("runs"), job.stem)
    folder = Path(named)
    if folder.exists() and not folder.is_dir():
        raise _refused(named, "is a file.", "Name a folder that is new or empty.")
    if folder.is_dir():
        _check(folder)
    if folder.is_dir() and any(folder.iterdir()):
        remedy = f"Continue that run with --resume {named}, or name a folder that is new or empty."
        raise _refused(named, f"is not empty ({len(list(folder.iterdir()))} entries).", remedy)
    return _made(folder)


def resumed_by_launcher(spec: JobSpec, resume: str | None) -> str | None:
    """Return the run to resume under torchrun: the one that is named, or the one that ranks began before a restart.

    Raises PlanError where torchrun is to restart ranks that could not find what they began.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if resume is None and restarts and spec.train.run_dir is None:
        raise _refused("", "has no name, and torchrun is to restart its ranks.", "Name it: train.run_dir.")
    has_begun = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return spec.train.run_dir if resume is None and has_begun else resume


@attrs.frozen
class Stopped:
    """A run that was asked to stop: where it is, and the step that is next."""

    folder: str
    step: int

    def __str__(self) -> str:
        return f"run '{self.folder}' was asked to stop, and is saved: step {self.step} is next."


def report_of(folder: Path) -> dict[str, Any] | None:
    """Return the report of a finished run, if it is one."""
    path = folder / REPORT
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def _resumed(folder: Path, named: str | None) -> Path:
    if named is not None and Path(named).resolve() != folder.resolve():
        remedy = "Give one of the two, or the same folder twice."
        raise _refused(named, f"is named, and --resume names '{folder}'.", remedy)
    if not folder.is_dir():
        if named is None or folder.exists():
            remedy = "Name the folder of a run after --resume; one that is also train.run_dir is made."
            raise _refused(str(folder), "is no folder.", remedy)
        return _made(folder)
    _check(folder)
    entries = {path.name for path in folder.iterdir()}
    if entries and not entries & OF_A_RUN:
        raise _refused(
            str(folder), "holds something, but no run.", "Name the folder of a run after --resume."
        )
    return folder


def _check(folder: Path) -> None:
    """Raise PlanError where a run could not write: it would end at its first checkpoint."""
    for path in (folder, folder / CHECKPOINTS):
        if path.exists() and not path.is_dir():
            raise _refused(str(folder), f"cannot be used: '{path}' is a file.", f"Put '{path}' aside.")
        if path.exists() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            remedy = "Make it writable for this user, or name another: train.run_dir."
            raise _refused(str(folder), f"cannot be used: '{path}' cannot be written.", remedy)


def _fresh(parent: Path, stem: str) -> Path:
    number = 1
    while True:
        folder = parent / f"{stem}-{number}"
        try:
            return _made(folder, fresh=True)
        except FileExistsError:
            number += 1


def _made(folder: Path, *, fresh: bool = False) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
    except FileExistsError:
        raise
    except OSError as error:
        remedy = "Name a folder that can be written: train.run_dir."
        raise _refused(str(folder), f"cannot be made: {error.strerror}.", remedy) from None
    return folder


def _refused(folder: str, message: str, remedy: str) -> PlanError:
    return PlanError([Problem("train.run_dir", f"run folder '{folder}' {message}", remedy)])
