"""Cores: how many ranks can compute at once at full speed.

That is measured in steps without turns, not by the clock, but by what they take of the cores. What that is more than
in turns (threads that carry messages, a core that is two threads of another, a memory too slow for all) makes cores
fewer than the machine has. Ranks that sleep, or have a core each, know no limit.
"""

import math
import os
import time
from collections.abc import Sequence

from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Compute, Norm, Recv, Reduce, Send, Tie, Update, Wait, WaitReduce
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.probe.clock import usual
from mimogrid.shell.run.probe.record import OfRank
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.train_step import train_step


UNHINDERED = 0.95
"""Cores for this part of the ranks are as good as enough."""


def core_seconds(runtime: RankRuntime, job: Job, repeat: int) -> float:
    """Return the seconds of all threads of this rank that a step takes when ranks do not take turns."""
    seconds: list[float] = []
    following = job.step(0)
    for index in range(repeat):
        begin = time.process_time()
        step, following = following, job.step(index + 1)
        train_step(runtime, index, step, following)
        seconds.append(time.process_time() - begin)
    return usual(seconds)


def cores_at_once(program: Program, ranks: Sequence[OfRank]) -> float | None:
    """Return how many ranks can compute at once at full speed; None if all can, or there is no number for all of them.

    That is so on several hosts, and where it is not cores that compute. A rank that is busy for a part of the time
    only leaves the rest of its core to others.
    """
    if any(of.core_s is None or of.host != ranks[0].host for of in ranks):
        return None
    busy, lasted = map(math.fsum, zip(*(_computing(program, of) for of in ranks), strict=True))
    if not busy:
        return None
    in_turns, together = map(math.fsum, zip(*map(_comparable, ranks), strict=True))
    cores = allowed_cores() * min(in_turns / together, 1.0) / min(busy / lasted, 1.0)
    return None if cores >= UNHINDERED * len(ranks) else cores


def _computing(program: Program, of: OfRank) -> tuple[float, float]:
    """Return the seconds in which a rank is busy with its compute actions, and how long these last.

    Those that more ranks join than there are cores last longer because of that alone, so they count as busy throughout.
    """
    busy = lasted = 0.0
    for action in of.own.actions:
        if isinstance(action, Compute):
            crowded = len(program.joint(of.rank, action)) > allowed_cores()
            worked = of.own.worked(action)
            busy += worked
            lasted += worked if crowded else of.own.lasted(action)
    return busy, lasted


def _comparable(of: OfRank) -> tuple[float, float]:
    """Return what computing and messages of a step take of the cores, in turns and without them.

    What joins ranks, and planning, are not compared: in turns they are other work than without.
    """
    assert of.core_s is not None
    in_turns, together = 0.0, of.core_s - of.planning()
    for action in of.own.actions:
        match action:
            case Compute() | Send() | Recv():
                in_turns += of.own.worked(action)
            case Reduce() | WaitReduce() | Tie() | Norm() | Update():
                together -= of.own.worked(action)
            case Wait():
                pass
    return in_turns, together


def allowed_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
