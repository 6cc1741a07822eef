"""Injection: faults on purpose, done to a rank by an observer of its heartbeat.

A fault names a rank, a step, and by a shell pattern what the rank does then: an action of its program in its notation,
or a phase of `shell.world.phases`. It strikes the first time that this fits. Each prints as one line and is read back
from it:

>>> fault = parse("kill rank 1 step 3 at lm.0 B*")
>>> fault.strikes(rank=1, step=3, doing="lm.0 B2"), fault.strikes(rank=1, step=2, doing="lm.0 B2")
(True, False)
>>> print(parse("delay rank 0 step 2 for 0.5 s at NORM"))
delay rank 0 step 2 for 0.5 s at NORM

A rank that is slow all the time is delayed in ``every step``, each time that the pattern fits:

>>> parse("delay rank 0 every step for 0.02 s at enc.0 F*").strikes(rank=0, step=7, doing="enc.0 F1")
True
"""

import contextlib
import enum
import fnmatch
import functools
import os
import re
import signal
import time
from collections.abc import Iterator
from unittest.mock import patch

import attrs


class Harm(enum.Enum):
    """What happens to a rank: it raises, sleeps for a while, is stopped (SIGSTOP), or killed (SIGKILL)."""

    FAIL = "fail"
    DELAY = "delay"
    STOP = "stop"
    KILL = "kill"


@attrs.frozen
class Fault:
    """One thing that goes wrong, at one step (None: at every step); `seconds` is how long a delay takes."""

    harm: Harm
    rank: int
    step: int | None
    moment: str
    seconds: float = 0.0

    def __str__(self) -> str:
        lasting = f"for {self.seconds:g} s " if self.harm is Harm.DELAY else ""
        when = "every step" if self.step is None else f"step {self.step}"
        return f"{self.harm.value} rank {self.rank} {when} {lasting}at {self.moment}"

    def strikes(self, *, rank: int, step: int, doing: str) -> bool:
        """Whether this is the rank and the moment."""
        now = self.step is None or step == self.step
        return rank == self.rank and now and fnmatch.fnmatchcase(doing, self.moment)


_LINE = re.compile(
    r"(?P<harm>fail|stop|kill|delay) rank (?P<rank>\d+) (?:step (?P<step>\d+)|every step)"
    r"(?: for (?P<seconds>[\d.]+(?:e[+-]?\d+)?) s)? at (?P<moment>\S.*)"
)


def parse(line: str) -> Fault:
    """Read a fault in its notation. Raises ValueError for anything else."""
    found = _LINE.fullmatch(line.strip())
    if found is None or (found["seconds"] is not None) != (found["harm"] == "delay"):
        example = "kill rank 1 step 3 at lm.0 B2' or 'delay rank 1 step 3 for 0.5 s at NORM"
        raise ValueError(f"'{line}' is no fault; one looks like '{example}'")
    seconds = float(found["seconds"] or 0)
    step = int(found["step"]) if found["step"] else None
    return Fault(Harm(found["harm"]), int(found["rank"]), step, found["moment"], seconds)


class InjectedError(RuntimeError):
    """Raised where a fault wants a rank to fail."""


@attrs.define
class Injector:
    """An observer of a heartbeat that does a fault to this process: once, or in every step."""

    fault: Fault | None

    def __call__(self, rank: int, step: int, doing: str) -> None:
        """Let the fault strike, if this is its rank and moment."""
        fault = self.fault
        if fault is None or not fault.strikes(rank=rank, step=step, doing=doing):
            return
        if fault.step is not None:
            self.fault = None
        match fault.harm:
            case Harm.FAIL:
                raise InjectedError(f"a fault on purpose: {fault}")
            case Harm.DELAY:
                time.sleep(fault.seconds)
            case Harm.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Harm.KILL:
                os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def injected(line: str) -> Iterator[None]:
    """Let sessions that are opened meanwhile in this process suffer a fault ("": none)."""
    from mimogrid.shell.runtime import session  # noqa: PLC0415 -- the notation needs no torch

    if not line:
        yield
        return
    heartbeat = functools.partial(session.Heartbeat, observer=Injector(parse(line)))
    with patch.object(session, "Heartbeat", heartbeat):
        yield
