"""Clock: how long something takes on a machine that is shared with other programs.

Other programs make things slower, never faster. So time in which they had the core is not counted, the first steps, in
which allocators, threads and connections are made, are left out, and of several measurements the faster half counts.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from mimogrid.shell.device.device import Device


WARM_UP = 2
"""How many first steps are not counted."""


@attrs.frozen
class Measurement:
    """Seconds of an action: from begin to end without those spent waiting for a core, and those spent computing."""

    elapsed_s: float
    busy_s: float


@attrs.frozen(eq=False)
class Clock:
    """Measures what this thread does."""

    device: Device

    def now(self) -> tuple[float, float]:
        """Return the clock without the time spent waiting for a core, and the seconds of computing.

        Only Linux reports how long a thread has waited for a core. Elsewhere the machine must be idle.
        """
        self.device.finish()
        now = _running_s()
        return now, time.perf_counter() if self.device.is_asynchronous else time.thread_time()

    def since(self, begin: tuple[float, float]) -> Measurement:
        """Return what has passed since `now` gave `begin`."""
        elapsed_s, busy_s = (now - then for then, now in zip(begin, self.now(), strict=True))
        return Measurement(max(elapsed_s, 0.0), busy_s)


def _running_s() -> float:
    """Return the clock, less the time that this thread has waited for a core until that moment.

    A thread that loses the core between reading the two would count the wait in one and not in the other. A long wait
    would then make an action take no time. So both are read again until there was no wait between.
    """
    before = _core_wait_s()
    while True:
        now = time.perf_counter()
        waited = _core_wait_s()
        if waited == before:
            return now - waited
        before = waited


def _core_wait_s() -> float:
    """Return how long this thread has waited for a core, 0 where that is not known."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def usual(seconds: Sequence[float]) -> float:
    """Return the median of the faster half."""
    return statistics.median(sorted(seconds)[: (len(seconds) + 1) // 2])


def rounded(number: float) -> float:
    """Return a number with four digits, more than a measurement has."""
    return float(f"{number:.4g}")
