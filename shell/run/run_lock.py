"""The lock of a run folder: one world trains there, whatever dies.

``run.lock`` keeps others out in two ways:

    flock    The launcher and every rank share it as long as they live. A world that starts needs it alone first. So no
             world starts beside ranks that have outlived their launcher. The kernel frees it, however they end.
    owner    The file names the host and the process that trains there, and a count that rises every `BEAT_S` seconds.
             Another host may not see the flock. It watches the count for `STALE_S` seconds.

An owner that finds another owner's name in the file ends its own world: it was cut off from the file system for so long
that another host has gone on with the run. Ages are for messages only. Nothing is decided by a clock that may jump.
"""

import contextlib
import fcntl
import getpass
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.core.base.text import printable


LOCK = "run.lock"
BEAT_S, STALE_S = 5.0, 20.0
ENDING_S = 3.0
"""How long a world that starts waits for ranks whose launcher is gone: they are about to end."""


@attrs.frozen
class Owner:
    """Who trains in a folder.

    Attributes:
        host, pid, user: the process of the launcher, or of rank 0 under torchrun.
        machine: equal where a process id means the same process: one boot of one machine, one container.
        started: when the process began, in ticks since the boot; distinguishes it from a later one of that id.
        inode: the number of the lock's file, which differs in a copy of the folder.
        beats: rises as long as the process lives.
    """

    host: str
    pid: int
    user: str
    machine: str
    started: int
    inode: int
    beats: int = 0

    @property
    def is_of_this_machine(self) -> bool:
        """Whether this process can see whether the owner lives."""
        return self.machine == _machine()

    def lives(self) -> bool:
        """Whether a process of this machine still runs."""
        return _start_of(self.pid) == self.started


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the lock of a folder. Raises PlanError where another world has it; the message names the owner."""
    with _opened(folder) as descriptor:
        _take(descriptor, folder)
        inode = os.fstat(descriptor).st_ino
        me = Owner(platform.node(), os.getpid(), _user(), _machine(), _start_of(os.getpid()) or 0, inode)
        _write(folder, me)
        if _flock(descriptor, fcntl.LOCK_SH) is False:  # this is no single step: another world was faster
            raise _in_use(folder)
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(folder, me, ended), daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join(1.0)
            if not beating.is_alive():  # else the file system does not answer
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Share the lock of a folder, as every rank does. Raises WorldError where another world is about to start."""
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder) as descriptor:
        if _flock(descriptor, fcntl.LOCK_SH) is False:
            raise WorldError(f"run folder '{folder}' was taken by another world just now: {read(folder)}")
        yield


def read(folder: Path) -> Owner | None:
    """Return who trains in a folder, if its lock names somebody."""
    try:
        return Owner(**json.loads((folder / LOCK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _take(descriptor: int, folder: Path) -> None:
    """Get the lock alone. Raises PlanError where another world has it."""
    deadline = time.monotonic() + ENDING_S
    while (has_lock := _flock(descriptor, fcntl.LOCK_EX)) is False:
        owner = read(folder)
        is_ending = owner is not None and owner.is_of_this_machine and not owner.lives()
        if not is_ending or time.monotonic() > deadline:
            raise _in_use(folder)
        time.sleep(0.05)
    owner = read(folder)
    if owner is None or owner.inode != os.fstat(descriptor).st_ino:
        return
    if owner.is_of_this_machine:
        if not has_lock and owner.lives():
            raise _in_use(folder)
    elif _beats_on(folder, owner):
        raise _in_use(folder)


def _beats_on(folder: Path, owner: Owner) -> bool:
    """Watch whether an owner on another host lives."""
    where = f"process {owner.pid} on host '{owner.host}'"
    text = f"run folder '{folder}' was left by {where}: watching it for {STALE_S:g} s\n"
    sys.stderr.write(printable(text))
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(min(0.2, STALE_S))
        if read(folder) != owner:
            return True
    return False


def _beat(folder: Path, me: Owner, ended: threading.Event) -> None:
    """Write a rising count until the run has ended; end this process where the lock is another's."""
    while not ended.wait(BEAT_S):
        owner = read(folder)
        if owner is not None and attrs.evolve(owner, beats=0) != attrs.evolve(me, beats=0):
            where = f"process {owner.pid} on host '{owner.host}'"
            text = f"mimogrid: run folder '{folder}' is now that of {where}: this run ends\n"
            sys.stderr.write(printable(text))
            sys.stderr.flush()
            os._exit(1)
        me = attrs.evolve(me, beats=me.beats + 1)
        with contextlib.suppress(OSError):  # the run itself will report it
            _write(folder, me)


def _write(folder: Path, owner: Owner) -> None:
    """Write the owner in place, because the lock is that of the file; close it, so that other hosts see it."""
    with (folder / LOCK).open("r+b") as file:
        text = (json.dumps(attrs.asdict(owner)) + "\n").encode()
        file.write(text)
        file.truncate(len(text))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int) -> bool | None:
    """Return whether this process has got a lock; None for a file system without locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _in_use(folder: Path) -> PlanError:
    owner = read(folder)
    if owner is None:
        message = "is in use: another process trains there."
        remedy = f"Wait until it has ended, or end what has '{folder / LOCK}' open (fuser)."
    else:
        age_s = max(0.0, time.time() - (folder / LOCK).stat().st_mtime)
        message = (
            f"is in use: process {owner.pid} on host '{owner.host}' (user {owner.user}) trains there, "
            f"last seen {age_s:.0f} s ago."
        )
        remedy = f"Wait until it has ended, or end it on '{owner.host}': kill {owner.pid}"
        if owner.is_of_this_machine and not owner.lives():
            message = (
                f"is in use: process {owner.pid} on host '{owner.host}' is gone, but its ranks still end."
            )
            remedy = f"Wait until they have ended, or end what has '{folder / LOCK}' open (fuser)."
    return PlanError([Problem("train.run_dir", f"run folder '{folder}' {message}", remedy)])


def _machine() -> str:
    """Return what is equal for two processes that see each other's ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _start_of(pid: int) -> int | None:
    """Return when a process of this machine began; None where it has ended, 0 where that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return str(os.getuid())
