"""Execute: one loop over a rank's program, one match.

The executor does what the program says, in its order. It adds, drops and decides nothing. It marks where each action
began and ended, which is the measured timeline, and keeps the heartbeat by which others see where the rank is.
"""

from collections.abc import Callable, Iterable, Mapping

import attrs

from mimogrid.core.program.lifetimes import Releases
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Gather,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Update,
    Wait,
    WaitGather,
    WaitReduce,
)
from mimogrid.core.topology.topology import Stage
from mimogrid.shell.device.streams import Mark
from mimogrid.shell.runtime.gradients import StageBuffer
from mimogrid.shell.runtime.stage import StageStep
from mimogrid.shell.runtime.transport import Transport
from mimogrid.shell.world.heartbeat import Heartbeat


@attrs.frozen
class StepEnd:
    """How a training step ends: `agree` does what `NORM` says, `update` what `UPDATE` says.

    Neither may hold the context of the step: a cycle would keep tensors and process groups after their last use.
    """

    agree: Callable[[Iterable[StageStep]], None]
    update: Callable[[], None]


@attrs.frozen(eq=False)
class RankContext:
    """What the actions of a rank act on in one step.

    Attributes:
        stages: the rank's stages in this step.
        buffers: the gradients and weights of each stage.
        transport: what carries messages.
        heartbeat: where the rank notes what it does.
        releases: which tensors the stages free after which action.
        end: how the step ends; None in a forward-only program, which has no such actions.
    """

    stages: Mapping[Stage, StageStep]
    buffers: Mapping[Stage, StageBuffer]
    transport: Transport
    heartbeat: Heartbeat
    releases: Releases
    end: StepEnd | None = None


@attrs.frozen
class Timed:
    """An action with its begin and end: on an asynchronous device, when the device did it."""

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


Executor = Callable[[tuple[Action, ...], RankContext], tuple[Timed, ...]]
"""Runs a rank's program for one step and returns its timeline: `execute`, or a function around it."""


def busy_s(timeline: Iterable[Timed]) -> float:
    """Return how many seconds of a timeline were spent computing."""
    return sum(t.end_ns - t.begin_ns for t in timeline if isinstance(t.action, Compute)) / 1e9


def execute(actions: tuple[Action, ...], context: RankContext, *, first: int = 0) -> tuple[Timed, ...]:
    """Run one rank's program for one step and return its timeline.

    `actions` may be a part of the program: the part that begins with its action number `first`. An action begins where
    the one before it ended.
    """
    streams = context.transport.streams
    timeline: list[Timed] = []
    end = streams.mark()
    for index, action in enumerate(actions, first):
        begin = end
        context.heartbeat.begin_action(index, action)
        _act(action, context)
        for held in context.releases.get(action, ()):
            context.stages[held.stage].release(held)
        end = streams.mark()
        timeline.append(Timed(action, begin, end))
    return tuple(timeline)


def _act(action: Action, context: RankContext) -> None:
    stages, transport = context.stages, context.transport
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
        case Reduce() | WaitReduce() | Gather() | WaitGather() | Tie():
            _exchange(action, context)
        case Norm():
            assert context.end is not None
            context.end.agree(stages.values())
        case Update():
            assert context.end is not None
            context.end.update()


def _exchange(action: Reduce | WaitReduce | Gather | WaitGather | Tie, context: RankContext) -> None:
    buffer = context.buffers[action.stage]
    match action:
        case Reduce(bucket=bucket):
            buffer.buffers[bucket].reduce()
        case WaitReduce(bucket=bucket):
            context.heartbeat.wait_for_others()
            buffer.buffers[bucket].wait()
        case Gather(bucket=bucket):
            buffer.buffers[bucket].gather()
        case WaitGather(bucket=bucket):
            context.heartbeat.wait_for_others()
            buffer.buffers[bucket].wait_for_weights()
        case Tie():
            context.heartbeat.wait_for_others()
            buffer.tie()
