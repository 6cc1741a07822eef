"""Failures: one report for the whole world, from the first rank that knows.

A rank that raises an error knows why. A rank that is cut off, because its peer closed the connection or did not answer
in time, does not know. It reads the heartbeats of all ranks and reports the rank that the world was waiting for. The
other ranks end with an `EchoError`, which is not reported (`world.first_failure`).
"""

import contextlib
import time
import traceback
from collections.abc import Iterator

import attrs
import torch.distributed as dist

from mimogrid.core.base.errors import EchoError, PlanError, WorldError
from mimogrid.core.faults.diagnosis import DiagnosedError, Diagnosis, diagnose
from mimogrid.core.program.lower import Program
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.world import AbsentError, World, first_failure


CUT_OFF = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "imeout", "NCCL")
"""Words of the errors by which a backend says that a peer is gone or late; gloo's have no type of their own."""


@contextlib.contextmanager
def one_report(world: World, heartbeat: Heartbeat, job: Job) -> Iterator[None]:
    """Raise the first failure of the world as a `DiagnosedError`, and failures that follow from it as `EchoError`."""
    try:
        with first_failure(world, lambda: heartbeat.folder):
            yield
    except (PlanError, EchoError, DiagnosedError):
        raise
    except Exception as error:
        raise _explained(error, heartbeat, job, world.size) from error


def _explained(error: Exception, heartbeat: Heartbeat, job: Job, size: int) -> DiagnosedError:
    records, now_s = heartbeat.records(size), time.time()
    mine = records[heartbeat.rank]
    if isinstance(error, AbsentError):
        diagnosis = diagnose(mine.rank, records, None, now_s=now_s, suspects=error.ranks)
        return DiagnosedError(_with_stages(diagnosis, job), f"\n{error}")
    if _is_cut_off(error):
        diagnosis = diagnose(mine.rank, records, _program(job, mine.index, mine.step), now_s=now_s)
        if diagnosis.faulty.rank != mine.rank:
            return DiagnosedError(_with_stages(diagnosis, job), f"\n{_first_line(error)}")
    diagnosis = _with_stages(Diagnosis(mine, "failed", now_s), job)
    why = f": {error}" if isinstance(error, WorldError) else f": {type(error).__name__}: {error}"
    details = "" if isinstance(error, WorldError) else f"\n{''.join(traceback.format_exception(error))}"
    return DiagnosedError(diagnosis, f"{why}{details.rstrip()}")


def _with_stages(diagnosis: Diagnosis, job: Job) -> Diagnosis:
    infos = job.topology.role(diagnosis.faulty.rank).stages
    return attrs.evolve(diagnosis, stages=tuple(info.stage for info in infos))


def _program(job: Job, index: int, step: int) -> Program | None:
    """The program that a rank was in, if it was in one."""
    return job.program_of(job.step(step)) if index >= 0 else None


def _is_cut_off(error: BaseException) -> bool:
    """Whether an error, or its cause, is an error of a connection."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, dist.DistError):
        return True
    says_so = isinstance(error, RuntimeError) and any(word in str(error) for word in CUT_OFF)
    return says_so or (cause is not None and _is_cut_off(cause))


def _first_line(error: Exception) -> str:
    """Return the first line of a backend's error."""
    return str(error).strip().splitlines()[0]
