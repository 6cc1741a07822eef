"""Orders: in which sequence the stages work through their microbatches.

One list scheduler makes all of them (`scheduler`); an order's name stands for a `IssuePolicy`, which says how far
forwards may run ahead and whether backwards are split. With a *limit in flight* of c microbatches a stage runs
forwards until c are in flight, and from then on a backward before each further forward. A limit in flight of all
microbatches is GPipe. A limit in flight equal to the stage's depth, its distance to the loss along the deepest path, is
1F1B over any module graph:

    depth 3 |  F0 F1 F2 B0 F3 B1 B2 B3
    depth 2 |  F0 F1 B0 F2 B1 F3 B2 B3
    depth 1 |  F0 B0 F1 B1 F2 B2 F3 B3

(Measured from the sources instead, encoders of unequal depth run too far ahead and deadlock.) Depth counts
samples, so it holds for modules with microbatches of their own. A stage without backward keeps its outputs
until they are consumed, and its limit in flight bounds that queue.

A rank with several *chunks* of a module works on them as one pipeline rank: through groups of as many microbatches as
the pipeline has ranks, chunk after chunk forwards, and in opposite order backwards, with one limit in flight for the
forwards of all its chunks (interleaved 1F1B). Deeper modules make the first rank's limit in flight grow by as much as
they need before they give anything back.

With backwards split, weight gradients fill the gaps (zero bubble). ZB-H1 keeps the limits in flight of 1F1B, and so
its memory; ZB-H2 lets every stage run two microbatches ahead of the next one.

Stages that share ranks agree on one order because the scheduler never runs two of them at once. Its result is
one global order: whatever the ranks do in it is free of deadlock, because it has been done once.

Sources: PipeDream and Narayanan et al. 2021 (arXiv 2104.04473) for 1F1B and its interleaving; GPipe (arXiv
1811.06965); zero bubble (arXiv 2401.10241).
"""

import functools
from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.schedules import AUTO
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.schedule.actions import Compute, Direction, Kind
from mimogrid.core.schedule.issue_policy import ISSUE_POLICIES, IssuePolicy, IssueQueues, issue_queues_of
from mimogrid.core.schedule.scheduler import TimedWork, schedule
from mimogrid.core.schedule.tuning import GB, bytes_needed, tuned
from mimogrid.core.schedule.work import Work, unit_seconds, work_of
from mimogrid.core.topology.topology import Link, Stage, Topology


@attrs.frozen(eq=False)
class Order:
    """The compute actions of a step in one global order.

    Attributes:
        training: it is not for training if it runs forwards only; then answers take the place of losses.
        actions: in the order in which they may start.
        backward: the stages that run a backward, those with something to train here or upstream.
        split: those of them that run it in two halves.
        gradients: the links on which gradients flow back.
        limits in flight: how many microbatches of its own each stage has in flight at most, or, without backward, may
            have waiting for those that read them.
    """

    training: bool
    actions: tuple[Compute, ...]
    backward: frozenset[Stage]
    split: frozenset[Stage]
    gradients: frozenset[Link]
    max_in_flight: Mapping[Stage, int]

    @functools.cached_property
    def index(self) -> Mapping[Compute, int]:
        """Where in the order each action starts."""
        return {action: i for i, action in enumerate(self.actions)}

    @functools.cached_property
    def starts(self) -> Mapping[tuple[Stage, Direction], tuple[int, ...]]:
        """Where each stage's forwards, and what gives the gradients of its inputs, start, by microbatch."""
        kinds = {
            Kind.FORWARD: Direction.FORWARD,
            Kind.BACKWARD: Direction.BACKWARD,
            Kind.INPUT_GRADIENT: Direction.BACKWARD,
        }
        starts: dict[tuple[Stage, Direction], dict[int, int]] = {}
        for action, i in self.index.items():
            if action.kind in kinds:
                starts.setdefault((action.stage, kinds[action.kind]), {})[action.microbatch] = i
        return {key: tuple(places[k] for k in range(len(places))) for key, places in starts.items()}

    def of(self, stage: Stage) -> tuple[Compute, ...]:
        """Return what a stage does, in order."""
        return self._by_stage.get(stage, ())

    @functools.cached_property
    def _by_stage(self) -> Mapping[Stage, tuple[Compute, ...]]:
        found: dict[Stage, list[Compute]] = {}
        for action in self.actions:
            found.setdefault(action.stage, []).append(action)
        return {stage: tuple(actions) for stage, actions in found.items()}


def order_of(topology: Topology, *, training: bool = True) -> Order:
    """Return the order that the job's schedule names; without `training`, forwards only.

    Raises PlanError where training needs more than `schedule.memory_gb`.
    """
    name = topology.spec.schedule.name
    if name == AUTO and training:
        best = tuned(topology)
        order = _order(best.timed.work, best.order, best.queues, training=True)
    else:
        policy = ISSUE_POLICIES.get(name, IssuePolicy())
        work = work_of(topology, training=training, splits=policy.splits)
        queues = issue_queues_of(work, policy)
        done = schedule(TimedWork(work, unit_seconds(work)), queues.pp_ranks)
        order = _order(work, done, queues, training=training)
    if training:
        _check_memory(order, topology)
    return order


def _order(work: Work, order: Sequence[int], queues: IssueQueues, *, training: bool) -> Order:
    return Order(
        training=training,
        actions=tuple(work.actions[i] for i in order),
        backward=work.backward,
        split=work.split,
        gradients=work.gradients,
        max_in_flight={**queues.unread_outputs, **work.in_flight(order)},
    )


def _check_memory(order: Order, topology: Topology) -> None:
    cap, name = topology.spec.schedule.memory_gb, topology.spec.schedule.name
    if cap is None:
        return
    needed = bytes_needed(topology, order.max_in_flight, order.split)
    rank = max(needed, key=needed.__getitem__)
    if needed[rank] <= cap * GB:
        return
    stages = [info.stage for info in topology.role(rank).stages]
    flying = ", ".join(f"{order.max_in_flight[s]} of {s}" for s in stages if s in order.backward)
    always = kept(topology, rank).bytes / GB
    fact = (
        f"{name} needs {needed[rank] / GB:.3g} GB on rank {rank}: {always:.3g} GB for weights, gradients and "
        f"optimizer, the rest for microbatches in flight ({flying or 'none'}); the cap is {cap:g} GB."
    )
    other = "" if name == AUTO else f" Or use {AUTO}, which looks for an order that fits."
    remedy = f"Use smaller microbatches, recompute, or more tp, pp or ranks.{other}"
    raise PlanError([Problem("schedule.memory_gb", fact, remedy)])
