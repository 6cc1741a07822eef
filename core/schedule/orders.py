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

A rank with several *chunks* of a module works on them as one *team*: through groups of as many microbatches as
the pipeline has ranks, chunk after chunk forwards, and in opposite order backwards, with one credit for the
forwards of all its chunks (interleaved 1F1B). Deeper modules make the first rank's credit grow by as much as
they need before they give anything back.

Stages that share ranks must agree on one order. A list scheduler walks all sequences in unit time, starts
what is ready in order of (microbatch, depth, name), and never runs two stages that share a rank at once. Its
result is one global order: whatever the ranks do in it is free of deadlock, because it has been done once
here.

Sources: PipeDream and Narayanan et al. 2021 (arXiv 2104.04473) for 1F1B and its interleaving; GPipe (arXiv
1811.06965).
"""

import functools
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.routes import overlapping
from mimogrid.core.schedule.actions import Compute, Direction, Kind
from mimogrid.core.topology import Link, Stage, Topology


Team = tuple[Stage, ...]
"""The stages of one module on the same ranks, in order of depth: one, or one per chunk."""


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
    sequences, credit = _sequences(topology, backward)
    actions = _list_schedule(topology, sequences, credit, backward, gradients)
    return Order(training, tuple(actions), backward, gradients)


def credits_of(topology: Topology) -> Mapping[Stage, int]:
    """Return how many microbatches of its own each stage may have in flight, or its outputs waiting."""
    return _sequences(topology, frozenset(s for s, info in topology.stages.items() if info.backward))[1]


def _sequences(
    topology: Topology, backward: frozenset[Stage]
) -> tuple[dict[Team, tuple[Compute, ...]], dict[Stage, int]]:
    """Return what each team does, and the credit of each stage, module by module from the loss on."""
    credit: dict[Stage, int] = {}
    sequences: dict[Team, tuple[Compute, ...]] = {}
    for name in reversed(topology.graph.order):
        for team in teams_of(topology, name):
            sequences[team] = tuple(team_sequence(topology, team, credit, backward=backward))
        team_of = {stage: team for team in sequences for stage in team}
        for info in reversed(topology.modules[name].stages):
            stage = info.stage
            flying = most_in_flight(stage, sequences[team_of[stage]])
            credit[stage] = flying if stage in backward else _below(topology, stage, credit) + 1
    return sequences, credit


def teams_of(topology: Topology, module: str) -> tuple[Team, ...]:
    """Return the stages of a module, those on the same ranks together."""
    teams: dict[int, list[Stage]] = {}
    for info in topology.modules[module].stages:
        teams.setdefault(info.stage.pp, []).append(info.stage)
    return tuple(map(tuple, teams.values()))


def team_sequence(
    topology: Topology, team: Team, credit: Mapping[Stage, int], *, backward: frozenset[Stage]
) -> Iterator[Compute]:
    """Yield what a team does in order, given the credits of the modules nearer to the loss.

    Where the first chunks train nothing, the others alone go backwards.
    """
    trained = tuple(stage for stage in team if stage in backward)
    module = topology.modules[team[0].module]
    pipeline = module.grid.extent("pp")
    group = pipeline if len(team) > 1 else module.microbatches
    forwards = list(_in_groups(Kind.FORWARD, team, group, module.microbatches))
    backwards = list(_in_groups(Kind.BACKWARD, trained[::-1], group, module.microbatches))
    if topology.spec.schedule.name == "gpipe" or not trained:
        yield from (*forwards, *backwards)
        return
    ahead, most = 0, _credit(topology, team, credit, forwards, backwards)
    while forwards or backwards:
        goes_forward = bool(forwards) and (ahead < most or not backwards)
        yield (forwards if goes_forward else backwards).pop(0)
        ahead += 1 if goes_forward else -1


def _in_groups(kind: Kind, chunks: Team, group: int, microbatches: int) -> Iterator[Compute]:
    """Yield one action per chunk and microbatch: a group of microbatches through all chunks, then the next."""
    for first in range(0, microbatches, group):
        for stage in chunks:
            for microbatch in range(first, min(first + group, microbatches)):
                yield Compute(kind, stage, microbatch)


def _credit(
    topology: Topology,
    team: Team,
    credit: Mapping[Stage, int],
    forwards: list[Compute],
    backwards: list[Compute],
) -> int:
    """Return how many forwards a team may be ahead of its backwards.

    Before its last chunk goes back on a microbatch, it must have gone forward on as many more as the modules
    below may have in flight; the teams before the last of the pipeline add what lies between.
    """
    last = topology.modules[team[0].module].stages[-1].stage
    below = _below(topology, last, credit)
    forward = [i for i, action in enumerate(forwards) if action.stage.chunk == last.chunk]
    backward = [i for i, action in enumerate(backwards) if action.stage.chunk == last.chunk]
    furthest = len(forward) - 1
    ahead = max(forward[min(j + below, furthest)] + 1 - i for j, i in enumerate(backward))
    between = last.pp - team[0].pp
    return ahead + (between if len(team) == 1 else 2 * between)


def most_in_flight(stage: Stage, sequence: Iterable[Compute]) -> int:
    """Return how many microbatches of a stage are in flight at most, from forward to backward."""
    flying = most = 0
    for action in sequence:
        if action.stage == stage:
            flying += 1 if action.kind is Kind.FORWARD else -1
            most = max(most, flying)
    return most


def _below(topology: Topology, stage: Stage, credit: Mapping[Stage, int]) -> int:
    """Return how many microbatches of a stage cover what the stages that it feeds may have in flight."""
    size = topology.samples_per_microbatch
    needs = (
        math.ceil(credit[link.target] * size[link.target.module] / size[stage.module])
        for link in topology.links_from(stage)
    )
    return max(needs, default=0)


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
    sequences: Mapping[Team, tuple[Compute, ...]],
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
    busy_until = dict.fromkeys(topology.stages, 0)
    team_of = {stage: team for team in sequences for stage in team}
    now = 0
    while waiting := [team for team in sequences if position[team] < len(sequences[team])]:
        heads = [sequences[team][position[team]] for team in waiting]
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
                position[team_of[stage]] += 1
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
