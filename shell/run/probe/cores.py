"""Cores: how many ranks can compute at once at full speed.

Steps without turns are compared with steps in turns, not by the clock but by the CPU time that they take. Without turns
the same work takes more of it: for threads that carry messages, two hardware threads that share a core, or memory that
is too slow for all ranks. This makes the usable cores fewer than the machine has. Ranks that sleep, or that have a core
each, have no limit.
"""

import math
import os
import time
from collections.abc import Sequence

from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import (
    Compute,
    Gather,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Update,
    Wait,
    WaitGather,
    WaitReduce,
)
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.probe.clock import usual
from mimogrid.shell.run.probe.record import RankProbe
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.train_step import train_step


UNHINDERED = 0.95
"""Cores for this fraction of the ranks count as enough for all."""


def core_seconds(runtime: RankRuntime, job: Job, repeat: int) -> float:
    """Return the CPU seconds, over all threads of this rank, of a step in which ranks do not take turns."""
    seconds: list[float] = []
    following = job.step(0)
    for index in range(repeat):
        begin = time.process_time()
        step, following = following, job.step(index + 1)
        train_step(runtime, index, step, following)
        seconds.append(time.process_time() - begin)
    return usual(seconds)


def cores_at_once(program: Program, ranks: Sequence[RankProbe]) -> float | None:
    """Return how many ranks can compute at once at full speed; None if all can, or if there is no such number.

    There is none for several hosts, and where the ranks do not compute on cores. A rank that is busy for a part of the
    time leaves the rest of its core to others.
    """
    if any(of.core_s is None or of.host != ranks[0].host for of in ranks):
        return None
    busy, elapsed_s = map(math.fsum, zip(*(_computing(program, of) for of in ranks), strict=True))
    if not busy:
        return None
    in_turns, together = map(math.fsum, zip(*map(_comparable, ranks), strict=True))
    cores = allowed_cores() * min(in_turns / together, 1.0) / min(busy / elapsed_s, 1.0)
    return None if cores >= UNHINDERED * len(ranks) else cores


def _computing(program: Program, of: RankProbe) -> tuple[float, float]:
    """Return the CPU seconds of a rank's compute actions, and their seconds from begin to end.

    An action of more ranks than there are cores takes longer for that reason alone, so it counts as busy throughout.
    """
    busy = elapsed_s = 0.0
    for action in of.own.actions:
        if isinstance(action, Compute):
            crowded = len(program.joint(of.rank, action)) > allowed_cores()
            busy_s = of.own.busy_s(action)
            busy += busy_s
            elapsed_s += busy_s if crowded else of.own.elapsed_s(action)
    return busy, elapsed_s


def _comparable(of: RankProbe) -> tuple[float, float]:
    """Return the CPU seconds of compute actions and messages in a step, in turns and without turns.

    Joint actions and planning are left out, because they do other work in turns than without.
    """
    assert of.core_s is not None
    in_turns, together = 0.0, of.core_s - of.planning()
    for action in of.own.actions:
        match action:
            case Compute() | Send() | Recv():
                in_turns += of.own.busy_s(action)
            case Reduce() | WaitReduce() | Gather() | WaitGather() | Tie() | Norm() | Update():
                together -= of.own.busy_s(action)
            case Wait():
                pass
    return in_turns, together


def allowed_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
