"""Resident: the peak of this process's memory, as Linux counts it."""

import contextlib
import ctypes
from pathlib import Path


def fresh_peak() -> int:
    """Return freed memory to the system, reset the peak, and return the bytes that are resident now.

    Otherwise a process that has run another job would reuse that job's memory, and report its peak.
    """
    with contextlib.suppress(AttributeError, OSError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """Return the most bytes that were resident at once."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
