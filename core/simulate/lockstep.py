"""Lockstep: a step timed by stages, where what holds of one dp rank holds of all.

Ranks that host the same stages form a *rank class*. Where all samples are alike, so are the dp ranks, and the ranks
of a rank class do the same at the same time, but for which of their peers they wait for. Here a rank class goes on
when the last of its ranks could, which is what a step waits for in the end. So a thousand ranks are a few dozen
rank classes, and nothing has to be lowered: what a rank posts and waits for stands, in `lower`, at fixed places
beside its compute actions.

    a receive    is posted when the compute action before the one that reads it is next
    a message    is carried once both ends have posted it, in turn with others on its way, and arrives a latency later
    a send       that no answer comes for is waited for before the next action after it has been read
    a sum        of a stage's gradients begins when all its ranks have posted it, which they do when the last compute
                 action of the stage in the whole order is behind them, and the sum before it in their group is done

A rank class never waits for less than its ranks do, so the time is that of `simulate`, or more: more where the
ranks of a rank class have peers of different rank classes, as in modules that share some of their ranks, and where
`lower` posts a receive earlier, because one behind it must be posted earlier.
"""

import collections
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import overlapping
from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Compute, Direction, Kind
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.work import seconds_of
from mimogrid.core.simulate.lower_bound import sum_s, summing_s
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Link, Stage, Topology
from mimogrid.core.update.buckets import Section, buckets_of, shared_by


@attrs.frozen(eq=False)
class TimedCompute:
    """A compute action of a rank class."""

    action: Compute
    begin_s: float
    end_s: float


@attrs.frozen(eq=False)
class Lockstep:
    """A step timed by rank classes.

    Attributes:
        rank classes: the ranks of each, ascending; the first of each, too.
        beats: what each rank class does when.
        step_s: when the last rank is through.
    """

    rank_classes: tuple[tuple[int, ...], ...]
    computes: tuple[tuple[TimedCompute, ...], ...]
    step_s: float

    @functools.cached_property
    def busy_s(self) -> tuple[float, ...]:
        """How long each rank of a rank class computes."""
        return tuple(
            sum(compute.end_s - compute.begin_s for compute in computes) for computes in self.computes
        )


def rank_classes_of(topology: Topology) -> tuple[tuple[int, ...], ...]:
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
    """Return a time that no order beats: on every rank the shortest way in, its work, the shortest way out.

    Ways are those of one microbatch from stage to stage; what is on its way takes no time here.
    """
    topology, order = program.topology, program.order
    ins: dict[Stage, float] = {}
    outs: dict[Stage, float] = {}
    for name in topology.graph.order:
        for info in topology.modules[name].stages:
            feeders = topology.links_into(info.stage)
            back = [link.source for link in feeders if link in order.gradients]
            ins[info.stage] = max(
                (ins[link.source] + costs.of(link.source).forward for link in feeders), default=0.0
            )
            outs[info.stage] = max(
                (outs[source] + _gives_s(order, costs, source) for source in back), default=0.0
            )
    tails = {stage: _tail_s(program, costs, stage, way) for stage, way in outs.items()}
    bounds = [0.0]
    for computes, busy in zip(timed.computes, timed.busy_s, strict=True):
        stages = {compute.action.stage for compute in computes}
        way_in = min((ins[stage] for stage in stages), default=0.0)
        bounds.append(way_in + busy + min((tails[stage] for stage in stages), default=0.0))
    updates = (costs.of(stage).update for stage in topology.stages)
    return max(bounds) + max(updates, default=0.0)


def _tail_s(program: Program, costs: Costs, stage: Stage, way: float) -> float:
    """Return the seconds after the last action of a stage: sums of gradients, or gradients of inputs on their way."""
    order, module = program.order, program.topology.modules[stage.module]
    if stage not in order.backward:
        return 0.0
    summing = summing_s(program, costs, module.tp_cp_ranks(stage, 0)[0], stage)
    return max(summing, 0.0 if stage in order.split else way)


def _gives_s(order: Order, costs: Costs, stage: Stage) -> float:
    """Return how long a stage takes for the gradients of its inputs."""
    kind = Kind.INPUT_GRADIENT if stage in order.split else Kind.BACKWARD
    return seconds_of(Compute(kind, stage, 0), costs)


_Ends = list[float]
"""When each rank class has done something."""


@attrs.frozen
class _Way:
    """From which rank class messages come, on which channel, how long they occupy it and take to arrive after that."""

    rank_class: int
    channel: int
    carry_s: float
    latency: float


@attrs.frozen(eq=False)
class _Mail:
    """What the ranks of two stages say to each other in one direction.

    Attributes:
        ways: per target microbatch that others are like (`firsts` says which) and reading rank class.
        made: when each rank class of the makers has made its part, by the makers' microbatch.
        makers: by the microbatch of the link's target, those of the makers that its messages are made in.
        texts: by the readers' microbatch, those of the link's target that they read.
        answered: senders need not wait for it.
        there: what has arrived and is read once more.
    """

    ways: Mapping[int, Mapping[int, Sequence[_Way]]]
    firsts: Sequence[int]
    made: Sequence[_Ends]
    makers: Sequence[range]
    texts: Sequence[range]
    answered: bool
    there: dict[tuple[int, int], float] = attrs.field(factory=dict[tuple[int, int], float], init=False)


@attrs.frozen(eq=False)
class _Part:
    """One kind of action of a stage: who does it, how long it takes, what it reads, and where its ends are noted."""

    rank_classes: tuple[int, ...]
    seconds: float
    reads: tuple[_Mail, ...]
    made: list[_Ends] | None
    joint: bool


class _Walk:
    """The walk's state: until when rank classes work, when results were made, when channels are free."""

    def __init__(self, program: Program, costs: Costs) -> None:
        self.program, self.costs, self.topology = program, costs, program.topology
        self.rank_classes = rank_classes_of(self.topology)
        self.of_rank = {rank: i for i, ranks in enumerate(self.rank_classes) for rank in ranks}
        self.hosts: dict[Stage, tuple[int, ...]] = {}
        self.made: dict[tuple[Stage, Direction], list[_Ends]] = {}
        for module in self.topology.modules.values():
            for info in module.stages:
                ranks = (
                    r for dp_rank in range(module.dp_size) for r in module.tp_cp_ranks(info.stage, dp_rank)
                )
                self.hosts[info.stage] = tuple(sorted({self.of_rank[rank] for rank in ranks}))
                for way in Direction:
                    self.made[info.stage, way] = [
                        [0.0] * len(self.rank_classes) for _ in range(module.microbatches)
                    ]
        self.channels: dict[Hashable, int] = {}
        mail = {(link, way): self._mail(link, way) for link in self.topology.links for way in Direction}
        self.parts = {stage: {kind: self._part(stage, kind, mail) for kind in Kind} for stage in self.hosts}
        self.free = [0.0] * len(self.channels)
        self.last, self.before, self.held, self.summed = ([0.0] * len(self.rank_classes) for _ in range(4))
        """When each rank class's last action ended, the one before that, sends that nobody answers, and its sums."""
        self.summing: dict[tuple[int, ...], float] = collections.defaultdict(float)

    def run(self) -> Lockstep:
        """Go through the order, then through what ends a step."""
        computes: list[list[TimedCompute]] = [[] for _ in self.rank_classes]
        last, before = self.last, self.before
        order = self.program.order
        for action in order.actions:
            part, k = self.parts[action.stage][action.kind], action.microbatch
            begins = [self._begin(part, k, rank_class) for rank_class in part.rank_classes]
            if part.joint:
                begins = [max(begins)] * len(begins)
            for rank_class, begin in zip(part.rank_classes, begins, strict=True):
                end = begin + part.seconds
                computes[rank_class].append(TimedCompute(action, begin, end))
                before[rank_class], last[rank_class] = last[rank_class], end
                if part.made is not None:
                    part.made[k][rank_class] = end
            if order.training and action is order.of(action.stage)[-1]:
                self._post_sums(action.stage)
        return Lockstep(self.rank_classes, tuple(map(tuple, computes)), self._finish())

    def _begin(self, part: _Part, k: int, rank_class: int) -> float:
        """Return when a rank class can begin with microbatch k: it is free, and has all that it reads."""
        begin = max(self.last[rank_class], self.held[rank_class])
        for mail in part.reads:
            for text in mail.texts[k]:
                begin = max(begin, self._arrives(mail, text, rank_class))
        return begin

    def _arrives(self, mail: _Mail, text: int, rank_class: int) -> float:
        """Return when a rank class has what others send it."""
        known = mail.there.get((text, rank_class))
        if known is not None:
            return known
        latest, posted, free = 0.0, self.before[rank_class], self.free
        makers = [mail.made[j] for j in mail.makers[text]]
        for way in mail.ways[mail.firsts[text]].get(rank_class, ()):
            arrived = posted
            for made in makers:
                arrived = max(arrived, made[way.rank_class])
            if way.carry_s or way.latency:
                arrived = free[way.channel] = max(arrived, free[way.channel]) + way.carry_s
                arrived += way.latency
            if not mail.answered:
                self.held[way.rank_class] = max(self.held[way.rank_class], arrived)
            latest = max(latest, arrived)
        mail.there[text, rank_class] = latest
        return latest

    def _part(self, stage: Stage, kind: Kind, mail: Mapping[tuple[Link, Direction], _Mail]) -> _Part:
        """Return what is always the same of a stage's actions of a kind."""
        reads: tuple[_Mail, ...] = ()
        made: list[_Ends] | None = None
        if kind is Kind.FORWARD:
            made = self.made[stage, Direction.FORWARD]
            reads = tuple(mail[link, Direction.FORWARD] for link in self.topology.links_into(stage))
        elif kind is not Kind.WEIGHT_GRADIENT:
            made = self.made[stage, Direction.BACKWARD]
            answers = (
                link for link in self.topology.links_from(stage) if link in self.program.order.gradients
            )
            reads = tuple(mail[link, Direction.BACKWARD] for link in answers)
        return _Part(
            rank_classes=self.hosts[stage],
            seconds=seconds_of(Compute(kind, stage, 0), self.costs),
            reads=reads,
            made=made,
            joint=self.topology.modules[stage.module].experts is not None,
        )

    def _mail(self, link: Link, direction: Direction) -> _Mail:
        """Return what is always the same of the messages over a link in a direction."""
        forward = direction is Direction.FORWARD
        modules, routes = self.topology.modules, self.program.routes
        source, target = modules[link.source.module].microbatches, modules[link.target.module].microbatches
        of_source = [overlapping(k, target, source) for k in range(target)]
        own = [range(k, k + 1) for k in range(target)]
        return _Mail(
            ways={k: self._ways(link, k, direction) for k in routes.firsts(link)},
            firsts=[routes.first(link, k) for k in range(target)],
            made=self.made[link.source if forward else link.target, direction],
            makers=of_source if forward else own,
            texts=own if forward else [overlapping(k, source, target) for k in range(source)],
            answered=link in self.program.order.gradients,
        )

    def _ways(self, link: Link, k: int, direction: Direction) -> dict[int, list[_Way]]:
        """Return the ways to each rank class; of several messages from one rank class to another the largest counts."""
        routes, edge = self.program.routes, self.costs.on(link, link.edge)
        forward = direction is Direction.FORWARD
        most: dict[tuple[int, int], int] = {}
        for dp_rank in range(self.topology.modules[link.target.module].dp_size):
            for messages in routes.reaching(link, k, dp_rank).values():
                for message in messages:
                    source, target = self.of_rank[message.rank_source], self.of_rank[message.rank_target]
                    pair = (source, target) if forward else (target, source)
                    most[pair] = max(message_bytes(routes.step, message), most.get(pair, 0))
        found: dict[int, list[_Way]] = collections.defaultdict(list)
        for (here, there), size in most.items():
            channel = self.channels.setdefault((here, there, link.edge, direction), len(self.channels))
            takes = (edge.carry_s(size), edge.latency) if size else (0.0, 0.0)
            found[there].append(_Way(here, channel, *takes))
        return found

    def _post_sums(self, stage: Stage) -> None:
        """Sum the gradients of a stage: each group when the last of its rank classes posts its part."""
        for group, rank_classes, seconds in self._sums_of(stage):
            posted = max(self.last[rank_class] for rank_class in rank_classes)
            end = self.summing[group] = max(posted, self.summing[group]) + seconds
            for rank_class in rank_classes:
                self.summed[rank_class] = max(self.summed[rank_class], end)

    def _sums_of(self, stage: Stage) -> Iterator[tuple[tuple[int, ...], set[int], float]]:
        """Yield the groups that sum gradients of a stage, with their rank classes, and how long all buckets take."""
        module = self.topology.modules[stage.module]
        ranks = [rank for dp_rank in range(module.dp_size) for rank in module.tp_cp_ranks(stage, dp_rank)]
        buckets = buckets_of(self.topology, self.topology.stages[stage], ranks[0])
        seconds: dict[Section, float] = collections.defaultdict(float)
        for reduce in self.program.sums(ranks[0]):
            if reduce.stage == stage:
                seconds[buckets[reduce.bucket].section] += sum_s(self.program, self.costs, reduce)
        for section, takes in seconds.items():
            for group in {shared_by(module, rank, section) for rank in ranks}:
                yield group, {self.of_rank[rank] for rank in group}, takes

    def _finish(self) -> float:
        """Wait for sends and sums, agree, and take the step."""
        waited = map(max, self.last, self.held, self.summed)
        updates = [0.0] * len(self.rank_classes)
        for stage, rank_classes in self.hosts.items() if self.program.order.training else ():
            for rank_class in rank_classes:
                updates[rank_class] += self.costs.of(stage).update
        return max(waited, default=0.0) + max(updates, default=0.0)
