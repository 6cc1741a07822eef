"""The list scheduler: it makes every order, by issuing the actions once on a clock.

Each pipeline rank has an issue queue (`IssueQueue`), which says what it runs next. It waits until that action is
ready:

    forwards, until `max_in_flight` of them are ahead of the backwards; then a backward before each further forward;
    with split backwards, a weight gradient as soon as more than `weight_grad_backlog` of them are pending

When no forward is left, it runs what is ready: the next backward, else the next weight gradient, which nothing
waits for.

An action starts when its pipeline rank wants it, what it needs is there, and the ranks are free. If several can start,
the one with the lowest (microbatch, depth, name) starts first. Two pipeline ranks that share a rank never run at
the same time. So the result is an order that has been executed once, and ranks that follow it cannot deadlock.
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
    """The actions of a pipeline rank, and the limits by which it chooses the next one.

    Attributes:
        sequences: Its actions by kind, each in order.
        max_in_flight: How many forwards may be ahead of the backwards.
        weight_grad_backlog: How many weight gradients may be pending after their gradients of inputs.
        backpressure: For forwards of stages without backward, the forwards that must have read an earlier output.
    """

    sequences: Sequences
    max_in_flight: float = math.inf
    weight_grad_backlog: float = math.inf
    backpressure: Mapping[int, tuple[int, ...]] = attrs.field(factory=dict[int, tuple[int, ...]])


@attrs.frozen(eq=False)
class TimedWork:
    """Work with the seconds of each action, and the delay of data from one stage to another."""

    work: Work
    seconds: tuple[float, ...]
    delay: Mapping[tuple[Stage, Stage], float] = attrs.field(factory=dict[tuple[Stage, Stage], float])

    @functools.cached_property
    def sources(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """For every action, the actions that it needs and the delays of their results."""
        actions = self.work.actions
        return tuple(
            tuple((need, self.delay.get((actions[need].stage, action.stage), 0.0)) for need in needs)
            for action, needs in zip(actions, self.work.needs, strict=True)
        )

    @functools.cached_property
    def followers(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """For every action, the actions that need it and the delays of its result."""
        found: list[list[tuple[int, float]]] = [[] for _ in self.sources]
        for action, sources in enumerate(self.sources):
            for need, delay in sources:
                found[need].append((action, delay))
        return tuple(map(tuple, found))


def schedule(timed: TimedWork, queues: Sequence[IssueQueue]) -> tuple[int, ...]:
    """Run the queue of every pipeline rank; return the numbers of all actions in the order in which they start."""
    return _Scheduler(timed, queues).run()


def retimed(timed: TimedWork, order: Sequence[int], queues: Sequence[IssueQueue]) -> float:
    """Return the seconds of a step whose ranks follow an order, whatever times the order was made for.

    As in a program, a message starts when its data is made and its receive is posted: when the action before the
    one that reads it is next.
    """
    pp_ranks, conflicts = timed.work.pp_ranks, timed.work.conflicts
    sources, seconds, pp_rank_of = timed.sources, timed.seconds, timed.work.pp_rank_of
    ends_s = [0.0] * len(order)
    busy_until_s, posted_s = [0.0] * len(pp_ranks), [0.0] * len(pp_ranks)
    for action in order:
        pp_rank = pp_rank_of[action]
        begin_s = busy_until_s[pp_rank]
        posted = posted_s[pp_rank]
        for need, delay in sources[action]:
            sent_s = ends_s[need]
            arrived_s = (max(posted, sent_s)) + delay
            begin_s = max(begin_s, arrived_s)
        for reader in queues[pp_rank].backpressure.get(action, ()):
            begin_s = max(begin_s, ends_s[reader])
        ends_s[action] = end_s = begin_s + seconds[action]
        for sharing in conflicts[pp_rank]:
            posted_s[sharing] = busy_s = busy_until_s[sharing]
            if end_s > busy_s:
                busy_until_s[sharing] = end_s
    return max(busy_until_s)


def lower_bound_s(timed: TimedWork, order: Sequence[int]) -> float:
    """Return seconds that no order of the same actions beats; `order` is one of these orders.

    The sets of the bound (`bounds`) are the actions of each pipeline rank, its forwards, and its other actions.
    """
    heads = longest_before_s(order, timed.sources, timed.seconds)
    tails = longest_before_s(reversed(order), timed.followers, timed.seconds)
    sets: dict[tuple[int, bool | None], list[int]] = {}
    for action, pp_rank in enumerate(timed.work.pp_rank_of):
        forward = timed.work.actions[action].kind is Kind.FORWARD
        for key in ((pp_rank, None), (pp_rank, forward)):
            sets.setdefault(key, []).append(action)
    return max(
        bound_s((heads[i] for i in each), sum(timed.seconds[i] for i in each), (tails[i] for i in each))
        for each in sets.values()
    )


class _Progress:
    """How far a pipeline rank is in its queue: its next actions, forwards ahead, pending weight gradients."""

    def __init__(self, queue: IssueQueue, work: Work) -> None:
        self.queue = queue
        self.forwards_ahead = self.weight_grads_pending = 0
        sequences = queue.sequences
        self._with_backward = frozenset(i for i in sequences.forwards if work.holds[i])
        self._with_weight_grad = frozenset(i for i in sequences.backwards if not work.holds[i])
        self._forwards, self._backwards, self._weights = (
            iter(each) for each in (sequences.forwards, sequences.backwards, sequences.weights)
        )
        self.forward = next(self._forwards, None)
        self.backward = next(self._backwards, None)
        self.weight = next(self._weights, None)

    def wanted(self) -> tuple[int | None, ...]:
        """Return the next action; several if the pipeline rank runs the first of them that is ready."""
        if self.weight_grads_pending > self.queue.weight_grad_backlog:
            return (self.weight,)
        if self.forward is None:
            return (self.backward, self.weight)
        runs_ahead = self.forwards_ahead < self.queue.max_in_flight or self.backward is None
        return (self.forward if runs_ahead else self.backward,)

    def start(self, action: int) -> None:
        """Note that one of the wanted actions has started."""
        if action == self.forward:
            self.forward = next(self._forwards, None)
            self.forwards_ahead += action in self._with_backward
        elif action == self.backward:
            self.backward = next(self._backwards, None)
            self.forwards_ahead -= 1
            self.weight_grads_pending += action in self._with_weight_grad
        else:
            self.weight = next(self._weights, None)
            self.weight_grads_pending -= 1


class _Scheduler:
    """The state of a schedule in the making.

    Attributes:
        progress: How far each pipeline rank is.
        missing: For each action, how many of the actions that it waits for have not started.
        ready_s: For each action, when the last of these delivers, as far as they have started.
        busy_until_s: When each pipeline rank is free.
        events: A heap of (seconds, pipeline rank): when a pipeline rank may be able to start something; of ~(pipeline
            rank): when all that share a rank with it may be.
        order: The actions that have started.
    """

    def __init__(self, timed: TimedWork, queues: Sequence[IssueQueue]) -> None:
        self.timed = timed
        work = timed.work
        self.progress = [_Progress(queue, work) for queue in queues]
        self.missing = [len(needs) for needs in work.needs]
        self.ready_s = [0.0] * len(work.actions)
        self.busy_until_s = [0.0] * len(work.pp_ranks)
        self.events = [(0.0, pp_rank) for pp_rank in range(len(work.pp_ranks))]
        self.order: list[int] = []
        self.held_back_by: dict[int, list[int]] = {}
        for queue in queues:
            for action, readers in queue.backpressure.items():
                self.missing[action] += len(readers)
                for reader in readers:
                    self.held_back_by.setdefault(reader, []).append(action)

    def run(self) -> tuple[int, ...]:
        """Go from event to event until all actions have started."""
        conflicts = self.timed.work.conflicts
        while self.events:
            now, pp_ranks = self.events[0][0], set[int]()
            while self.events and self.events[0][0] == now:
                _, pp_rank = heapq.heappop(self.events)
                if pp_rank < 0:
                    pp_ranks.update(conflicts[~pp_rank])
                else:
                    pp_ranks.add(pp_rank)
            self._start_all(pp_ranks, now)
        assert len(self.order) == len(self.missing), f"the order is stuck after {len(self.order)} actions"
        return tuple(self.order)

    def _start_all(self, pp_ranks: set[int], now: float) -> None:
        """Start what these pipeline ranks want and can start, by priority."""
        startable: list[tuple[int, int, int]] = []
        for pp_rank in pp_ranks:
            if self.busy_until_s[pp_rank] <= now:
                action = self._ready(pp_rank, now)
                if action is not None:
                    startable.append((self.timed.work.priority[action], action, pp_rank))
        for _, action, pp_rank in sorted(startable):
            if self.busy_until_s[pp_rank] <= now:
                self._start(action, pp_rank, now)

    def _ready(self, pp_rank: int, now: float) -> int | None:
        """Return the first of the actions that a pipeline rank wants that is ready."""
        for action in self.progress[pp_rank].wanted():
            if action is not None and not self.missing[action] and self.ready_s[action] <= now:
                return action
        return None

    def _start(self, action: int, pp_rank: int, now: float) -> None:
        timed = self.timed
        end_s = now + timed.seconds[action]
        self.progress[pp_rank].start(action)
        self.order.append(action)
        for sharing in timed.work.conflicts[pp_rank]:
            self.busy_until_s[sharing] = max(self.busy_until_s[sharing], end_s)
        heapq.heappush(self.events, (end_s, ~pp_rank))
        for follower, delay in timed.followers[action]:
            self._deliver(follower, end_s + delay)
        for held_back in self.held_back_by.get(action, ()):
            self._deliver(held_back, end_s)

    def _deliver(self, action: int, at_s: float) -> None:
        """Note when one of the results that an action waits for is there."""
        self.ready_s[action] = max(self.ready_s[action], at_s)
        self.missing[action] -= 1
        if not self.missing[action]:
            heapq.heappush(self.events, (self.ready_s[action], self.timed.work.pp_rank_of[action]))
