"""Failures: one report for the whole world, from the first rank that knows.

A rank that raises knows why. A rank that is cut off (its peer closed the connection, or did not answer in time) does
not: it reads everybody's heartbeat and says whom the world was waiting for. The others end as echoes, without a word
(`world.first_failure`).
"""

import contextlib
import time
import traceback
from collections.abc import Iterator

import attrs
import torch.distributed as dist

from mimogrid.core.base.errors import EchoError, PlanError, WorldError
from mimogrid.core.faults.diagnosis import DiagnosedError, Diagnosis, find
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.world import AbsentError, World, first_failure


CUT_OFF = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "imeout", "NCCL")
"""Words of the errors by which a backend says that a peer is gone or late; gloo's have no type of their own."""


@contextlib.contextmanager
def one_report(world: World, heartbeat: Heartbeat, job: Job) -> Iterator[None]:
    """Raise the first failure of the world as a `DiagnosedError`, and those that it causes as `EchoError`."""
    try:
        with first_failure(world, lambda: heartbeat.folder):
            yield
    except (PlanError, EchoError, DiagnosedError):
        raise
    except Exception as error:
        raise _explained(error, heartbeat, job) from error


def _explained(error: Exception, heartbeat: Heartbeat, job: Job) -> DiagnosedError:
    seen, now_s = heartbeat.records(), time.time()
    mine = seen[heartbeat.rank]
    if isinstance(error, AbsentError):
        finding = find(mine.rank, seen, None, now_s=now_s, suspects=error.ranks)
        return DiagnosedError(_with_stages(finding, job), f"\n{error}")
    if _is_cut_off(error):
        finding = find(mine.rank, seen, _program(job, mine.index, mine.step), now_s=now_s)
        if finding.about.rank != mine.rank:
            return DiagnosedError(_with_stages(finding, job), f"\n{_last(error)}")
    finding = _with_stages(Diagnosis(mine, "failed", now_s), job)
    why = f": {error}" if isinstance(error, WorldError) else f": {type(error).__name__}: {error}"
    details = "" if isinstance(error, WorldError) else f"\n{''.join(traceback.format_exception(error))}"
    return DiagnosedError(finding, f"{why}{details.rstrip()}")


def _with_stages(finding: Diagnosis, job: Job) -> Diagnosis:
    infos = job.topology.role(finding.about.rank).stages
    return attrs.evolve(finding, stages=tuple(info.stage for info in infos))


def _program(job: Job, index: int, step: int) -> Program | None:
    """The program that a rank was in, if it was in one."""
    return plan_step(job.step(step), job.order) if index >= 0 else None


def _is_cut_off(error: BaseException) -> bool:
    """Whether an error, or what it came from, is that of a connection."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, dist.DistError):
        return True
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in CUT_OFF)
    return said or (cause is not None and _is_cut_off(cause))


def _last(error: Exception) -> str:
    """What the backend said, on one line."""
    return str(error).strip().splitlines()[0]
