"""Lines: what a rule for orders comes to, pipeline rank by pipeline rank: sequences and limits in flight.

A stage may have as many microbatches in flight as the stages that it feeds, and `in_flight_increment` more: counted
from the loss on, over the deepest path, in samples where microbatches differ. So no stage waits for a backward that
the stages below could give only after more forwards than it will send them.

The ranks of a pipeline with several chunks go through groups of microbatches: all of a group on the first
chunk, then on the next one. Before the last chunk goes back on a microbatch, it must have gone forward on as
many more as the modules below may have in flight; that, counted in forwards of all chunks, is the limit in flight of
the last rank, and each rank before it has two more.
"""

import math
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.base.samples import overlapping
from mimogrid.core.job.schedules import GPIPE, INTERLEAVED, ONE_F_ONE_B, SPLITS_BACKWARD, ZB_H1, ZB_H2
from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.scheduler import IssueQueue
from mimogrid.core.schedule.work import VirtualStages, Work
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class IssuePolicy:
    """What makes an order.

    Attributes:
        all_forwards_first: no backward before the last forward.
        splits: backwards are split where they can be.
        lead: how many more microbatches than the next stage a stage may have in flight.
        extra: further forwards ahead, by the first stage of a pipeline rank; the stages before it get as many more.
        limit: a stage has no more of the job's microbatches in flight, unless those that it feeds need more.
    """

    all_forwards_first: bool = False
    splits: bool = False
    in_flight_increment: int = 1
    extra_in_flight: Mapping[Stage, int] = attrs.field(factory=dict[Stage, int])
    limit: float = math.inf


ISSUE_POLICIES: Mapping[str, IssuePolicy] = {
    ONE_F_ONE_B: IssuePolicy(),
    INTERLEAVED: IssuePolicy(),
    ZB_H1: IssuePolicy(splits=SPLITS_BACKWARD[ZB_H1]),
    ZB_H2: IssuePolicy(splits=SPLITS_BACKWARD[ZB_H2], in_flight_increment=2),
    GPIPE: IssuePolicy(all_forwards_first=True),
}
"""The orders that have names. Interleaved is 1F1B: what interleaves is that ranks have several chunks."""


@attrs.frozen
class IssueQueues:
    """The issue queues of all pipeline ranks, and how many unread outputs a stage without backward may keep.

    Attributes:
        pipeline ranks: the lines.
        queues: how many microbatches such a stage may have waiting for those that read them.
    """

    pp_ranks: tuple[IssueQueue, ...]
    unread_outputs: Mapping[Stage, int]


def issue_queues_of(work: Work, policy: IssuePolicy) -> IssueQueues:
    """Return what a rule comes to for some work, module by module from the loss on."""
    max_in_flight: dict[Stage, int] = {}
    queues: dict[VirtualStages, IssueQueue] = {}
    for name in reversed(work.topology.graph.order):
        forwards_ahead = 0
        trained: list[VirtualStages] = []
        for virtual_stages in reversed(
            [virtual_stages for virtual_stages in work.pp_ranks if virtual_stages[0].module == name]
        ):
            queue = IssueQueue(work.sequences[work.pp_ranks.index(virtual_stages)])
            if queue.sequences.backwards:
                forwards_ahead = _forwards_ahead(
                    work,
                    virtual_stages,
                    queue,
                    policy,
                    max_in_flight=max_in_flight,
                    next_forwards_ahead=forwards_ahead,
                )
                queue = attrs.evolve(
                    queue, max_in_flight=math.inf if policy.all_forwards_first else forwards_ahead
                )
                max_in_flight |= _in_flight_limits(work, virtual_stages, queue, forwards_ahead)
                trained.append(virtual_stages)
            queues[virtual_stages] = queue
        for virtual_stages in trained:
            queues[virtual_stages] = attrs.evolve(
                queues[virtual_stages],
                weight_grad_backlog=max(0, forwards_ahead - queues[virtual_stages].max_in_flight),
            )
        for info in reversed(work.topology.modules[name].stages):
            if info.stage not in work.backward:
                max_in_flight[info.stage] = (
                    _below(work, info.stage, max_in_flight) + 1 + policy.extra_in_flight.get(info.stage, 0)
                )
    unread_outputs = {stage: most for stage, most in max_in_flight.items() if stage not in work.backward}
    return IssueQueues(
        tuple(
            attrs.evolve(queues[t], backpressure=_backpressure(work, t, unread_outputs))
            for t in work.pp_ranks
        ),
        unread_outputs,
    )


def _in_flight_limits(
    work: Work, virtual_stages: VirtualStages, queue: IssueQueue, forwards_ahead: int
) -> dict[Stage, int]:
    """Return how many microbatches each stage of a pipeline rank has in flight before it gives anything back."""
    if len(virtual_stages) == 1:
        return {
            virtual_stages[0]: min(forwards_ahead, work.count(virtual_stages[0]))
            if queue.max_in_flight == forwards_ahead
            else work.count(virtual_stages[0])
        }
    return work.in_flight(_strict(work, queue))


def _forwards_ahead(
    work: Work,
    virtual_stages: VirtualStages,
    queue: IssueQueue,
    policy: IssuePolicy,
    *,
    max_in_flight: Mapping[Stage, int],
    next_forwards_ahead: int,
) -> int:
    """Return how many forwards may run ahead of the backwards, given the next pipeline rank's number, if any.

    Ranks with chunks wait for each other both ways round. So there what comes on top is the same for all of
    them, and only the last one's counts.
    """
    first, interleaves = virtual_stages[0], len(virtual_stages) > 1
    if next_forwards_ahead and interleaves:
        return next_forwards_ahead + 2
    if next_forwards_ahead:
        forwards_ahead = next_forwards_ahead + policy.in_flight_increment
    else:
        forwards_ahead = _turned_around(work, virtual_stages, queue, max_in_flight) + (
            policy.in_flight_increment - 1 if max_in_flight else 0
        )
    forwards_ahead += policy.extra_in_flight.get(first, 0)
    if interleaves or policy.limit == math.inf:
        return forwards_ahead
    topology = work.topology
    samples = policy.limit * topology.spec.batch.global_size // topology.spec.batch.microbatches
    least = max(1, _bound_to(work, first, max_in_flight))
    return max(least, min(forwards_ahead, int(samples // topology.samples_per_microbatch[first.module])))


def _turned_around(
    work: Work, virtual_stages: VirtualStages, queue: IssueQueue, max_in_flight: Mapping[Stage, int]
) -> int:
    """Return how many forwards the last pipeline rank of a module does before what they make comes back."""
    last = virtual_stages[-1]
    below = _below(work, last, max_in_flight)
    forward = [i for i, action in enumerate(queue.sequences.forwards) if work.actions[action].stage == last]
    backward = [i for i, action in enumerate(queue.sequences.backwards) if work.actions[action].stage == last]
    furthest = len(forward) - 1
    return max(forward[min(j + below, furthest)] + 1 - i for j, i in enumerate(backward))


def _below(work: Work, stage: Stage, max_in_flight: Mapping[Stage, int]) -> int:
    """Return how many microbatches of a stage cover what the stages that it feeds may have in flight."""
    size = work.topology.samples_per_microbatch
    needs = (
        math.ceil(max_in_flight[link.target] * size[link.target.module] / size[stage.module])
        for link in work.topology.links_from(stage)
    )
    return max(needs, default=0)


def _bound_to(work: Work, stage: Stage, max_in_flight: Mapping[Stage, int]) -> int:
    """Return with how many microbatches in flight a stage gets all its gradients back; with fewer it is stuck.

    A stage that it feeds gives the last gradient of a microbatch back only when it is `max_in_flight` forwards
    further. What these read may lie in one microbatch more than would hold as many samples: the window need not
    begin where one does.
    """
    least = 0
    for link in work.topology.links_from(stage):
        own, theirs = work.count(stage), work.count(link.target)
        for k in range(own):
            last = overlapping(k, own, theirs)[-1]
            furthest = min(last + max_in_flight[link.target], theirs) - 1
            least = max(least, overlapping(furthest, theirs, own)[-1] + 1 - k)
    return least


def _strict(work: Work, queue: IssueQueue) -> Iterator[int]:
    """Yield forwards up to the limit in flight, then a backward (with its weight gradient) before each forward."""
    forwards, backwards, forwards_ahead = (
        list(queue.sequences.forwards)[::-1],
        list(queue.sequences.backwards)[::-1],
        0,
    )
    while forwards or backwards:
        goes_on = bool(forwards) and (forwards_ahead < queue.max_in_flight or not backwards)
        action = (forwards if goes_on else backwards).pop()
        yield action
        stage = work.actions[action].stage
        if not goes_on and stage in work.split:
            yield work.number(Kind.WEIGHT_GRADIENT, stage, work.actions[action].microbatch)
        forwards_ahead += stage in work.backward if goes_on else -1


def _backpressure(
    work: Work, virtual_stages: VirtualStages, unread_outputs: Mapping[Stage, int]
) -> Mapping[int, tuple[int, ...]]:
    """Return, per forward of the stages with a queue, the forwards that must have read earlier outputs."""
    return {
        work.number(Kind.FORWARD, stage, k): tuple(work.read_by(stage, k - unread_outputs[stage]))
        for stage in virtual_stages
        if stage in unread_outputs
        for k in range(unread_outputs[stage], work.count(stage))
    }
