"""Execute: one loop over a rank's program, one match.

The executor does what the program says, in its order; it inserts, drops and decides nothing. It marks where
each action began and ended, which is the measured timeline, and keeps the heartbeat by which others see where it is.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import attrs

from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Update,
    Wait,
    WaitReduce,
)
from mimogrid.core.topology.topology import Stage
from mimogrid.shell.device.streams import Mark
from mimogrid.shell.runtime.stage import StageRunner
from mimogrid.shell.runtime.transport import Transport
from mimogrid.shell.world.heartbeat import Heartbeat


class Finisher(Protocol):
    """Whoever reduces gradients, agrees on the step and takes it."""

    def reduce(self, stage: Stage, bucket: int) -> None:
        """Post the sum of a bucket of a stage's gradients; return at once."""
        ...

    def wait(self, stage: Stage, bucket: int) -> None:
        """Block until that sum is there."""
        ...

    def tie(self, stage: Stage) -> None:
        """Sum the gradients of tied weights over the ends of a module."""
        ...

    def agree(self) -> None:
        """Agree on the norm, and on whether the step is taken."""
        ...

    def update(self) -> None:
        """Take the step, if that was agreed."""
        ...


@attrs.frozen
class Timed:
    """An action with when it began and ended, on the device where that does things later than it is asked for."""

    action: Action
    begin: Mark
    end: Mark

    @property
    def begin_ns(self) -> int:
        """When it began, in nanoseconds of the process's monotonic clock."""
        return self.begin.ns

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return self.end.ns


Runs = Callable[
    [tuple[Action, ...], Mapping[Stage, StageRunner], Transport, Finisher, Heartbeat],
    tuple[Timed, ...],
]
"""Whatever runs a rank's program for one step and returns its timeline: `execute`, or who calls it."""


def busy_s(timeline: Iterable[Timed]) -> float:
    """Return how many seconds of a timeline were spent computing."""
    return sum(t.end_ns - t.begin_ns for t in timeline if isinstance(t.action, Compute)) / 1e9


def execute(
    actions: tuple[Action, ...],
    stages: Mapping[Stage, StageRunner],
    transport: Transport,
    finisher: Finisher,
    heartbeat: Heartbeat,
    *,
    first: int = 0,
) -> tuple[Timed, ...]:
    """Run one rank's program for one step, or the part of it that begins with action `first`; return its timeline."""
    timeline: list[Timed] = []
    for index, action in enumerate(actions, first):
        begin = transport.streams.mark()
        heartbeat.act(index, action)
        _act(action, stages, transport, finisher)
        timeline.append(Timed(action, begin, transport.streams.mark()))
    return tuple(timeline)


def _act(
    action: Action, stages: Mapping[Stage, StageRunner], transport: Transport, finisher: Finisher
) -> None:
    match action:
        case Compute():
            stages[action.stage].compute(action)
        case Send():
            transport.send(action, stages[action.stage].payload(action))
        case Recv():
            stage = stages[action.stage]
            transport.receive(action, stage.shapes(action), stage.dtype)
        case Wait(transfer=Send()):
            transport.wait(action.transfer)
        case Wait(transfer=Recv() as recv):
            stages[recv.stage].deliver(recv, transport.wait(recv))
        case Reduce(stage, bucket):
            finisher.reduce(stage, bucket)
        case WaitReduce(stage, bucket):
            finisher.wait(stage, bucket)
        case Tie():
            finisher.tie(action.stage)
        case Norm():
            finisher.agree()
        case Update():
            finisher.update()
