"""Faults: what a test lets go wrong, on which rank, at which step and moment.

A moment is what a rank is *doing*: an action of its program in its notation, or one of `MOMENTS`. A fault names it by
a shell pattern, and strikes the first time that it fits. Each prints as one line and is read back from it:

>>> fault = parse("kill rank 1 step 3 at lm.0 B*")
>>> fault.strikes(rank=1, step=3, doing="lm.0 B2"), fault.strikes(rank=1, step=2, doing="lm.0 B2")
(True, False)
>>> print(parse("delay rank 0 step 2 for 0.5 s at NORM"))
delay rank 0 step 2 for 0.5 s at NORM

A rank that is slow all the time is delayed in ``every step``, each time that the moment comes:

>>> parse("delay rank 0 every step for 0.02 s at enc.0 F*").strikes(rank=0, step=7, doing="enc.0 F1")
True
"""

import enum
import fnmatch
import re

import attrs


MOMENTS = (
    RENDEZVOUS := "rendezvous",
    BUILDING := "building",
    BETWEEN := "between steps",
    LOADING := "loading a checkpoint",
    READING := "reading data",
    SAVING := "saving a checkpoint",
    WRITING := "writing a checkpoint",
    PUBLISHING := "publishing a checkpoint",
    PUBLISHED := "a checkpoint is published",
    FINISHING := "writing results",
    COLLECTING := "collecting results",
)
"""What a rank does outside of programs, or, reading data, within an action. Only the first rank of a job publishes."""


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
