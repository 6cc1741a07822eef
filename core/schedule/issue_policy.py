"""Issue policies: how many microbatches each stage may have in flight under a schedule.

A policy sets a few numbers; `issue_queues_of` turns them into one issue queue for each pipeline rank, which the
scheduler works through. Limits are derived from the loss upstream, module by module.

A stage may have as many microbatches in flight as the stages that it feeds, plus `in_flight_increment`. Over a chain
that is the stage's depth; over a graph the deepest path counts, and limits are compared in samples if modules have
microbatches of different sizes. With fewer, a stage would wait for a backward that the stages behind it can run only
after more forwards than it may send.

A pipeline rank with several virtual stages has one limit, on the forwards of all of them. Before the last virtual
stage runs the backward of a microbatch, it must have run the forwards of as many more as the modules behind it may
have in flight. The number of forwards up to there is the limit of the last pipeline rank. Each pipeline rank
before it has two more: one for the way of a microbatch to the next rank, one for the way of its gradients back.
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
    """The numbers that make an order.

    Attributes:
        all_forwards_first: No backward runs before the last forward.
        splits: Backwards are split in two where possible.
        in_flight_increment: How many more microbatches than the next stage a stage may have in flight.
        extra_in_flight: Further microbatches in flight, by the first stage of a pipeline rank. The pipeline ranks
            upstream get as many more.
        limit: The most microbatches of the job that a stage has in flight, unless the stages that it feeds need more.
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
"""The policies of the schedules with fixed limits. 1F1B becomes interleaved if pipeline ranks have virtual stages."""


@attrs.frozen
class IssueQueues:
    """The issue queues of a step.

    Attributes:
        by_pp_rank: One queue for each of `Work.pp_ranks`.
        unread_outputs: For each stage without backward, the most outputs that wait to be read.
    """

    by_pp_rank: tuple[IssueQueue, ...]
    unread_outputs: Mapping[Stage, int]


def issue_queues_of(work: Work, policy: IssuePolicy) -> IssueQueues:
    """Return the issue queues of a policy for some work."""
    limits, queues = _Limits(work, policy), dict[VirtualStages, IssueQueue]()
    for name in reversed(work.topology.graph.order):
        queues |= limits.module_queues(name)
    unread_outputs = {stage: most for stage, most in limits.found.items() if stage not in work.backward}
    return IssueQueues(
        tuple(
            attrs.evolve(queues[stages], backpressure=_backpressure(work, stages, unread_outputs))
            for stages in work.pp_ranks
        ),
        unread_outputs,
    )


class _Limits:
    """Derives limits, module by module from the loss upstream; `found` has those of the stages so far."""

    def __init__(self, work: Work, policy: IssuePolicy) -> None:
        self.work, self.policy = work, policy
        self.found: dict[Stage, int] = {}

    def module_queues(self, name: str) -> dict[VirtualStages, IssueQueue]:
        """Return the queues of a module's pipeline ranks, and note the limits of its stages."""
        work, queues = self.work, dict[VirtualStages, IssueQueue]()
        ahead = 0
        for stages in reversed([stages for stages in work.pp_ranks if stages[0].module == name]):
            queue = IssueQueue(work.sequences[work.pp_ranks.index(stages)])
            if queue.sequences.backwards:
                ahead = self._forwards_ahead(stages, queue, behind=ahead)
                limit = math.inf if self.policy.all_forwards_first else ahead
                queue = attrs.evolve(queue, max_in_flight=limit)
                self.found |= self._in_flight(stages, queue)
            queues[stages] = queue
        # The first pipeline rank runs furthest ahead. The others may put off as many weight gradients as they are
        # short of that, so all of them keep as much for microbatches.
        for stages, queue in queues.items():
            if queue.sequences.backwards:
                backlog = max(0, ahead - queue.max_in_flight)
                queues[stages] = attrs.evolve(queue, weight_grad_backlog=backlog)
        for info in reversed(work.topology.modules[name].stages):
            if info.stage not in work.backward:
                extra = self.policy.extra_in_flight.get(info.stage, 0)
                self.found[info.stage] = self._covering(info.stage) + 1 + extra
        return queues

    def _in_flight(self, stages: VirtualStages, queue: IssueQueue) -> dict[Stage, int]:
        """Return how many microbatches each virtual stage has in flight at most, if the queue is followed strictly."""
        if len(stages) == 1:
            return {stages[0]: int(min(queue.max_in_flight, self.work.count(stages[0])))}
        return self.work.in_flight(_followed(self.work, queue))

    def _forwards_ahead(self, stages: VirtualStages, queue: IssueQueue, *, behind: int) -> int:
        """Return how many forwards may run ahead of the backwards; `behind`: on the next pipeline rank, 0 if none.

        Virtual stages go round the pipeline ranks, so each of these waits for the others. Any extra is the same for
        all of them there, and only that of the last pipeline rank counts.
        """
        policy, interleaves = self.policy, len(stages) > 1
        if behind and interleaves:
            return behind + 2
        if behind:
            ahead = behind + policy.in_flight_increment
        else:
            ahead = self._until_first_gradient(stages, queue)
            ahead += policy.in_flight_increment - 1 if self.found else 0
        ahead += policy.extra_in_flight.get(stages[0], 0)
        if interleaves or policy.limit == math.inf:
            return ahead
        spec, size = self.work.topology.spec, self.work.topology.samples_per_microbatch
        samples = policy.limit * spec.batch.global_size // spec.batch.microbatches
        least = max(1, self._fewest(stages[0]))
        return max(least, min(ahead, int(samples // size[stages[0].module])))

    def _until_first_gradient(self, stages: VirtualStages, queue: IssueQueue) -> int:
        """Return how many forwards the last pipeline rank of a module runs before gradients come back to it."""
        last, actions = stages[-1], self.work.actions
        covering = self._covering(last)
        forward = [i for i, action in enumerate(queue.sequences.forwards) if actions[action].stage == last]
        backward = [i for i, action in enumerate(queue.sequences.backwards) if actions[action].stage == last]
        final = len(forward) - 1
        return max(forward[min(j + covering, final)] + 1 - i for j, i in enumerate(backward))

    def _covering(self, stage: Stage) -> int:
        """Return how many microbatches of a stage cover what the stages that it feeds may have in flight."""
        size = self.work.topology.samples_per_microbatch
        needs = (
            math.ceil(self.found[link.target] * size[link.target.module] / size[stage.module])
            for link in self.work.topology.links_from(stage)
        )
        return max(needs, default=0)

    def _fewest(self, stage: Stage) -> int:
        """Return the fewest microbatches in flight with which a stage gets all its gradients; fewer would deadlock.

        A stage that it feeds runs the backward of a microbatch only when it is `max_in_flight` forwards further. The
        inputs of these may lie in one microbatch more than the same number of samples would fill, because they need
        not start where one of this stage's microbatches does.
        """
        fewest = 0
        for link in self.work.topology.links_from(stage):
            own, theirs = self.work.count(stage), self.work.count(link.target)
            for k in range(own):
                last = overlapping(k, own, theirs)[-1]
                furthest = min(last + self.found[link.target], theirs) - 1
                fewest = max(fewest, overlapping(furthest, theirs, own)[-1] + 1 - k)
        return fewest


def _followed(work: Work, queue: IssueQueue) -> Iterator[int]:
    """Yield the actions of a queue: forwards up to the limit, then a backward (with W) before each forward."""
    forwards, backwards = list(queue.sequences.forwards)[::-1], list(queue.sequences.backwards)[::-1]
    ahead = 0
    while forwards or backwards:
        forward = bool(forwards) and (ahead < queue.max_in_flight or not backwards)
        action = (forwards if forward else backwards).pop()
        yield action
        stage = work.actions[action].stage
        if not forward and stage in work.split:
            yield work.number(Kind.WEIGHT_GRADIENT, stage, work.actions[action].microbatch)
        ahead += stage in work.backward if forward else -1


def _backpressure(
    work: Work, stages: VirtualStages, unread_outputs: Mapping[Stage, int]
) -> Mapping[int, tuple[int, ...]]:
    """Return, for forwards of stages without backward, the forwards that must have read an earlier output before."""
    return {
        work.number(Kind.FORWARD, stage, k): tuple(work.read_by(stage, k - unread_outputs[stage]))
        for stage in stages
        if stage in unread_outputs
        for k in range(unread_outputs[stage], work.count(stage))
    }
