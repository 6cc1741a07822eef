"""The list scheduler: one walk in time that makes every order.

A team's *line* says what it would do next, and it waits for that:

    forwards until they are `credit` microbatches ahead of the backwards, then a backward before each forward;
    where backwards are split, a weight gradient as soon as more than `lag` of them are owed

Once there is no forward left, what is ready comes first: backwards, then weight gradients, which nobody waits
for.

The walk starts what is wanted and ready as soon as the team's ranks are free, in order of (microbatch, depth,
name), and never runs two teams that share a rank at once. So its result has been done once: whatever the ranks
do in that order is free of deadlock.
"""

import functools
import heapq
import math
from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.work import Sequences, Work
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class Line:
    """A team's turns: its actions by kind, each in order, and by what rule it chooses among them.

    Attributes:
        sequences: its actions.
        credit: how many forwards may be ahead of backwards.
        lag: how many weight gradients may be owed to gradients of inputs.
        room: before each forward of a stage without backward, those that must have read earlier outputs.
    """

    sequences: Sequences
    credit: float = math.inf
    lag: float = math.inf
    room: Mapping[int, tuple[int, ...]] = attrs.field(factory=dict[int, tuple[int, ...]])


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
    def team_of(self) -> tuple[int, ...]:
        """The team of every action."""
        team = {stage: i for i, stages in enumerate(self.work.teams) for stage in stages}
        return tuple(team[action.stage] for action in self.work.actions)


def schedule(timed: TimedWork, lines: Sequence[Line]) -> tuple[int, ...]:
    """Let every team work off its line; return all actions in the order in which they start."""
    return _Walk(timed, lines).run()


def retimed(timed: TimedWork, order: Sequence[int], lines: Sequence[Line]) -> float:
    """Return when an order ends whose ranks keep to it, whatever time it was made for.

    As in a program, data sets out when it is made and its receive is posted: when the action before the one
    that reads it is next.
    """
    teams = timed.work.teams
    ends_s = [0.0] * len(order)
    busy_until_s, posted_s = [0.0] * len(teams), [0.0] * len(teams)
    for action in order:
        team = timed.team_of[action]
        begin_s = busy_until_s[team]
        for need, delay in timed.sources[action]:
            begin_s = max(begin_s, max(ends_s[need], posted_s[team]) + delay)
        for reader in lines[team].room.get(action, ()):
            begin_s = max(begin_s, ends_s[reader])
        ends_s[action] = begin_s + timed.seconds[action]
        for rival in timed.work.rivals[team]:
            posted_s[rival] = busy_until_s[rival]
            busy_until_s[rival] = max(busy_until_s[rival], ends_s[action])
    return max(busy_until_s)


def limit_s(timed: TimedWork, order: Sequence[int]) -> float:
    """Return what no order of the same actions could beat; the one given says only what may follow what.

    Of any team, and of its forwards or its other actions alone: the shortest way in to one of them, all their
    work, the shortest way out.
    """
    heads, tails = [0.0] * len(order), [0.0] * len(order)
    for action in order:
        for follower, delay in timed.followers[action]:
            heads[follower] = max(heads[follower], heads[action] + timed.seconds[action] + delay)
    for action in reversed(order):
        for follower, delay in timed.followers[action]:
            tails[action] = max(tails[action], tails[follower] + timed.seconds[follower] + delay)
    sets: dict[tuple[int, bool | None], list[int]] = {}
    for action, team in enumerate(timed.team_of):
        forward = timed.work.actions[action].kind is Kind.FORWARD
        for key in ((team, None), (team, forward)):
            sets.setdefault(key, []).append(action)
    return max(
        min(heads[i] for i in each) + sum(timed.seconds[i] for i in each) + min(tails[i] for i in each)
        for each in sets.values()
    )


class _Turns:
    """How far a team is along its line: what comes next, how far forwards are ahead, which weights are owed."""

    def __init__(self, line: Line, work: Work) -> None:
        self.line = line
        self.ahead = self.owed = 0
        mine = line.sequences
        self._returns = frozenset(i for i in mine.forwards if work.holds[i])
        self._owes = frozenset(i for i in mine.backwards if not work.holds[i])
        self._forwards, self._backwards, self._weights = (
            iter(each) for each in (mine.forwards, mine.backwards, mine.weights)
        )
        self.forward = next(self._forwards, None)
        self.backward = next(self._backwards, None)
        self.weight = next(self._weights, None)

    def wanted(self) -> tuple[int | None, ...]:
        """Return what the team would do next; several if it would take the first that is ready."""
        if self.owed > self.line.lag:
            return (self.weight,)
        if self.forward is None:
            return (self.backward, self.weight)
        goes_on = self.ahead < self.line.credit or self.backward is None
        return (self.forward if goes_on else self.backward,)

    def start(self, action: int) -> None:
        """Note that one of the actions that are wanted has started."""
        if action == self.forward:
            self.forward = next(self._forwards, None)
            self.ahead += action in self._returns
        elif action == self.backward:
            self.backward = next(self._backwards, None)
            self.ahead -= 1
            self.owed += action in self._owes
        else:
            self.weight = next(self._weights, None)
            self.owed -= 1


class _Walk:
    """The walk's state: what is missing before each action, from when on it is ready, until when teams work."""

    def __init__(self, timed: TimedWork, lines: Sequence[Line]) -> None:
        self.timed = timed
        work = timed.work
        self.turns = [_Turns(line, work) for line in lines]
        self.missing = [len(needs) for needs in work.needs]
        self.ready_s = [0.0] * len(work.actions)
        self.busy_until_s = [0.0] * len(work.teams)
        self.events: list[tuple[float, int]] = [(0.0, team) for team in range(len(work.teams))]
        self.order: list[int] = []
        self.makes_room: dict[int, list[int]] = {}
        for line in lines:
            for action, readers in line.room.items():
                self.missing[action] += len(readers)
                for reader in readers:
                    self.makes_room.setdefault(reader, []).append(action)

    def run(self) -> tuple[int, ...]:
        """Go from event to event until nothing is left to happen."""
        while self.events:
            now, team = heapq.heappop(self.events)
            teams = {team}
            while self.events and self.events[0][0] == now:
                teams.add(heapq.heappop(self.events)[1])
            self._start_all(teams, now)
        assert len(self.order) == len(self.missing), f"the order is stuck after {len(self.order)} actions"
        return tuple(self.order)

    def _start_all(self, teams: set[int], now: float) -> None:
        """Start what these teams want and can start, the most urgent first."""
        startable: list[tuple[int, int, int]] = []
        for team in teams:
            if self.busy_until_s[team] <= now:
                action = self._ready(team, now)
                if action is not None:
                    startable.append((self.timed.priority[action], action, team))
        for _, action, team in sorted(startable):
            if self.busy_until_s[team] <= now:
                self._start(action, team, now)

    def _ready(self, team: int, now: float) -> int | None:
        """Return the first of what a team wants that is ready."""
        for action in self.turns[team].wanted():
            if action is not None and not self.missing[action] and self.ready_s[action] <= now:
                return action
        return None

    def _start(self, action: int, team: int, now: float) -> None:
        timed = self.timed
        end_s = now + timed.seconds[action]
        self.turns[team].start(action)
        self.order.append(action)
        for rival in timed.work.rivals[team]:
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
            heapq.heappush(self.events, (self.ready_s[action], self.timed.team_of[action]))
