"""Lockstep: a step timed by stages, where all samples are alike.

Then all dp ranks are alike. A *rank class* here is all ranks that host the same stages: they do the same at the same
time, and differ only in the peers that they wait for. The rank class goes on when the last of its ranks could go on. So
a thousand ranks are a few dozen rank classes. Nothing is lowered, because the places of transfers and collectives
beside the compute actions are fixed (`lower`):

    a receive      is posted when the compute action before the one that reads it has ended
    a message      is carried once both ends have posted it, one by one on its channel, and arrives a latency later
    a send         without an answer is waited for before the next action after it has been read
    a gather       of a stage's weights begins with the step, or when the one before it in its group is done
    a sum          of a stage's gradients begins when all its ranks have posted it, which they do after the stage's
                   last compute action in the whole order, or the part of it that completes the gradients, and when
                   the one before it in their group is done

A rank class waits for all that its ranks wait for. So the time is that of `simulate`, or more: more where the ranks of
a class have peers in different classes, as in modules that share some of their ranks, and where `lower` posts a receive
earlier because a later one needs it.

This is a clock of its own, beside `scheduler.retimed` and `simulate`, because the search for layouts (`plan`) needs
what neither gives. `retimed` times the orders that `auto` tries, before any step is known: it has no sizes, no channels
and no collectives. `simulate` has them, but takes about a hundred times as long on a thousand ranks: it looks for rank
classes and lowers their programs.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.bounds import bound_s, longest_before_s
from mimogrid.core.base.samples import overlapping
from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Collective, Compute, Direction, Kind
from mimogrid.core.schedule.work import seconds_of
from mimogrid.core.simulate.lower_bound import collective_s, gathering_s, reducing_s
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Link, Module, Stage
from mimogrid.core.update.buckets import Section, buckets_of, shared_by, sharing_ranks


MANY = 32
"""Dp ranks. Of more, the messages of some are looked at."""


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
        rank_classes: the ranks of each class, ascending.
        computes: what each class computes, and when.
        step_s: when the last rank is done.
    """

    rank_classes: tuple[tuple[int, ...], ...]
    computes: tuple[tuple[TimedCompute, ...], ...]
    step_s: float

    @functools.cached_property
    def busy_s(self) -> tuple[float, ...]:
        """The seconds that each rank of a class computes."""
        return tuple(
            sum(compute.end_s - compute.begin_s for compute in computes) for computes in self.computes
        )


def lockstep(program: Program, costs: Costs) -> Lockstep:
    """Time a program of a step with like samples. `costs` have no limit on cores, and no edge blocks its sender."""
    script = _Script(program, costs)
    clocks = [_ClassClock() for _ in script.rank_classes]
    channels = [0.0] * len(script.channels)
    computes: list[list[TimedCompute]] = [[] for _ in script.rank_classes]
    groups: dict[tuple[int, ...], float] = collections.defaultdict(float)
    order = program.order
    for stage in script.stages_by_first_action():
        for group, rank_classes, seconds in script.gathers(stage):
            groups[group] += seconds
            script.tasks[stage][Kind.FORWARD].wait_for_weights(rank_classes, groups[group])
    for action in order.actions:
        task, k = script.tasks[action.stage][action.kind], action.microbatch
        begins = [_begin_s(task, k, rank_class, clocks, channels) for rank_class in task.rank_classes]
        if task.joint:
            begins = [max(begins)] * len(begins)
        for rank_class in task.rank_classes:
            clocks[rank_class].before_s = clocks[rank_class].last_s
        for part in order.parts(action):
            seconds = task.seconds * order.share(part)
            for i, rank_class in enumerate(task.rank_classes):
                end, clock = begins[i] + seconds, clocks[rank_class]
                computes[rank_class].append(TimedCompute(part, begins[i], end))
                clock.last_s = begins[i] = end
                if task.made is not None:
                    task.made[k][rank_class] = end
            if order.training and action is order.of(action.stage)[-1]:
                for group, rank_classes, summing_s in script.sums(part):
                    posted = max(clocks[rank_class].last_s for rank_class in rank_classes)
                    groups[group] = end = max(posted, groups[group]) + summing_s
                    for rank_class in rank_classes:
                        clocks[rank_class].reduced_s = max(clocks[rank_class].reduced_s, end)
    waited = (max(clock.last_s, clock.read_s, clock.reduced_s) for clock in clocks)
    step_s = max(waited, default=0.0) + max(script.updates_s(), default=0.0)
    return Lockstep(script.rank_classes, tuple(map(tuple, computes)), step_s)


def lower_bound_s(program: Program, costs: Costs, timed: Lockstep) -> float:
    """Return seconds that no order beats. The set (`bounds`) is all work of each rank class.

    Heads and tails are those of one microbatch from stage to stage, without the time of messages.
    """
    topology, order = program.topology, program.order
    stages = [info.stage for name in topology.graph.order for info in topology.modules[name].stages]
    gives = {stage: Kind.INPUT_GRADIENT if stage in order.split else Kind.BACKWARD for stage in stages}
    heads = longest_before_s(
        stages,
        {stage: [(link.source, 0.0) for link in topology.links_into(stage)] for stage in stages},
        {stage: costs.of(stage).forward for stage in stages},
        {stage: _gathering_s(program, costs, stage) for stage in stages},
    )
    back = longest_before_s(
        stages,
        {
            stage: [(link.source, 0.0) for link in topology.links_into(stage) if link in order.gradients]
            for stage in stages
        },
        {stage: seconds_of(Compute(gives[stage], stage, 0), costs) for stage in stages},
    )
    tails = {stage: _tail_s(program, costs, stage, back[stage]) for stage in stages}
    bounds = [0.0]
    for computes, busy_s in zip(timed.computes, timed.busy_s, strict=True):
        own = {compute.action.stage for compute in computes}
        bounds.append(bound_s((heads[stage] for stage in own), busy_s, (tails[stage] for stage in own)))
    updates = (costs.of(stage).update for stage in topology.stages)
    return max(bounds) + max(updates, default=0.0)


def _gathering_s(program: Program, costs: Costs, stage: Stage) -> float:
    rank = program.topology.modules[stage.module].tp_cp_ranks(stage, 0)[0]
    return gathering_s(program, costs, rank, stage)


def _tail_s(program: Program, costs: Costs, stage: Stage, back_s: float) -> float:
    """Return the seconds after the last action of a stage: its sums, or the gradients on their way back."""
    order, module = program.order, program.topology.modules[stage.module]
    if stage not in order.backward:
        return 0.0
    reducing = reducing_s(program, costs, module.tp_cp_ranks(stage, 0)[0], stage)
    return max(reducing, 0.0 if stage in order.split else back_s)


_Ends = list[float]
"""When each rank class has made something, in seconds."""


@attrs.define(eq=False)
class _ClassClock:
    """The clock of a rank class, in seconds.

    Attributes:
        last_s: when its last compute action ended.
        before_s: when the one before that ended; then the receives of the next action were posted.
        read_s: when its sends that get no answer have been read.
        reduced_s: when its sums are done.
    """

    last_s: float = 0.0
    before_s: float = 0.0
    read_s: float = 0.0
    reduced_s: float = 0.0


@attrs.frozen
class _Message:
    """What a rank class gets from another: from which, on which channel, how long it is carried and then travels."""

    rank_class: int
    channel: int
    carry_s: float
    latency_s: float


@attrs.frozen(eq=False)
class _Messages:
    """What the ranks of two stages send in one direction over their link.

    Attributes:
        by_reader: per microbatch of the link's target, and reading rank class, its messages. Of microbatches that are
            alike there is only the first.
        firsts: for each microbatch of the link's target, the first one that is like it.
        made: when each rank class has made its part, by the microbatch of the stage that makes it.
        makers: for each microbatch of the link's target, those microbatches of the stage that makes it.
        read: for each microbatch of the stage that reads, the microbatches of the link's target.
        answered: whether an answer comes, so that senders need not wait.
        arrived: what has arrived and is read again.
    """

    by_reader: Mapping[int, Mapping[int, Sequence[_Message]]]
    firsts: Sequence[int]
    made: Sequence[_Ends]
    makers: Sequence[range]
    read: Sequence[range]
    answered: bool
    arrived: dict[tuple[int, int], float] = attrs.field(factory=dict[tuple[int, int], float], init=False)


@attrs.frozen(eq=False)
class _Task:
    """One kind of action of a stage.

    Attributes:
        rank_classes: who does it.
        seconds: how long it takes.
        reads: what it reads.
        made: where its ends are noted.
        joint: whether all of its rank classes begin together.
        weights_s: when each rank class has gathered its weights.
    """

    rank_classes: tuple[int, ...]
    seconds: float
    reads: tuple[_Messages, ...]
    made: list[_Ends] | None
    joint: bool
    weights_s: dict[int, float] = attrs.field(factory=dict[int, float], init=False)

    def wait_for_weights(self, rank_classes: Iterable[int], until_s: float) -> None:
        """Note that these rank classes wait for weights."""
        for rank_class in rank_classes:
            self.weights_s[rank_class] = max(self.weights_s.get(rank_class, 0.0), until_s)


def _begin_s(
    task: _Task, k: int, rank_class: int, clocks: Sequence[_ClassClock], channels: list[float]
) -> float:
    """Return when a rank class can begin with microbatch k: it is free, and everything that it reads has arrived."""
    begin = max(clocks[rank_class].last_s, clocks[rank_class].read_s, task.weights_s.get(rank_class, 0.0))
    for messages in task.reads:
        for target_k in messages.read[k]:
            begin = max(begin, _arrival_s(messages, target_k, rank_class, clocks, channels))
    return begin


def _arrival_s(
    messages: _Messages, target_k: int, rank_class: int, clocks: Sequence[_ClassClock], channels: list[float]
) -> float:
    """Return when a microbatch of the link's target has arrived at a rank class; `channels` are busy until then."""
    known = messages.arrived.get((target_k, rank_class))
    if known is not None:
        return known
    latest, posted = 0.0, clocks[rank_class].before_s
    makers = [messages.made[j] for j in messages.makers[target_k]]
    for message in messages.by_reader[messages.firsts[target_k]].get(rank_class, ()):
        arrived = posted
        for made in makers:
            arrived = max(arrived, made[message.rank_class])
        if message.carry_s or message.latency_s:
            arrived = channels[message.channel] = max(arrived, channels[message.channel]) + message.carry_s
            arrived += message.latency_s
        if not messages.answered:
            sender = clocks[message.rank_class]
            sender.read_s = max(sender.read_s, arrived)
        latest = max(latest, arrived)
    messages.arrived[target_k, rank_class] = latest
    return latest


class _Script:
    """What does not change while the step is timed: rank classes, the tasks of stages, channels, collectives."""

    def __init__(self, program: Program, costs: Costs) -> None:
        self._program, self._costs, self._topology = program, costs, program.topology
        by_stages = self._topology.ranks_by_stages
        self.rank_classes = tuple(by_stages.values())
        self._class_of = {rank: i for i, ranks in enumerate(self.rank_classes) for rank in ranks}
        self._hosts = {
            stage: tuple(i for i, stages in enumerate(by_stages) if stage in stages)
            for stage in self._topology.stages
        }
        self._made = {
            (stage, direction): [
                [0.0] * len(self.rank_classes)
                for _ in range(self._topology.modules[stage.module].microbatches)
            ]
            for stage in self._topology.stages
            for direction in Direction
        }
        self.channels: dict[Hashable, int] = {}
        messages = {
            (link, direction): found
            for link in self._topology.links
            for direction, found in self._messages(link)
        }
        self.tasks = {
            stage: {kind: self._task(stage, kind, messages) for kind in Kind}
            for stage in self._topology.stages
        }

    def _task(self, stage: Stage, kind: Kind, messages: Mapping[tuple[Link, Direction], _Messages]) -> _Task:
        reads: tuple[_Messages, ...] = ()
        made: list[_Ends] | None = None
        if kind is Kind.FORWARD:
            made = self._made[stage, Direction.FORWARD]
            reads = tuple(messages[link, Direction.FORWARD] for link in self._topology.links_into(stage))
        elif kind is not Kind.WEIGHT_GRADIENT:
            made = self._made[stage, Direction.BACKWARD]
            answers = (
                link for link in self._topology.links_from(stage) if link in self._program.order.gradients
            )
            reads = tuple(messages[link, Direction.BACKWARD] for link in answers)
        return _Task(
            rank_classes=self._hosts[stage],
            seconds=seconds_of(Compute(kind, stage, 0), self._costs),
            reads=reads,
            made=made,
            joint=self._topology.modules[stage.module].experts is not None,
        )

    def _messages(self, link: Link) -> Iterator[tuple[Direction, _Messages]]:
        """Yield the messages over a link in each direction."""
        modules, routes = self._topology.modules, self._program.routes
        source, target = modules[link.source.module].microbatches, modules[link.target.module].microbatches
        of_source = [overlapping(k, target, source) for k in range(target)]
        of_target = [overlapping(k, source, target) for k in range(source)]
        own = [range(k, k + 1) for k in range(target)]
        firsts = routes.firsts(link)
        largest = dict(zip(firsts, self._largest(link, firsts), strict=True))
        for direction in Direction:
            forward = direction is Direction.FORWARD
            yield (
                direction,
                _Messages(
                    by_reader={k: self._by_reader(link, sizes, direction) for k, sizes in largest.items()},
                    firsts=[routes.first(link, k) for k in range(target)],
                    made=self._made[link.source if forward else link.target, direction],
                    makers=of_source if forward else own,
                    read=own if forward else of_target,
                    answered=link in self._program.order.gradients,
                ),
            )

    def _largest(self, link: Link, ks: Iterable[int]) -> Iterator[dict[tuple[int, int], int]]:
        """Yield, for some microbatches of a link, the bytes of the largest message from one rank class to another.

        Forward: that one counts.
        """
        routes = self._program.routes
        for k, receivers in self._receivers(link, ks):
            largest: dict[tuple[int, int], int] = {}
            for dp_rank in receivers:
                for messages in routes.reaching(link, k, dp_rank).values():
                    for message in messages:
                        ends = self._class_of[message.rank_source], self._class_of[message.rank_target]
                        largest[ends] = max(message_bytes(routes.step, message), largest.get(ends, 0))
            yield largest

    def _receivers(self, link: Link, ks: Iterable[int]) -> Iterator[tuple[int, Iterable[int]]]:
        """Yield the dp ranks of a link's target whose messages count: of many, some for each rank class at either end.

        Samples are alike, so of a rank class all have as much to send, but for rows that do not divide.
        """
        source, target = (self._topology.modules[stage.module] for stage in (link.source, link.target))
        if max(source.dp_size, target.dp_size) <= MANY:
            yield from ((k, range(target.dp_size)) for k in ks)
            return
        sending, receiving = self._some(source, link.source), self._some(target, link.target)
        routes, found = self._program.routes, {k: dict.fromkeys(receiving) for k in ks}
        for dp_rank in sending:
            for k in routes.fed(link, dp_rank):
                found[k].update(dict.fromkeys(routes.receivers(link, k, dp_rank)))
        yield from found.items()

    def _some(self, module: Module, stage: Stage) -> list[int]:
        """Return the first, the middle and the last of the dp ranks whose first rank is in each rank class."""
        found: dict[int, list[int]] = collections.defaultdict(list)
        for dp_rank in range(module.dp_size):
            found[self._class_of[module.tp_cp_ranks(stage, dp_rank)[0]]].append(dp_rank)
        return [some for mine in found.values() for some in (mine[0], mine[len(mine) // 2], mine[-1])]

    def _by_reader(
        self, link: Link, largest: Mapping[tuple[int, int], int], direction: Direction
    ) -> dict[int, list[_Message]]:
        edge, forward = self._costs.on(link, link.edge), direction is Direction.FORWARD
        found: dict[int, list[_Message]] = collections.defaultdict(list)
        for (source, target), size in largest.items():
            maker, reader = (source, target) if forward else (target, source)
            channel = self.channels.setdefault((maker, reader, link.edge, direction), len(self.channels))
            times = (edge.carry_s(size), edge.latency) if size else (0.0, 0.0)
            found[reader].append(_Message(maker, channel, *times))
        return found

    def stages_by_first_action(self) -> list[Stage]:
        """Return the stages in the order in which they begin to compute."""
        order = self._program.order
        computing = (stage for stage in self._topology.stages if order.of(stage))
        return sorted(computing, key=lambda stage: order.index[order.of(stage)[0]])

    def sums(self, part: Compute) -> Iterator[tuple[tuple[int, ...], set[int], float]]:
        """Yield the groups that sum gradients after a part of a last action, their rank classes, and the seconds."""
        return self._collectives(part.stage, lambda rank: self._program.sums_after(rank, part), shared_by)

    def gathers(self, stage: Stage) -> Iterator[tuple[tuple[int, ...], set[int], float]]:
        """Yield the groups that gather weights of a stage, their rank classes, and the seconds of all buckets."""
        return self._collectives(stage, self._program.gathers, sharing_ranks)

    def _collectives(
        self,
        stage: Stage,
        of: Callable[[int], Iterable[Collective]],
        group_of: Callable[[Module, int, Section], tuple[int, ...]],
    ) -> Iterator[tuple[tuple[int, ...], set[int], float]]:
        module = self._topology.modules[stage.module]
        ranks = [rank for dp_rank in range(module.dp_size) for rank in module.tp_cp_ranks(stage, dp_rank)]
        buckets = buckets_of(self._topology, self._topology.stages[stage], ranks[0])
        seconds: dict[Section, float] = collections.defaultdict(float)
        for collective in of(ranks[0]):
            if collective.stage == stage:
                section = buckets[collective.bucket].section
                seconds[section] += collective_s(self._program, self._costs, collective)
        for section, takes in seconds.items():
            seen: set[int] = set()
            for rank in ranks:
                if rank not in seen:
                    group = group_of(module, rank, section)
                    seen.update(group)
                    yield group, {self._class_of[other] for other in group}, takes

    def updates_s(self) -> list[float]:
        """Return the seconds of each rank class's optimizer step."""
        updates = [0.0] * len(self.rank_classes)
        for stage, rank_classes in self._hosts.items() if self._program.order.training else ():
            for rank_class in rank_classes:
                updates[rank_class] += self._costs.of(stage).update
        return updates
