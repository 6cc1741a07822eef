"""Clock: how long something takes on a machine that others use, too.

A machine makes things slower and never faster. So time in which others had the core is not counted, steps in which
allocators, threads and connections are made are left out, and of several readings the faster half counts.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from mimogrid.shell.device.device import Device


WARM_UP = 2
"""Steps that are not counted: allocators, threads, connections."""


@attrs.frozen
class Reading:
    """Seconds of an action: from begin to end, without those in which others had the core, and those of computing."""

    lasted: float
    worked: float


@attrs.frozen(eq=False)
class Clock:
    """Reads how long this thread has been at something."""

    device: Device

    def now(self) -> tuple[float, float]:
        """Return seconds without those spent waiting for a core, and seconds of computing.

        Linux tells how long a thread has waited for a core; elsewhere nobody does, and the machine must be quiet.
        """
        self.device.finish()
        now = _at_work()
        return now, time.perf_counter() if self.device.is_asynchronous else time.thread_time()

    def since(self, begin: tuple[float, float]) -> Reading:
        """Return what has passed since `now` gave `begin`."""
        lasted, worked = (there - here for here, there in zip(begin, self.now(), strict=True))
        return Reading(max(lasted, 0.0), worked)


def _at_work() -> float:
    """Return the clock, less what this thread has waited for a core until that very moment.

    Who loses the core between the two readings would have waited by one and not by the other: a wait longer than the
    action makes it last nothing. So both are read until no wait has come between.
    """
    before = _waited_for_a_core()
    while True:
        now = time.perf_counter()
        waited = _waited_for_a_core()
        if waited == before:
            return now - waited
        before = waited


def _waited_for_a_core() -> float:
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def usual(seconds: Sequence[float]) -> float:
    """Return the median of the faster half: what else a machine does only ever makes things slower."""
    return statistics.median(sorted(seconds)[: (len(seconds) + 1) // 2])


def rounded(number: float) -> float:
    """Four digits are more than a measurement has."""
    return float(f"{number:.4g}")
