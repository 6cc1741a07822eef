"""Orders: in which sequence each stage works through its microbatches.

A stage's sequence needs no clock: with a *credit* of c microbatches it runs forwards until c are in flight,
and from then on a backward before each further forward. A credit of all microbatches is GPipe. A credit equal
to the stage's depth, its distance to the loss along the deepest path, is 1F1B over any module graph:

    depth 3 |  F0 F1 F2 B0 F3 B1 B2 B3
    depth 2 |  F0 F1 B0 F2 B1 F3 B2 B3
    depth 1 |  F0 B0 F1 B1 F2 B2 F3 B3

(Measured from the sources instead, encoders of unequal depth run too far ahead and deadlock.) Depth counts
samples, so it holds for modules with microbatches of their own. A stage without backward keeps its outputs
until they are consumed, and its credit bounds that queue.

Stages that share ranks must agree on one order. A list scheduler walks all sequences in unit time, starts
what is ready in order of (microbatch, depth, name), and never runs two stages that share a rank at once. Its
result is one global order: whatever the ranks do in it is free of deadlock, because it has been done once
here.

Sources: PipeDream and Narayanan et al. 2021 (arXiv 2104.04473) for 1F1B; GPipe (arXiv 1811.06965).
"""

import functools
import heapq
import math
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.routes import overlapping
from mimogrid.core.schedule.actions import Compute, Direction, Kind
from mimogrid.core.topology import Link, Stage, Topology


@attrs.frozen(eq=False)
class Order:
    """The compute actions of a step in one global order.

    `backward` holds the stages that run a backward, those with something to train here or upstream;
    `gradients` the links on which gradients flow back. An order that is not for `training` runs forwards
    only: both are empty, and answers take the place of losses.
    """

    training: bool
    actions: tuple[Compute, ...]
    backward: frozenset[Stage]
    gradients: frozenset[Link]

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
        return tuple(action for action in self.actions if action.stage == stage)


def order_of(topology: Topology, *, training: bool = True) -> Order:
    """Return the order that the job's schedule names; without `training`, forwards only."""
    stages = topology.stages
    backward = frozenset(s for s, info in stages.items() if training and info.backward)
    gradients = frozenset(
        link for link in topology.links if training and stages[link.source].trains_up_to(link)
    )
    credit = credits_of(topology)
    sequences = {
        stage: tuple(
            stage_sequence(
                stage,
                microbatches=topology.modules[stage.module].microbatches,
                credit=credit[stage],
                backward=stage in backward,
            )
        )
        for stage in stages
    }
    actions = _list_schedule(topology, sequences, credit, backward, gradients)
    return Order(training, tuple(actions), backward, gradients)


def stage_sequence(stage: Stage, *, microbatches: int, credit: int, backward: bool) -> Iterator[Compute]:
    """Yield a stage's actions: forwards while fewer than `credit` are in flight, else a backward."""
    forwards = backwards = 0
    while forwards < microbatches or (backward and backwards < microbatches):
        if forwards < microbatches and (not backward or forwards - backwards < credit):
            yield Compute(Kind.FORWARD, stage, forwards)
            forwards += 1
        else:
            yield Compute(Kind.BACKWARD, stage, backwards)
            backwards += 1


def credits_of(topology: Topology) -> Mapping[Stage, int]:
    """Return how many microbatches of its own each stage may have in flight."""
    modules = topology.modules
    if topology.spec.schedule.name == "gpipe":
        return {stage: modules[stage.module].microbatches for stage in topology.stages}
    total = topology.spec.batch.global_size
    size = {stage: total // modules[stage.module].microbatches for stage in topology.stages}
    in_flight: dict[Stage, int] = {}
    for stage in sorted(topology.stages, key=lambda stage: topology.stages[stage].depth):
        below = max((in_flight[link.target] for link in topology.links_from(stage)), default=0)
        in_flight[stage] = math.ceil(below / size[stage]) * size[stage] + size[stage]
    return {stage: samples // size[stage] for stage, samples in in_flight.items()}


def dependencies(topology: Topology, action: Compute, gradients: frozenset[Link]) -> Iterator[Compute]:
    """Yield the compute actions whose results an action needs."""
    count = {name: module.microbatches for name, module in topology.modules.items()}
    own = count[action.stage.module]
    if action.kind is Kind.FORWARD:
        for link in topology.links_into(action.stage):
            for k in overlapping(action.microbatch, own, count[link.source.module]):
                yield Compute(Kind.FORWARD, link.source, k)
        return
    yield Compute(Kind.FORWARD, action.stage, action.microbatch)
    for link in topology.links_from(action.stage):
        if link in gradients:
            for k in overlapping(action.microbatch, own, count[link.target.module]):
                yield Compute(Kind.BACKWARD, link.target, k)


def _list_schedule(
    topology: Topology,
    sequences: Mapping[Stage, tuple[Compute, ...]],
    credit: Mapping[Stage, int],
    backward: frozenset[Stage],
    gradients: frozenset[Link],
) -> Iterator[Compute]:
    """Walk all sequences in unit time and yield the actions as they start."""
    rivals = _rivals(topology)
    duration = _durations(topology)
    rank_of = {s: (info.depth, s.module, s.pp) for s, info in topology.stages.items()}
    position = dict.fromkeys(sequences, 0)
    finished: dict[Compute, int] = {}
    running: list[int] = []
    busy_until = dict.fromkeys(sequences, 0)
    now = 0
    while waiting := [s for s in sequences if position[s] < len(sequences[s])]:
        heads = [sequences[s][position[s]] for s in waiting]
        heads.sort(key=lambda a: (a.microbatch * duration[a.stage], rank_of[a.stage]))
        for action in heads:
            stage = action.stage
            free = all(busy_until[rival] <= now for rival in rivals[stage])
            needs = (
                *dependencies(topology, action, gradients),
                *_room(topology, action, credit, backward),
            )
            if free and all(finished.get(need, now + 1) <= now for need in needs):
                scale = 1 if action.kind is Kind.FORWARD else 2
                busy_until[stage] = finished[action] = now + scale * duration[stage]
                heapq.heappush(running, finished[action])
                position[stage] += 1
                yield action
        assert running, f"the order is stuck before {', '.join(map(str, heads))}"
        now = heapq.heappop(running)
        while running and running[0] == now:
            heapq.heappop(running)


def _room(
    topology: Topology,
    action: Compute,
    credit: Mapping[Stage, int],
    backward: frozenset[Stage],
) -> Iterator[Compute]:
    """Yield what must have consumed earlier outputs of a stage that has no backward to free them."""
    freed = action.microbatch - credit[action.stage]
    if action.stage in backward or freed < 0:
        return
    own = topology.modules[action.stage.module].microbatches
    for link in topology.links_from(action.stage):
        for k in overlapping(freed, own, topology.modules[link.target.module].microbatches):
            yield Compute(Kind.FORWARD, link.target, k)


def _rivals(topology: Topology) -> Mapping[Stage, tuple[Stage, ...]]:
    """Which stages cannot run beside each stage, itself included, because they share a rank."""
    ranks = {
        stage: frozenset(
            rank
            for lane in range(topology.modules[stage.module].lanes)
            for rank in topology.modules[stage.module].holders(stage, lane)
        )
        for stage in topology.stages
    }
    return {a: tuple(b for b in ranks if not ranks[a].isdisjoint(ranks[b])) for a in ranks}


def _durations(topology: Topology) -> Mapping[Stage, int]:
    """Time units of one forward: a microbatch of twice the samples takes twice as long."""
    counts = {stage: topology.modules[stage.module].microbatches for stage in topology.stages}
    common = math.lcm(*counts.values())
    return {stage: common // count for stage, count in counts.items()}
