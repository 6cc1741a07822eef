"""Watcher: shows the progress of a search on standard error, and ends it after a time or at Ctrl-C."""

import math
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Self

from mimogrid.core.plan.progress import Progress
from mimogrid.shell.world import waiting


EVERY_S = 0.5
"""Seconds between two lines of progress on a terminal."""


class Watcher:
    """The watch of a search while the context is open.

    The first Ctrl-C ends the search with the best layout so far, the second one the program.
    """

    def __init__(self, limit_s: float | None, *, silent: bool) -> None:
        self._begin = time.monotonic()
        self._until = self._begin + limit_s if limit_s is not None else math.inf
        self._shows, self._in_place = not silent, sys.stderr.isatty()
        self._next = self._begin + (waiting.FIRST_S if self._in_place else waiting.LINE_EVERY_S)
        self._interrupted = self._shown = False

    def __call__(self, progress: Progress) -> bool:
        """Show the progress; return whether to go on."""
        now = time.monotonic()
        if self._shows and now >= self._next:
            self._next = now + (EVERY_S if self._in_place else waiting.LINE_EVERY_S)
            line = _line(progress, now - self._begin)
            if self._in_place:
                self._shown = True
                line = f"\r{line:<100}"
            print(line, end="" if self._in_place else "\n", file=sys.stderr, flush=True)
        return now < self._until and not self._interrupted

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._shown:
            print(f"\r{'':<100}\r", end="", file=sys.stderr, flush=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, self._before)


def _line(progress: Progress, seconds: float) -> str:
    best = f"best {progress.best_s:.4g} s" if math.isfinite(progress.best_s) else "no layout timed yet"
    bound = f", bound {progress.bound_s:.4g} s" if progress.bound_s else ""
    counts = f"{progress.looked_at:,} examined, {progress.simulated} simulated"
    return f"{seconds:.0f} s: {counts}; {best}{bound}. Ctrl-C: take the best so far."
