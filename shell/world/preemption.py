"""Preemption: a request to stop, from a scheduler that wants the machine back, a user, or a terminal that is closed.

SIGTERM, SIGUSR1, SIGHUP and SIGINT, to any rank, request the run to stop. The rank reports the request in the next
agreement on a step. So all ranks stop after the same step, save, and exit with `EXIT_CODE`, which is not 0, because
launchers restart on it. A second signal ends the process at once, because it may hang. While the process saves, it has
no effect. A launcher passes signals on, and a second Ctrl-C ends it and its ranks at once, also while they save.

Signals that this process was started to ignore, as by nohup, stay ignored.
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
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SECOND_S = 2.0
"""Signals closer than this are one: a scheduler signals a launcher and its children, and the launcher passes it on."""
AGAIN_S = 0.3
"""Ctrl-C twice within this time is one: some wrappers pass on what the terminal has sent already."""
AGAIN = b"mimogrid: stopping after this step; Ctrl-C again ends the run at once, without saving\n"


@attrs.define(eq=False)
class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        received_s: when it was, by the monotonic clock.
        is_accepted: whether it now saves and stops.
        is_in_vain: tells whether the run has failed, so that nothing will be saved.
    """

    received_s: float | None = None
    is_accepted: bool = False
    is_in_vain: Callable[[], bool] = lambda: False

    @property
    def is_received(self) -> bool:
        """Whether the process was asked to stop."""
        return self.received_s is not None

    def accept(self) -> None:
        """Ignore further signals: the ranks have agreed to stop, and are about to save."""
        self.is_accepted = True

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note a signal; the second one, or one in vain, ends the process, as without this handler."""
        now = time.monotonic()
        is_second = self.received_s is not None and now - self.received_s > SECOND_S
        self.received_s = self.received_s or now
        if (is_second and not self.is_accepted) or self.is_in_vain():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def receiving_signals(stop_request: StopRequest) -> Iterator[None]:
    """Take signals as a request to stop while open.

    After a failure they stay so. A launcher that has seen another rank die signals this rank at once, and this rank
    still has to report why it ends. They also stay so in a run that was asked to stop: Slurm signals a step
    twice, and the second signal may come when all is saved.
    """
    before = _handle(stop_request.receive)
    try:
        yield
    except BaseException:
        stop_request.is_accepted = False  # There is nothing left to save: a second signal ends the process.
        raise
    if not (stop_request.is_received or stop_request.is_accepted):
        _restore(before)


@contextlib.contextmanager
def forwarding_signals(send: Callable[[int], None]) -> Iterator[StopRequest]:
    """Forward the signals of this process to the processes that it has started; the second Ctrl-C interrupts it."""
    request = StopRequest()

    def forward(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if request.received_s is None:
            request.received_s = now
            if number == signal.SIGINT:
                os.write(2, AGAIN)
        elif number == signal.SIGINT and now - request.received_s > AGAIN_S:
            raise KeyboardInterrupt
        # A rank that is not in a run yet ends by SIGTERM, and would pass over SIGINT.
        send(signal.SIGTERM if number == signal.SIGINT else number)

    before = _handle(forward)
    try:
        yield request
    finally:
        _restore(before)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for what is not ignored; return the handlers before it."""
    ignored = {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    return {number: signal.signal(number, handler) for number in SIGNALS if number not in ignored}


def _restore(before: Mapping[int, Any]) -> None:
    for number, earlier in before.items():
        signal.signal(number, earlier)
