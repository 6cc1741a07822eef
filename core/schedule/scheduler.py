"""The list scheduler: one walk in time that makes every order.

A pipeline rank's *line* says what it would do next, and it waits for that:

    forwards until they are `max_in_flight` microbatches ahead of the backwards, then a backward before each forward;
    where backwards are split, a weight gradient as soon as more than `weight_grad_backlog` of them are owed

Once there is no forward left, what is ready comes first: backwards, then weight gradients, which nobody waits
for.

The walk starts what is wanted and ready as soon as the pipeline rank's ranks are free, in order of (microbatch, depth,
name), and never runs two pipeline ranks that share a rank at once. So its result has been done once: whatever the ranks
do in that order is free of deadlock.
"""

import functools
import heapq
import math
from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.base.bounds import bound_s, longest_before_s
from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.work import Sequences, Work
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class IssueQueue:
    """A pipeline rank's turns: its actions by kind, each in order, and by what rule it chooses among them.

    Attributes:
        sequences: its actions.
        limit in flight: how many forwards may be ahead of backwards.
        lag: how many weight gradients may be owed to gradients of inputs.
        room: before each forward of a stage without backward, those that must have read earlier outputs.
    """

    sequences: Sequences
    max_in_flight: float = math.inf
    weight_grad_backlog: float = math.inf
    backpressure: Mapping[int, tuple[int, ...]] = attrs.field(factory=dict[int, tuple[int, ...]])


@attrs.frozen(eq=False)
class TimedWork:
    """Work with the time that each action takes, and that data takes from one stage to another."""

    work: Work
    seconds: tuple[float, ...]
    delay: Mapping[tuple[Stage, Stage], float] = attrs.field(factory=dict[tuple[Stage, Stage], float])

    @functools.cached_property
    def sources(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """For every action, those that it needs, and how long their results are on the way."""
        actions = self.work.actions
        return tuple(
            tuple((need, self.delay.get((actions[need].stage, action.stage), 0.0)) for need in needs)
            for action, needs in zip(actions, self.work.needs, strict=True)
        )

    @functools.cached_property
    def followers(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """For every action, those that need it, and how long its result is on the way."""
        found: list[list[tuple[int, float]]] = [[] for _ in self.sources]
        for action, sources in enumerate(self.sources):
            for need, delay in sources:
                found[need].append((action, delay))
        return tuple(map(tuple, found))

    @functools.cached_property
    def priority(self) -> tuple[int, ...]:
        """Which of several actions that could start comes first: a place for every action."""
        actions, topology = self.work.actions, self.work.topology
        counts = {name: module.microbatches for name, module in topology.modules.items()}
        common = math.lcm(*counts.values())
        depth = {stage: info.depth for stage, info in topology.stages.items()}
        keys = [
            (
                action.kind is Kind.WEIGHT_GRADIENT,
                action.microbatch * (common // counts[action.stage.module]),
                depth[action.stage],
                action.stage.module,
                action.stage.pp,
            )
            for action in actions
        ]
        places = [0] * len(actions)
        for place, i in enumerate(sorted(range(len(actions)), key=keys.__getitem__)):
            places[i] = place
        return tuple(places)

    @functools.cached_property
    def pp_rank_of(self) -> tuple[int, ...]:
        """The pipeline rank of every action."""
        pp_rank = {stage: i for i, stages in enumerate(self.work.pp_ranks) for stage in stages}
        return tuple(pp_rank[action.stage] for action in self.work.actions)


def schedule(timed: TimedWork, queues: Sequence[IssueQueue]) -> tuple[int, ...]:
    """Let every pipeline rank work off its line; return all actions in the order in which they start."""
    return _Walk(timed, queues).run()


def retimed(timed: TimedWork, order: Sequence[int], queues: Sequence[IssueQueue]) -> float:
    """Return when an order ends whose ranks keep to it, whatever time it was made for.

    As in a program, data sets out when it is made and its receive is posted: when the action before the one
    that reads it is next.
    """
    pp_ranks = timed.work.pp_ranks
    ends_s = [0.0] * len(order)
    busy_until_s, posted_s = [0.0] * len(pp_ranks), [0.0] * len(pp_ranks)
    for action in order:
        pp_rank = timed.pp_rank_of[action]
        begin_s = busy_until_s[pp_rank]
        for need, delay in timed.sources[action]:
            begin_s = max(begin_s, max(ends_s[need], posted_s[pp_rank]) + delay)
        for reader in queues[pp_rank].backpressure.get(action, ()):
            begin_s = max(begin_s, ends_s[reader])
        ends_s[action] = begin_s + timed.seconds[action]
        for rival in timed.work.conflicts[pp_rank]:
            posted_s[rival] = busy_until_s[rival]
            busy_until_s[rival] = max(busy_until_s[rival], ends_s[action])
    return max(busy_until_s)


def lower_bound_s(timed: TimedWork, order: Sequence[int]) -> float:
    """Return seconds that no order of the same actions beats; `order` says only what may follow what.

    The sets (`bounds`) are all actions of each pipeline rank, its forwards alone, and its other actions alone.
    """
    heads = longest_before_s(order, timed.sources, timed.seconds)
    tails = longest_before_s(reversed(order), timed.followers, timed.seconds)
    sets: dict[tuple[int, bool | None], list[int]] = {}
    for action, pp_rank in enumerate(timed.pp_rank_of):
        forward = timed.work.actions[action].kind is Kind.FORWARD
        for key in ((pp_rank, None), (pp_rank, forward)):
            sets.setdefault(key, []).append(action)
    return max(
        bound_s((heads[i] for i in each), sum(timed.seconds[i] for i in each), (tails[i] for i in each))
        for each in sets.values()
    )


class _Progress:
    """How far a pipeline rank is: its next actions, forwards ahead of backwards, and pending weight gradients."""

    def __init__(self, queue: IssueQueue, work: Work) -> None:
        self.queue = queue
        self.forwards_ahead = self.weight_grads_owed = 0
        mine = queue.sequences
        self._returns = frozenset(i for i in mine.forwards if work.holds[i])
        self._owes = frozenset(i for i in mine.backwards if not work.holds[i])
        self._forwards, self._backwards, self._weights = (
            iter(each) for each in (mine.forwards, mine.backwards, mine.weights)
        )
        self.forward = next(self._forwards, None)
        self.backward = next(self._backwards, None)
        self.weight = next(self._weights, None)

    def wanted(self) -> tuple[int | None, ...]:
        """Return what the pipeline rank would do next; several if it would take the first that is ready."""
        if self.weight_grads_owed > self.queue.weight_grad_backlog:
            return (self.weight,)
        if self.forward is None:
            return (self.backward, self.weight)
        goes_on = self.forwards_ahead < self.queue.max_in_flight or self.backward is None
        return (self.forward if goes_on else self.backward,)

    def start(self, action: int) -> None:
        """Note that one of the actions that are wanted has started."""
        if action == self.forward:
            self.forward = next(self._forwards, None)
            self.forwards_ahead += action in self._returns
        elif action == self.backward:
            self.backward = next(self._backwards, None)
            self.forwards_ahead -= 1
            self.weight_grads_owed += action in self._owes
        else:
            self.weight = next(self._weights, None)
            self.weight_grads_owed -= 1


class _Walk:
    """The walk's state: open needs of each action, when it is ready, and until when each pipeline rank is busy."""

    def __init__(self, timed: TimedWork, queues: Sequence[IssueQueue]) -> None:
        self.timed = timed
        work = timed.work
        self.turns = [_Progress(queue, work) for queue in queues]
        self.missing = [len(needs) for needs in work.needs]
        self.ready_s = [0.0] * len(work.actions)
        self.busy_until_s = [0.0] * len(work.pp_ranks)
        self.events: list[tuple[float, int]] = [(0.0, pp_rank) for pp_rank in range(len(work.pp_ranks))]
        self.order: list[int] = []
        self.makes_room: dict[int, list[int]] = {}
        for queue in queues:
            for action, readers in queue.backpressure.items():
                self.missing[action] += len(readers)
                for reader in readers:
                    self.makes_room.setdefault(reader, []).append(action)

    def run(self) -> tuple[int, ...]:
        """Go from event to event until nothing is left to happen."""
        while self.events:
            now, pp_rank = heapq.heappop(self.events)
            pp_ranks = {pp_rank}
            while self.events and self.events[0][0] == now:
                pp_ranks.add(heapq.heappop(self.events)[1])
            self._start_all(pp_ranks, now)
        assert len(self.order) == len(self.missing), f"the order is stuck after {len(self.order)} actions"
        return tuple(self.order)

    def _start_all(self, pp_ranks: set[int], now: float) -> None:
        """Start what these pipeline ranks want and can start, the most urgent first."""
        startable: list[tuple[int, int, int]] = []
        for pp_rank in pp_ranks:
            if self.busy_until_s[pp_rank] <= now:
                action = self._ready(pp_rank, now)
                if action is not None:
                    startable.append((self.timed.priority[action], action, pp_rank))
        for _, action, pp_rank in sorted(startable):
            if self.busy_until_s[pp_rank] <= now:
                self._start(action, pp_rank, now)

    def _ready(self, pp_rank: int, now: float) -> int | None:
        """Return the first of what a pipeline rank wants that is ready."""
        for action in self.turns[pp_rank].wanted():
            if action is not None and not self.missing[action] and self.ready_s[action] <= now:
                return action
        return None

    def _start(self, action: int, pp_rank: int, now: float) -> None:
        timed = self.timed
        end_s = now + timed.seconds[action]
        self.turns[pp_rank].start(action)
        self.order.append(action)
        for rival in timed.work.conflicts[pp_rank]:
            self.busy_until_s[rival] = max(self.busy_until_s[rival], end_s)
            heapq.heappush(self.events, (end_s, rival))
        for follower, delay in timed.followers[action]:
            self._give(follower, end_s + delay)
        for waiting in self.makes_room.get(action, ()):
            self._give(waiting, end_s)

    def _give(self, action: int, at_s: float) -> None:
        """One of the things that an action needs will be there at a time."""
        self.ready_s[action] = max(self.ready_s[action], at_s)
        self.missing[action] -= 1
        if not self.missing[action]:
            heapq.heappush(self.events, (self.ready_s[action], self.timed.pp_rank_of[action]))
