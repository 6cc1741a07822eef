"""Resident: the most memory that this process has had at once, by the books of Linux."""

import contextlib
import ctypes
from pathlib import Path


def fresh_peak() -> int:
    """Give back what was freed, and forget the peak of what was resident; return what is resident now.

    A process that has run another job before would else reuse its memory, and remember its peak.
    """
    with contextlib.suppress(AttributeError, OSError):  # not every C library can, nor may everybody
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """Return the most bytes that were resident at once."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
