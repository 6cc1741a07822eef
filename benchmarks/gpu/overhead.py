"""Overhead: what the messages of four ranks cost, through host memory.

In a step, what a rank spends on messages cannot be told from what it spends on waiting for others: who waits for a
message also waits for it to be computed, and who stages one first waits until its rows are. So the messages are timed
*alone*: the very program of the step, with the same messages of the same sizes in the same order, by the same
executor and transport, where networks compute nothing and gradients are not summed. All that is left is staging,
posting, what the host carries from process to process, and the chain of who can send only when who has received.

    messages_alone_s           how long that takes, from a moment when all ranks were there to when the last is done
    messages_alone_of_step     the same as a part of the step with its computing: the most that messages can make
                               of it, were nothing of them hidden behind computing
    post_us_per_message        the time of the host in SEND, per message: staging and posting, with nothing to wait for

And by rank, of the step itself, as the executor sees it on the host:

    posting_s                  in SEND and RECV; through host memory this holds waiting for what is sent to be computed
    waiting_s                  in WAIT, for messages to come or to have gone; this holds idling in the pipeline
    computing_s                in forwards and backwards; on a GPU that is asking for them, not what they take

Bytes and messages are those of a step, of all ranks, each counted where it is sent. Medians over steps.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from alone import Idle
from bench import WARM_UP, Bench, open_bench, peak_bytes, slowest
from mimogrid.core.schedule.actions import Action, Compute, Recv, Send, Wait
from mimogrid.core.step.routes import Message
from mimogrid.core.topology.topology import Stage
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.exchange import gather_objects
from mimogrid.shell.runtime.execute import RankContext, Timed, execute
from mimogrid.shell.runtime.stage import StageStep
from workload import Options


Payload = list[tuple[Message, torch.Tensor]]
SPENT = {"posting_s": (Send, Recv), "waiting_s": (Wait,), "computing_s": (Compute,)}


@attrs.frozen
class Seen:
    """What one rank has seen: of the step with its computing (`timelines`), and of its messages alone."""

    by_rank: Mapping[str, Any]
    messages: int
    bytes: int
    posting_s: float


def in_world(place: RankPlace, job: Job, options: Options) -> dict[str, Any] | None:
    """Measure on one of four ranks; the first tells."""
    with open_bench(place, job, options) as bench:
        times, of_step = steps_of(bench, options.steps)
        alone = Alone(bench, options.steps)
        bench.train(update=False, executor=alone)
        step_s, alone_s = (statistics.median(slowest(bench, mine)) for mine in (times, alone.times))
        mine = {"rank": place.rank, "stages": [str(stage) for stage in bench.runtime.stages], **of_step}
        every = gather_objects(bench.runtime, Seen(mine, alone.messages, alone.bytes, alone.posting_s))
    if not every:
        return None
    messages = sum(seen.messages for seen in every)
    return {
        "step_s": step_s,
        "messages": messages,
        "bytes": sum(seen.bytes for seen in every),
        "messages_alone_s": alone_s,
        "messages_alone_of_step": alone_s / step_s,
        "post_us_per_message": 1e6 * sum(seen.posting_s for seen in every) / messages,
        "by_rank": [seen.by_rank for seen in every],
    }


def steps_of(bench: Bench, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Return how long each of some steps took, and where this rank spent its time, and its most memory."""
    for _ in range(WARM_UP):
        bench.train()
    peak_bytes(bench.device)
    timelines: list[tuple[Timed, ...]] = []
    times = [bench.seconds(lambda: timelines.append(bench.train().timeline)) for _ in range(steps)]
    spent = {name: statistics.median(_in(kinds, t) for t in timelines) for name, kinds in SPENT.items()}
    return times, {**spent, "peak_bytes": peak_bytes(bench.device)}


def _in(kinds: tuple[type, ...], timeline: tuple[Timed, ...]) -> float:
    return sum(t.end_ns - t.begin_ns for t in timeline if isinstance(t.action, kinds)) / 1e9


class Recorded:
    """A stage at work, and what it has sent."""

    def __init__(self, stage: StageStep) -> None:
        self._stage = stage
        self.sent: dict[Send, Payload] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def payload(self, send: Send) -> Payload:
        """Return what the stage does."""
        self.sent[send] = self._stage.payload(send)
        return self.sent[send]


class Hollow(Idle):
    """A stage that computes nothing: it sends what was recorded, and forgets what comes."""

    def __init__(self, recorded: Recorded) -> None:
        self.payload, self.shapes, self.dtype = recorded.sent.get, recorded.shapes, recorded.dtype


class Alone:
    """Runs a step, and then its messages alone, some times over."""

    def __init__(self, bench: Bench, repeats: int) -> None:
        self._bench = bench
        self._repeats = repeats
        self.times: list[float] = []
        self.posting_s = 0.0
        self.messages = self.bytes = 0

    def __call__(self, actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
        """Run; return the timeline of the step."""
        recorded: Any = {name: Recorded(stage) for name, stage in context.stages.items()}
        timeline = execute(actions, attrs.evolve(context, stages=recorded))
        hollow: Any = {name: Hollow(stage) for name, stage in recorded.items()}
        idle: Any = Idle(context.transport.streams)
        alone = attrs.evolve(
            context, stages=hollow, buffers=dict.fromkeys(hollow, idle), releases={}, end=idle
        )
        timelines: list[tuple[Timed, ...]] = []

        def messages_alone() -> None:
            timelines.append(execute(actions, alone))

        for _ in range(WARM_UP):
            messages_alone()
        timelines.clear()
        self.times = [self._bench.seconds(messages_alone) for _ in range(self._repeats)]
        self.posting_s = statistics.median(_in((Send,), one) for one in timelines)
        self._count(recorded)
        return timeline

    def _count(self, recorded: Mapping[Stage, Recorded]) -> None:
        for stage in recorded.values():
            for message, tensor in (one for payload in stage.sent.values() for one in payload):
                if message.rank_source != message.rank_target:
                    self.messages += 1
                    self.bytes += tensor.numel() * tensor.element_size()
