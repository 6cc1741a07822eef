"""Preemption: a request to stop, from a scheduler that wants the machine back.

SIGTERM and SIGUSR1, to any rank, request the run to stop. The rank reports the request in the next agreement on a
step. So all ranks stop after the same step, save, and exit with `EXIT_CODE`, which is not 0, because launchers restart
on it. A second signal ends the process at once, because it may hang. While the process saves, it has no effect.
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
"""75, "try again": the exit code of a process that was asked to stop, once all is saved."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECOND_S = 2.0
"""Signals closer than this are one: a scheduler signals a launcher and its children, and the launcher passes it on."""


@attrs.define(eq=False)
class StopRequest:
    """Whether this process was asked to stop: when, by the monotonic clock, and whether it now saves and stops."""

    received_s: float | None = None
    is_accepted: bool = False

    @property
    def is_received(self) -> bool:
        """Whether the process was asked to stop."""
        return self.received_s is not None

    def accept(self) -> None:
        """Ignore further signals: the ranks have agreed to stop, and are about to save."""
        self.is_accepted = True

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note a signal; the second one ends the process, as without this handler."""
        now = time.monotonic()
        if self.received_s is None:
            self.received_s = now
        elif now - self.received_s > SECOND_S and not self.is_accepted:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def receiving_signals(stop_request: StopRequest) -> Iterator[None]:
    """Take signals as a request to stop while open.

    After a failure they stay so. A launcher that has seen another rank die signals this rank at once, and this rank
    still has to report why it ends.
    """
    before = _handle(stop_request.receive)
    try:
        yield
    except BaseException:
        stop_request.is_accepted = False  # There is nothing left to save: a second signal ends the process.
        raise
    _restore(before)


@contextlib.contextmanager
def forwarding_signals(send: Callable[[int], None]) -> Iterator[None]:
    """Forward the signals of this process to the processes that it has started."""
    before = _handle(lambda number, _: send(number))
    try:
        yield
    finally:
        _restore(before)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler; return the handlers before it."""
    return {number: signal.signal(number, handler) for number in SIGNALS}


def _restore(before: Mapping[int, Any]) -> None:
    for number, earlier in before.items():
        signal.signal(number, earlier)
