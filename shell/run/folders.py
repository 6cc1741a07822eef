"""Run folders: where a run writes, and whether it may, decided before anything starts.

Without a name a new ``runs/<job>-<n>`` is made. A named folder must be empty, or hold the run to resume: the one that
--resume names, or, where a launcher has restarted the ranks, the one that they had begun. What is resumed must be

    a run            the folder holds its record or a checkpoint; an empty folder is accepted, too
    of this user     nothing that another user wrote is overwritten or removed
    of this job      by the newest checkpoint, or by the record if there is none (`core.job.changes`)
    idle             no other process trains in it (`run_lock`)

The record, ``run.json``, is the job that the run was last started with.
"""

import contextlib
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
from mimogrid.core.job.layouts import PLANNED
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.manifest import CHECKPOINTS
from mimogrid.shell.job import elastic, jobfile
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run import run_lock
from mimogrid.shell.world.flight_recorder import put_aside


REPORT, RECORD = "report.json", "run.json"
METRICS, HEARTBEATS = "metrics.jsonl", "heartbeats"
STEP = "step.json"
"""The last step, planned and measured, as `core.draw.dashboard` has it."""
BEFORE_THE_RECORD = frozenset({run_lock.LOCK, f"{RECORD}.partial"})
"""What a world leaves in the folder of its run that is killed before there is a record."""
RUNS = "runs"
SHOWN = 8
"""How many of the keys that differ are listed."""


@contextlib.contextmanager
def claimed(job: Job, resume: Path | str | None, changed: Iterable[str] = ()) -> Iterator[Path]:
    """Hold the folder of a run, a new one if none is named; keys that are `changed` may differ from the resumed run's.

    Raises PlanError for a folder that must not be used, before anything in it is touched.
    """
    named = job.spec.train.run_dir
    if resume is not None:
        folder = _resumed(Path(resume), named)
        _check_job(folder, job.spec, tuple(changed))
    elif named is None:
        folder = _fresh(Path(RUNS), name_of(job.path))
    else:
        folder = _empty(named)
    with run_lock.owned(folder):
        record = folder / RECORD
        if (
            resume is None and record.exists() and record.stat().st_size
        ):  # another run found the folder empty, too
            raise _refused(str(folder), "was claimed by another run just now.", _ELSEWHERE)
        write_json(record, {"job": jobfile.dump(job.spec)})
        size = job.written.world_size if job.ranks is None else job.ranks
        if job.written.layouts == PLANNED and size is not None:
            elastic.keep(job.spec, size, folder)
        if (folder / HEARTBEATS).is_symlink():  # a killed world of local processes left it
            (folder / HEARTBEATS).unlink()
        put_aside(folder)
        yield folder


def planned(job: Job, resume: Path | str | None) -> Path:
    """Return where a run will write; without a name, the folder in which one will be made."""
    return Path(resume or job.spec.train.run_dir or RUNS)


@contextlib.contextmanager
def showing_heartbeats(folder: Path, where: Path) -> Iterator[None]:
    """Let those who watch a run find its heartbeats, which a world of local processes keeps where it meets."""
    link = folder / HEARTBEATS
    with contextlib.suppress(OSError):  # some file systems have no links
        if link.is_symlink():
            link.unlink()
        link.symlink_to(where.absolute(), target_is_directory=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)


def resumed(job: Job, resume: Path | str | None) -> Path | str | None:
    """Return the run to resume: the named one, or of an elastic job that in its run_dir, begun or not."""
    return job.spec.train.run_dir if resume is None and job.is_elastic else resume


def resumed_by_launcher(job: Job, resume: Path | str | None) -> Path | str | None:
    """Return the run to resume under torchrun: also the one that the ranks had begun before a restart.

    Raises PlanError if torchrun may restart ranks that could not find the run that they had begun.
    """
    run_dir = job.spec.train.run_dir
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if resume is None and (restarts or job.is_elastic) and run_dir is None:
        raise _refused("", "has no name, and ranks may be restarted.", "Name it: train.run_dir.")
    has_begun = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return run_dir if resume is None and has_begun else resumed(job, resume)


@attrs.frozen
class Stopped:
    """A run that stopped because it was asked to: its folder, and the step that is next."""

    folder: str
    step: int

    def __str__(self) -> str:
        return f"run '{self.folder}' was asked to stop, and is saved: step {self.step} is next."


def stopped(folder: Path) -> Stopped:
    """Return where a run stopped that was ended before it could save: at its newest checkpoint, or at step 0."""
    found = manifest.published(folder / CHECKPOINTS)
    return Stopped(str(folder), manifest.step_of(found[-1]) if found else 0)


def report_of(folder: Path) -> dict[str, Any] | None:
    """Return the report of a run that has finished once, or None."""
    path = folder / REPORT
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def finished_report(folder: Path, steps: int) -> dict[str, Any] | None:
    """Return the report of a run that has finished so many steps; None where it is to go on."""
    report = report_of(folder)
    return report if report is not None and report["steps"] >= steps else None


def write_json(path: Path, value: object) -> None:
    """Write a JSON file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


# -- which folder ------------------------------------------------------------------------------------------


_ELSEWHERE = "Name a folder that is new or empty: train.run_dir."


def name_of(job: Path) -> str:
    """Return the name of a job's runs: that of its file, or of its folder where the file is called job.toml.

    >>> name_of(Path("/examples/digits/job.toml")), name_of(Path("/examples/plans/omni.toml"))
    ('digits', 'omni')
    """
    return job.parent.name or job.stem if job.stem == "job" else job.stem


def _fresh(parent: Path, name: str) -> Path:
    """Make the first folder ``NAME-N`` that does not exist."""
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            return _made(folder, fresh=True)
        except FileExistsError:
            number += 1


def _empty(named: str) -> Path:
    """Return the named folder, which must be empty or new."""
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
    """Return the folder of a run to resume; `named` is train.run_dir, which must agree."""
    if named is not None and Path(named).resolve() != folder.resolve():
        remedy = "Give only one of the two, or the same folder."
        raise _refused(named, f"is train.run_dir, but --resume names '{folder}'.", remedy)
    if not folder.is_dir():
        if named is None or folder.exists():
            remedy = "Name the folder of a run with --resume. It is made only if it is also train.run_dir."
            raise _refused(str(folder), "is not a folder.", remedy)
        return _made(folder)
    _check_access(folder)
    if {entry.name for entry in folder.iterdir()} - BEFORE_THE_RECORD:
        if not (folder / RECORD).is_file() and not manifest.published(folder / CHECKPOINTS):
            remedy = "Name the folder of a run with --resume."
            raise _refused(str(folder), "is not empty and holds no run.", remedy)
        _check_owner(folder)
    return folder


def _made(folder: Path, *, fresh: bool = False) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
    except FileExistsError:
        raise  # another run was faster: `_fresh` tries the next number
    except OSError as error:
        remedy = "Name a folder that can be written: train.run_dir."
        raise _refused(str(folder), f"cannot be made: {error.strerror}.", remedy) from None
    return folder


# -- whether this run may write there ----------------------------------------------------------------------


def _check_access(folder: Path) -> None:
    """Raise PlanError where a run could not write: it would fail at its first checkpoint."""
    for path in (folder, folder / CHECKPOINTS):
        if path.exists() and not path.is_dir():
            raise _refused(str(folder), f"cannot be used: '{path}' is a file.", f"Move '{path}' away.")
        if path.exists() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            remedy = "Make it writable for this user, or name another: train.run_dir."
            raise _refused(str(folder), f"cannot be used: '{path}' cannot be written.", remedy)


def _check_owner(folder: Path) -> None:
    """Raise PlanError where another user wrote what this run would overwrite or remove."""
    mine = owner_of_new_file(folder)
    checkpoints = folder / CHECKPOINTS
    for path in (folder / RECORD, checkpoints, *manifest.published(checkpoints)):
        if path.exists() and (owner := path.stat().st_uid) != mine:
            message = f"belongs to {_user(owner)} ('{path}'), and this is {_user(mine)}."
            remedy = f"To continue from a copy: cp -r {folder} COPY, then --resume COPY."
            raise _refused(str(folder), message, remedy)


def owner_of_new_file(folder: Path) -> int:
    """Return the owner of what this user writes there. On a network file system that may be another user id."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def _user(uid: int) -> str:
    try:
        return f"user '{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return f"user {uid}"


def _check_job(folder: Path, spec: JobSpec, accepted: tuple[str, ...]) -> None:
    """Raise PlanError where a folder holds the run of another job, or has more steps than this job."""
    found = manifest.published(folder / CHECKPOINTS)
    if found:
        try:
            facts = manifest.read_manifest(found[-1])
        except PlanError:
            return  # a damaged checkpoint is refused when it is loaded, with everything that is wrong with it
        where, step = found[-1] / manifest.MANIFEST, int(facts["step"])
        if step > spec.train.steps:
            message = f"is {spec.train.steps}; {found[-1]} is at step {step} already."
            raise PlanError([Problem("train.steps", message, "Raise it, or begin a new run.")])
        before = jobfile.recorded(facts["job"], where)
    elif (folder / RECORD).is_file() and (folder / RECORD).stat().st_size:  # 0 on a disk that was full
        where = folder / RECORD
        before = jobfile.recorded(_recorded_text(where), where)
    else:
        return
    differing = list(refused(before, spec, accepted=accepted))
    if differing:
        raise PlanError(_problems(differing, where))


def _problems(differing: list[Change], where: Path) -> Iterator[Problem]:
    """Yield a problem for each key that differs from what the file `where` says."""
    for change in differing[:SHOWN]:
        message = f"is {change.after!r}; the run to resume has {change.before!r} ('{where}')."
        remedy = (
            f"Resume the run of this job, or begin a new one. If this is intended: --changed {change.key}."
        )
        yield Problem(change.key, message, remedy)
    if len(differing) > SHOWN:
        more = f"{len(differing) - SHOWN} more keys differ."
        yield Problem("and", more, "This is the run of another job.")


def _recorded_text(path: Path) -> str:
    """Return the text of the job in a record. Raises PlanError."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError):
        message = "holds no job that can be read."
        raise PlanError(
            [Problem(str(path), message, "Name another folder: there is no checkpoint in it.")]
        ) from None
    return str(text)


def _refused(folder: str, message: str, remedy: str) -> PlanError:
    return PlanError([Problem("train.run_dir", f"run folder '{folder}' {message}", remedy)])
