"""Lockstep: a step timed by stages, where what holds of one lane holds of all.

Ranks that host the same stages form a *crew*. Where all samples are alike, so are the lanes, and the ranks of a crew
do the same at the same time, but for which of their peers they wait for. Here a crew goes on when the last of its
ranks could, which is what a step waits for in the end. So a thousand ranks are a few dozen crews, and nothing has to
be lowered: what a rank posts and waits for stands, in `lower`, at fixed places beside its compute actions.

    a receive    is posted when the compute action before the one that reads it is next
    a message    is carried once both ends have posted it, in turn with others on its way, and arrives a latency later
    a send       that no answer comes for is waited for before the next action after it has been read

A crew never waits for less than its ranks do, so the time is that of `simulate`, or more: more only where the ranks
of a crew have peers of different crews. Modules that share all of their ranks, or none, have no such crews.
"""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.costs import Costs
from mimogrid.core.routes import overlapping
from mimogrid.core.schedule import scheduler
from mimogrid.core.schedule.actions import Compute, Direction, Kind, Reduce
from mimogrid.core.schedule.lower import Program
from mimogrid.core.schedule.scheduler import TimedWork
from mimogrid.core.schedule.work import seconds_of, work_of
from mimogrid.core.topology import Link, Stage, Topology
from mimogrid.core.traffic import message_bytes


@attrs.frozen(eq=False)
class Beat:
    """A compute action of a crew."""

    action: Compute
    begin_s: float
    end_s: float


@attrs.frozen(eq=False)
class Lockstep:
    """A step timed by crews.

    Attributes:
        crews: the ranks of each, ascending; the first of each, too.
        beats: what each crew does when.
        step_s: when the last rank is through.
    """

    crews: tuple[tuple[int, ...], ...]
    beats: tuple[tuple[Beat, ...], ...]
    step_s: float

    @functools.cached_property
    def busy_s(self) -> tuple[float, ...]:
        """How long each rank of a crew computes."""
        return tuple(sum(beat.end_s - beat.begin_s for beat in beats) for beats in self.beats)


def crews_of(topology: Topology) -> tuple[tuple[int, ...], ...]:
    """Return the sets of ranks that host the same stages."""
    hosting: dict[int, list[tuple[str, int]]] = {}
    for module in topology.modules.values():
        for rank in module.grid.ranks:
            hosting.setdefault(rank, []).append((module.name, module.grid.position_along("pp", rank)))
    found: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for rank in sorted(hosting):
        found.setdefault(tuple(hosting[rank]), []).append(rank)
    return tuple(map(tuple, found.values()))


def lockstep(program: Program, costs: Costs) -> Lockstep:
    """Time a program of a step with like samples. `costs` know no limit on cores, and sending holds nobody up."""
    return _Walk(program, costs).run()


def limit_s(program: Program, costs: Costs, timed: Lockstep) -> float:
    """Return a time that no order of the same actions beats, from what stages need of each other and ranks have to do."""
    work = work_of(program.topology, training=program.order.training, splits=bool(program.order.split))
    seconds = tuple(seconds_of(action, costs) for action in work.actions)
    number = {action: i for i, action in enumerate(work.actions)}
    ways = scheduler.limit_s(TimedWork(work, seconds), [number[a] for a in program.order.actions])
    updates = (costs.of(stage).update for stage in program.topology.stages)
    return max(ways, *timed.busy_s) + max(updates, default=0.0)


_Way = tuple[int, float, float]
"""From which crew a message comes, how long it occupies its channel, and how long it takes to arrive after that."""
_Text = tuple[int, int, Direction]
"""A message of all ranks: the number of its link, the microbatch of the link's target, the direction."""


class _Walk:
    """The walk's state: until when crews work, when results were made, when channels are free."""

    def __init__(self, program: Program, costs: Costs) -> None:
        self.program, self.costs, self.topology = program, costs, program.topology
        self.crews = crews_of(self.topology)
        of_rank = {rank: i for i, ranks in enumerate(self.crews) for rank in ranks}
        self.hosts: dict[Stage, tuple[int, ...]] = {}
        for module in self.topology.modules.values():
            for info in module.stages:
                ranks = (r for lane in range(module.lanes) for r in module.holders(info.stage, lane))
                self.hosts[info.stage] = tuple(sorted({of_rank[rank] for rank in ranks}))
        self.ways = [_ways(program, costs, link, of_rank) for link in self.topology.links]
        self.numbers = {link: i for i, link in enumerate(self.topology.links)}
        self.last = [0.0] * len(self.crews)
        """When the last action of each crew ended."""
        self.before = list(self.last)
        """When the one before that ended."""
        self.held = list(self.last)
        """Until when sends that nobody answers are on the way."""
        self.made: dict[tuple[Stage, Direction, int], dict[int, float]] = {}
        self.free: collections.defaultdict[tuple[int, int, object, Direction], float] = (
            collections.defaultdict(float)
        )
        self.there: dict[tuple[_Text, int], float] = {}

    def run(self) -> Lockstep:
        """Go through the order, then through what ends a step."""
        beats: list[list[Beat]] = [[] for _ in self.crews]
        seconds: dict[tuple[Stage, Kind], float] = {}
        for action in self.program.order.actions:
            stage, kind = action.stage, action.kind
            if (stage, kind) not in seconds:
                seconds[stage, kind] = seconds_of(action, self.costs)
            hosts = self.hosts[stage]
            begins = self._begins(action, hosts)
            ends: dict[int, float] = {}
            for crew, begin in zip(hosts, begins, strict=True):
                end = ends[crew] = begin + seconds[stage, kind]
                beats[crew].append(Beat(action, begin, end))
                self.before[crew], self.last[crew] = self.last[crew], end
            if kind is not Kind.WEIGHT_GRADIENT:
                way = Direction.FORWARD if kind is Kind.FORWARD else Direction.BACKWARD
                self.made[stage, way, action.microbatch] = ends
        return Lockstep(self.crews, tuple(map(tuple, beats)), self._finish())

    def _begins(self, action: Compute, hosts: Sequence[int]) -> list[float]:
        texts = tuple(self._reads(action))
        begins = [
            max(self.last[crew], self.held[crew], *(self._arrives(text, crew) for text in texts))
            if texts
            else max(self.last[crew], self.held[crew])
            for crew in hosts
        ]
        if self.topology.modules[action.stage.module].experts is not None:
            begins = [max(begins)] * len(begins)
        return begins

    def _reads(self, action: Compute) -> Iterator[_Text]:
        """Yield what an action needs to be there."""
        topology, k = self.topology, action.microbatch
        if action.kind is Kind.FORWARD:
            for link in topology.links_into(action.stage):
                yield self.numbers[link], k, Direction.FORWARD
        elif action.kind is not Kind.WEIGHT_GRADIENT:
            for link in topology.links_from(action.stage):
                if link in self.program.order.gradients:
                    for target_k in self._met(link, k, forward=True):
                        yield self.numbers[link], target_k, Direction.BACKWARD

    def _met(self, link: Link, k: int, *, forward: bool) -> range:
        """The microbatches at the other end of a link that share samples with one at this end."""
        modules = self.topology.modules
        counts = modules[link.source.module].microbatches, modules[link.target.module].microbatches
        return overlapping(k, *(counts if forward else counts[::-1]))

    def _arrives(self, text: _Text, crew: int) -> float:
        """Return when a crew has what others send it; they send all of it at once."""
        if (text, crew) not in self.there:
            number, k, direction = text
            link = self.topology.links[number]
            forward = direction is Direction.FORWARD
            makers = (
                [self.made[link.source, direction, j] for j in self._met(link, k, forward=False)]
                if forward
                else [self.made[link.target, direction, k]]
            )
            answered = link in self.program.order.gradients
            latest = 0.0
            first = self.program.routes.first(link, k)
            for source, carry_s, latency in self.ways[number][first, forward].get(crew, ()):
                channel = (source, crew, link.edge, direction)
                arrived = max(self.before[crew], *(made[source] for made in makers))
                if carry_s or latency:
                    arrived = self.free[channel] = max(arrived, self.free[channel]) + carry_s
                    arrived += latency
                if not answered:
                    self.held[source] = max(self.held[source], arrived)
                latest = max(latest, arrived)
            self.there[text, crew] = latest
        return self.there[text, crew]

    def _finish(self) -> float:
        """Sum gradients, agree, and take the step."""
        last = [max(both) for both in zip(self.last, self.held, strict=True)]
        topology, training = self.topology, self.program.order.training
        updates = [0.0] * len(last)
        for stage, hosts in self.hosts.items() if training else ():
            rank = topology.modules[stage.module].holders(stage, 0)[0]
            if Reduce(stage) in tuple(self.program.finish(rank)):
                end = max(last[crew] for crew in hosts) + self.costs.of(stage).reduce
                for crew in hosts:
                    last[crew] = end
            for crew in hosts:
                updates[crew] += self.costs.of(stage).update
        return max(last, default=0.0) + max(updates, default=0.0)


def _ways(
    program: Program, costs: Costs, link: Link, of_rank: Mapping[int, int]
) -> dict[tuple[int, bool], dict[int, list[_Way]]]:
    """Return, per microbatch of a link's target that others are like and per direction, the ways to each crew.

    Of several messages from one crew to another the largest counts.
    """
    routes, lanes = program.routes, range(program.topology.modules[link.target.module].lanes)
    edge = costs.on(link, link.edge)
    found: dict[tuple[int, bool], dict[int, list[_Way]]] = {}
    for k in routes.firsts(link):
        most: dict[tuple[int, int], int] = {}
        for lane in lanes:
            for messages in routes.reaching(link, k, lane).values():
                for message in messages:
                    pair = of_rank[message.rank_source], of_rank[message.rank_target]
                    most[pair] = max(message_bytes(routes.step, message), most.get(pair, 0))
        forth: dict[int, list[_Way]] = collections.defaultdict(list)
        back: dict[int, list[_Way]] = collections.defaultdict(list)
        for (source, target), size in most.items():
            takes = (edge.carry_s(size), edge.latency) if size else (0.0, 0.0)
            forth[target].append((source, *takes))
            back[source].append((target, *takes))
        found[k, True], found[k, False] = forth, back
    return found
