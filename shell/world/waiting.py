"""Waiting: long work says on standard error what it is at, and for how long.

A thread looks now and then, so the work itself need not return for it. Work that takes less than `FIRST_S` says
nothing. Alone on a terminal it has one line, which changes and vanishes at the end. Elsewhere it writes a line every
`LINE_EVERY_S`.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mimogrid.core.faults.diagnosis import HeartbeatRecord
from mimogrid.shell.world.phases import IN_WORDS


FIRST_S = 2.0
"""What takes less is not shown on a terminal."""
LINE_EVERY_S = 10.0
"""Seconds to the first line, and from one line to the next, where there is no terminal."""
LOOK_S = 0.5
"""Seconds from one look at the work to the next."""
WIDTH = 100
"""Columns of the line on a terminal."""

Subject = str | None | Callable[[], str | None]
"""What some work is at, or a function that returns that; None where there is nothing to wait for."""


class Waiting:
    """What some work is at. The work may say so (`say`), and how much of it is done (`tell`)."""

    def __init__(self, subject: Subject, *, in_place: bool = True) -> None:
        self._subject: Callable[[], str | None] = subject if callable(subject) else lambda: subject
        self._in_place = in_place and sys.stderr.isatty()
        self._share = 0.0
        self._now: str | None = None
        self._since = self._shown_at = time.monotonic()
        self._is_shown = False

    def say(self, subject: str | None) -> None:
        """Say what the work is at from now on."""
        self._subject = lambda: subject

    def tell(self, done: float, total: float) -> None:
        """Say how much of what the work is at is done."""
        self._share = done / total if total else 0.0

    def look(self, now: float) -> None:
        """Show what the work is at, if it is time to; `now` is of the monotonic clock."""
        subject = self._subject()
        if subject != self._now:
            self._now, self._share, self._since, self._shown_at = subject, 0.0, now, now
            self.clear()
        elif subject is not None and self._in_place and now - self._since >= FIRST_S:
            self._is_shown = True
            print(f"\r{self._line(now)[:WIDTH]:<{WIDTH}}", end="", file=sys.stderr, flush=True)  # noqa: T201
        elif subject is not None and not self._in_place and now - self._shown_at >= LINE_EVERY_S:
            self._shown_at = now
            print(self._line(now), file=sys.stderr, flush=True)  # noqa: T201

    def clear(self) -> None:
        """Remove the line from the terminal."""
        if self._is_shown:
            self._is_shown = False
            print(f"\r{'':<{WIDTH}}\r", end="", file=sys.stderr, flush=True)  # noqa: T201

    def _line(self, now: float) -> str:
        seconds, share = now - self._since, min(self._share, 1.0)
        done = f" {share:.0%}, {seconds * (1 / share - 1):.0f} s left," if share else ""
        return f"{self._now}:{done} {seconds:.0f} s so far"


@contextlib.contextmanager
def waiting(subject: Subject, *, silent: bool = False, in_place: bool = True) -> Iterator[Waiting]:
    """Show what the work in this context is at, unless it is `silent`; not `in_place` beside what others write."""
    shown, ended = Waiting(subject, in_place=in_place), threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_S):
            shown.look(time.monotonic())

    if silent:
        yield shown
        return
    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    shown.look(time.monotonic())
    thread.start()
    try:
        yield shown
    finally:
        ended.set()
        thread.join()
        shown.clear()


def phase_in_words(record: HeartbeatRecord) -> str | None:
    """Return what a rank is at by its heartbeat; None within a program and between steps, where progress is shown."""
    return IN_WORDS.get(record.doing)
