"""The machine: what the operating system says of this host, or of the container that it is. Needs no torch."""

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """Return the name of the CPU's model."""
    found = re.search(r"^model name\s*: (.*)$", "\n".join(lines("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int | None:
    """Return the memory that this machine, or this container, has left; None where nothing says so."""
    found = [
        int(line.split()[1]) << 10 for line in lines("/proc/meminfo") if line.startswith("MemAvailable:")
    ]
    limit, used = lines("/sys/fs/cgroup/memory.max"), lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdecimal():
        found.append(int(limit[0]) - int(used[0]))
    return min(found, default=None)


def lines(path: str) -> list[str]:
    """Return the lines of a file of the system; none where there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
