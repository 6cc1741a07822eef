"""Temporary folders: one for each world of local processes; what a killed launcher has left is removed by the next.

A launcher holds a lock on its folder as long as it lives, and the kernel frees it, however the launcher ends. So a
folder that can be locked has no owner. On a file system without locks nothing is removed.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


PREFIX = "mimogrid-world-"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that only this user can read; remove it at the end, and those whose launchers are gone."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}????????"):
        with _locked(left) as is_locked:
            if is_locked:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with _locked(folder) as is_locked:
            # Another launcher may have found the folder before it was locked, and have removed it.
            if is_locked is False or not folder.exists():
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder of this user while open: True; False where another has it, None where there is nothing to lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield _lock(descriptor) if os.fstat(descriptor).st_uid == os.getuid() else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True
