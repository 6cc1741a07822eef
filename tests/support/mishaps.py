"""Mishaps: runs that a file system, a source or a clock lets down, on every rank ``mishaps:function``."""

import errno
import os
import random
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job import tensorfile
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run import run_lock, train


def failing_disk(place: RankPlace, job: Job, folder: str, rank: int, code: str) -> Any:
    """Train where what one rank writes for its second checkpoint fails; "STALL": it never comes back."""
    flush = tensorfile.flush

    def fail(descriptor: int, *arguments: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if place.rank != rank or "step-00000004" not in path:
            return flush(descriptor, *arguments)
        if code == "STALL":
            threading.Event().wait()
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number), path)

    with patch.object(tensorfile, "flush", fail):
        return train.in_world(place, job, None, folder)


def jumping_clock(place: RankPlace, job: Job, folder: str) -> Any:
    """Train where the clock of the machine jumps by up to a day, forth and back, whenever it is read."""
    draws, now = random.Random(place.rank), time.time
    with (
        patch.object(run_lock, "BEAT_S", 0.01),
        patch.object(time, "time", lambda: now() + draws.uniform(-86400, 86400)),
        run_lock.owned(Path(folder, f"rank-{place.rank}")),
    ):
        return train.in_world(place, job, None, folder)


def listening(place: RankPlace, job: Job, folder: str) -> tuple[Any, set[str], set[str]]:
    """Train; return the result, the addresses this process listened on, and its files of shared memory."""
    seen: set[str] = set()
    begin = train.train_step

    def look(*arguments: Any, **named: Any) -> Any:
        mine = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if f"socket:[{fields[9]}]" in mine and fields[3] == "0A":
                    seen.add(fields[1].partition(":")[0])
        return begin(*arguments, **named)

    with patch.object(train, "train_step", look):
        result = train.in_world(place, job, None, folder)
    maps = Path("/proc/self/maps").read_text().splitlines()
    return result, seen, {line.split()[-1] for line in maps if "/dev/shm/" in line}


def with_umask(place: RankPlace, job: Job, folder: str, mask: int) -> Any:
    """Train as a user who keeps files from others."""
    before = os.umask(mask)
    try:
        return train.in_world(place, job, None, folder)
    finally:
        os.umask(before)
