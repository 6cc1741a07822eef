"""Preemption: a request to stop, from a scheduler that wants the machine back.

SIGTERM and SIGUSR1 are the same wish, to any rank. The rank hands it in with the next agreement on a step, so all ranks
stop after the same step, save, and exit with `EXIT_CODE`, which is not 0: launchers restart on it. A second signal ends
the process at once, for it may hang; but not while it saves what it was asked to save: that is what both want.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import attrs


EXIT_CODE = os.EX_TEMPFAIL
"""75, "try again": what a process that was asked to stop exits with once all is saved."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECOND_S = 2.0
"""Signals closer than this are one: a scheduler signals a launcher and its children, and the launcher passes it on."""


@attrs.define(eq=False)
class StopRequest:
    """Whether this process was asked to stop, and whether that is being done."""

    asked_s: float | None = None
    is_granted: bool = False

    @property
    def is_there(self) -> bool:
        """Whether it was."""
        return self.asked_s is not None

    def grant(self) -> None:
        """Hear no more signals: the world has agreed to stop, and is about to save."""
        self.is_granted = True

    def hear(self, number: int, _: FrameType | None) -> None:
        """Note a signal; the second ends the process as if nobody had listened."""
        now = time.monotonic()
        if self.asked_s is None:
            self.asked_s = now
        elif now - self.asked_s > SECOND_S and not self.is_granted:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def listening(stop_request: StopRequest) -> Iterator[None]:
    """Hear signals as a wish; afterwards they are what they were.

    After a failure they are still heard: a launcher that has seen another rank die signals this one at once, which is
    about to say why, and end.
    """
    before = _handle(stop_request.hear)
    try:
        yield
    except BaseException:
        stop_request.is_granted = False  # There is nothing left to save: a second signal ends the process.
        raise
    _restore(before)


@contextlib.contextmanager
def passing_on(send: Callable[[int], None]) -> Iterator[None]:
    """Give the signals that this process gets to those that it has started."""
    before = _handle(lambda number, _: send(number))
    try:
        yield
    finally:
        _restore(before)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler; return what was there."""
    return {number: signal.signal(number, handler) for number in SIGNALS}


def _restore(before: Mapping[int, Any]) -> None:
    for number, earlier in before.items():
        signal.signal(number, earlier)
