"""Run folders: where a run writes, and who may, decided before anything starts.

Without a name a new ``runs/<job>-<n>`` is made. A named folder must be empty, or be the run to resume: that which
--resume names, or, where a launcher has restarted the ranks, that which they began. What is resumed must be

    a run            the folder holds its record, or a checkpoint; a folder that is empty may be one
    of this user     nothing that another user wrote is written over or let go
    of this job      by the newest checkpoint, or the record where there is none (`core.job.changes`)
    at rest          no other process is at work in it

The record, ``run.json``, is the job that the run was last started with. It is what one process at a time holds locked.
"""

import contextlib
import fcntl
import json
import os
import pwd
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.changes import Change, refused
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.manifest import CHECKPOINTS
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job


REPORT, RECORD = "report.json", "run.json"
SHOWN = 8
"""How many keys that differ are told."""


@contextlib.contextmanager
def claimed(job: Job, resume: Path | str | None, changed: Iterable[str] = ()) -> Iterator[Path]:
    """Hold the folder of a run, made if need be; `changed` are keys that may differ from what is resumed.

    Raises PlanError for a folder that holds another run; nothing in it has been touched then.
    """
    named = job.spec.train.run_dir
    if resume is not None:
        folder = _resumed(Path(resume), named)
        _check_job(folder, job.spec, tuple(changed))
    elif named is None:
        folder = _fresh(Path("runs"), job.path.stem)
    else:
        folder = _empty(named)
    with (folder / RECORD).open("a+", encoding="utf-8") as record:
        _lock(record.fileno(), folder)
        has_record = os.fstat(record.fileno()).st_size > 0
        if resume is None and has_record:  # Somebody else has found the folder empty, too, and was faster.
            raise _refused(str(folder), "has just been taken by another run.", _ELSEWHERE)
        record.truncate(0)
        record.write(json.dumps({"job": jobfile.dump(job.spec)}) + "\n")
        record.flush()
        yield folder


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


# -- which folder ------------------------------------------------------------------------------------------


_ELSEWHERE = "Name a folder that is new or empty: train.run_dir."


def _fresh(parent: Path, stem: str) -> Path:
    number = 1
    while True:
        folder = parent / f"{stem}-{number}"
        try:
            return _made(folder, fresh=True)
        except FileExistsError:
            number += 1


def _empty(named: str) -> Path:
    folder = Path(named)
    if folder.exists() and not folder.is_dir():
        raise _refused(named, "is a file.", _ELSEWHERE)
    if folder.is_dir():
        _check_access(folder)
        if entries := list(folder.iterdir()):
            remedy = f"Continue that run with --resume {named}, or name a folder that is new or empty."
            raise _refused(named, f"is not empty ({len(entries)} entries).", remedy)
    return _made(folder)


def _resumed(folder: Path, named: str | None) -> Path:
    if named is not None and Path(named).resolve() != folder.resolve():
        remedy = "Give one of the two, or the same folder twice."
        raise _refused(named, f"is named, and --resume names '{folder}'.", remedy)
    if not folder.is_dir():
        if named is None or folder.exists():
            remedy = "Name the folder of a run after --resume; one that is also train.run_dir is made."
            raise _refused(str(folder), "is no folder.", remedy)
        return _made(folder)
    _check_access(folder)
    if any(folder.iterdir()):
        if not (folder / RECORD).is_file() and not manifest.published(folder / CHECKPOINTS):
            remedy = "Name the folder of a run after --resume."
            raise _refused(str(folder), "holds something, but no run.", remedy)
        _check_owner(folder)
    return folder


def _made(folder: Path, *, fresh: bool = False) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
    except FileExistsError:
        raise  # Somebody else was faster: `_fresh` takes the next number.
    except OSError as error:
        remedy = "Name a folder that can be written: train.run_dir."
        raise _refused(str(folder), f"cannot be made: {error.strerror}.", remedy) from None
    return folder


# -- whether this run may write there ----------------------------------------------------------------------


def _check_access(folder: Path) -> None:
    """Raise PlanError where a run could not write: it would end at its first checkpoint."""
    for path in (folder, folder / CHECKPOINTS):
        if path.exists() and not path.is_dir():
            raise _refused(str(folder), f"cannot be used: '{path}' is a file.", f"Put '{path}' aside.")
        if path.exists() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            remedy = "Make it writable for this user, or name another: train.run_dir."
            raise _refused(str(folder), f"cannot be used: '{path}' cannot be written.", remedy)


def _check_owner(folder: Path) -> None:
    """Raise PlanError where another user wrote what this run would write over, or let go."""
    mine = owner_of_new_file(folder)
    checkpoints = folder / CHECKPOINTS
    for path in (folder / RECORD, checkpoints, *manifest.published(checkpoints)):
        if path.exists() and (owner := path.stat().st_uid) != mine:
            message = f"belongs to {_user(owner)} ('{path}'), and this is {_user(mine)}."
            remedy = f"To go on from a copy: cp -r {folder} COPY, then --resume COPY."
            raise _refused(str(folder), message, remedy)


def owner_of_new_file(folder: Path) -> int:
    """Return whom the disk takes this user for: over a network that may be somebody else than the system does."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def _user(uid: int) -> str:
    try:
        return f"user '{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return f"user {uid}"


def _check_job(folder: Path, spec: JobSpec, accepted: tuple[str, ...]) -> None:
    """Raise PlanError where a folder holds the run of another job, or is further than this one wants to go."""
    found = manifest.published(folder / CHECKPOINTS)
    if found:
        try:
            facts = manifest.read_manifest(found[-1])
        except PlanError:
            return  # A damaged checkpoint is refused with all that is wrong with it, when it is to be loaded.
        where, step = found[-1] / manifest.MANIFEST, int(facts["step"])
        if step > spec.train.steps:
            message = f"is {spec.train.steps}; {found[-1]} is at step {step} already."
            raise PlanError([Problem("train.steps", message, "Raise it, or begin a new run.")])
        before = jobfile.recorded(facts["job"], where)
    elif (folder / RECORD).is_file():
        where = folder / RECORD
        before = jobfile.recorded(_recorded_text(where), where)
    else:
        return
    differing = list(refused(before, spec, accepted=accepted))
    if differing:
        raise PlanError(_problems(differing, where))


def _problems(differing: list[Change], where: Path) -> Iterator[Problem]:
    for change in differing[:SHOWN]:
        message = f"is {change.after!r}; the run to resume has {change.before!r} ('{where}')."
        remedy = f"Resume the run of this job, or begin a new one. If it is meant: --changed {change.key}."
        yield Problem(change.key, message, remedy)
    if len(differing) > SHOWN:
        more = f"{len(differing) - SHOWN} more keys differ."
        yield Problem("and", more, "This is the run of another job.")


def _recorded_text(path: Path) -> str:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError):
        message = "says of no job that can be read."
        raise PlanError(
            [Problem(str(path), message, "Name another folder: there is no checkpoint in it.")]
        ) from None
    return str(text)


def _lock(descriptor: int, folder: Path) -> None:
    """Hold a file until this process ends. Raises PlanError where another process does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "Wait until that has ended, or end it."
        raise _refused(str(folder), "is in use: another process trains there.", remedy) from None
    except OSError:
        pass  # A disk without locks.


def _refused(folder: str, message: str, remedy: str) -> PlanError:
    return PlanError([Problem("train.run_dir", f"run folder '{folder}' {message}", remedy)])
