"""Heartbeats: a record of what each rank does, for others who find that it does not answer.

The record is in a mapped file, ``rank-N`` in a folder that all ranks can read. Writing it takes no system call, and
the file is still there after the process was killed. It holds host, process, step, action, and the time when that
began. A local world keeps its heartbeats where it meets, a run under a launcher in its run folder. Until a folder is
named, the record is in memory.
"""

import contextlib
import functools
import mmap
import os
import platform
import struct
import time
from collections.abc import Callable
from pathlib import Path

from mimogrid.core.faults.diagnosis import GONE, LEFT, RUNNING, STOPPED, UNKNOWN, HeartbeatRecord
from mimogrid.core.schedule.actions import Action
from mimogrid.shell.world.phases import RENDEZVOUS


_RECORD = struct.Struct("<64sqqqqqd200s")
_CHANGING = struct.Struct("<qqqqd200s")
_WAITS = struct.Struct("<q")
_CHANGING_AT = struct.calcsize("<64sq")


Observer = Callable[[int, int, str], None]
"""Called with rank, step, and the action or phase that begins there."""


class Heartbeat:
    """The record of this rank. An observer is called after each change of it."""

    def __init__(self, rank: int, observer: Observer | None = None) -> None:
        self.rank = rank
        self._observer = observer
        self._step = self._count = 0
        self._counts_actions = True
        self._path: Path | None = None
        self._map = mmap.mmap(-1, _RECORD.size)
        self._write(RENDEZVOUS)

    def keep_in(self, folder: Path) -> None:
        """Keep the record in a folder, where others find it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.rank}"
        path.write_bytes(self._map[:])  # so that the disk has room for what is mapped
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self._path = path

    @property
    def folder(self) -> Path | None:
        """Where the records of all ranks are, if it is known."""
        return self._path.parent if self._path else None

    def begin_program(self, step: int, count: int, *, training: bool = True) -> None:
        """Begin a program of `count` actions. The actions of a forward-only program are not numbered."""
        self._step, self._count, self._counts_actions = step, count, training

    def begin_action(self, index: int, action: Action) -> None:
        """Note that an action begins."""
        notation = _notation(action)
        where = index if self._counts_actions else -1
        _CHANGING.pack_into(self._map, _CHANGING_AT, 0, self._step, where, self._count, time.time(), notation)
        if self._observer:
            self.observe(notation.decode())

    def enter(self, phase: str) -> None:
        """Note a phase that begins outside of programs (`phases`)."""
        self._write(phase)
        self.observe(phase)

    def observe(self, phase: str) -> None:
        """Call the observer for a phase within an action; the record keeps the action."""
        if self._observer:
            self._observer(self.rank, self._step, phase)

    def wait_for_others(self) -> None:
        """Note that this rank has done its own part of a joint action, and waits for the others."""
        _WAITS.pack_into(self._map, _CHANGING_AT, 1)

    def close(self, *, well: bool) -> None:
        """Note that this rank leaves by itself; a rank that ends well removes its record."""
        self._write(LEFT)
        if well and self._path:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still here
                self._path.parent.rmdir()

    def record(self) -> HeartbeatRecord:
        """Return what this rank is doing."""
        return _read(self.rank, self._map[:])

    def records(self, size: int) -> dict[int, HeartbeatRecord]:
        """Return what every rank of a world was last seen doing: of all that have a record, and of this one.

        Ranks of a larger world that trained in this folder before may have left theirs.
        """
        found = read(self.folder) if self.folder else {}
        return {rank: record for rank, record in found.items() if rank < size} | {self.rank: self.record()}

    def _write(self, doing: str) -> None:
        host, text = platform.node().encode(), doing.encode()
        _RECORD.pack_into(self._map, 0, host, os.getpid(), 0, self._step, -1, self._count, time.time(), text)


def read(folder: Path) -> dict[int, HeartbeatRecord]:
    """Return what every rank that has a record in a folder was last seen doing."""
    paths = folder.glob("rank-*[0-9]")
    found = ((int(path.name.removeprefix("rank-")), path.read_bytes()) for path in paths)
    return {rank: _read(rank, record) for rank, record in sorted(found) if len(record) == _RECORD.size}


def _read(rank: int, record: bytes) -> HeartbeatRecord:
    host, pid, waits, step, index, count, since_s, doing = _RECORD.unpack(record)
    return HeartbeatRecord(
        rank=rank,
        host=_text(host),
        step=step,
        doing=_text(doing),
        since_s=since_s,
        index=index,
        count=count,
        waits=bool(waits),
        pid=pid,
        state=_state(pid) if _text(host) == platform.node() else UNKNOWN,
    )


def _state(pid: int) -> str:
    """Return the state of a process of this host, as far as /proc tells."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return GONE if Path("/proc/self").exists() else UNKNOWN
    except OSError:
        return UNKNOWN
    return {"T": STOPPED, "t": STOPPED, "Z": GONE, "X": GONE}.get(letter, RUNNING)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


@functools.lru_cache(maxsize=1 << 14)
def _notation(action: Action) -> bytes:
    return str(action).encode()
