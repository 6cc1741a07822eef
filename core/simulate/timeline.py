"""Timelines: who did what from when to when in a step, planned by `simulate` or measured by an executor.

A `Timeline` has the events of one rank of each class, in the order of its program; the answers for the other ranks
follow from these. So a step of thousands of ranks is as small as that of its rank classes.

From the events alone follows why a rank idles. It idles whenever it computes nothing:

- *edge*: both ends have posted the message that it waits for, and the message is on its way;
- *warm_up*: before its first backward (its first forward, if it has no backward);
- *drain*: after its last forward, until the last gradients come and the step ends;
- *slower_module*: in between, for a stage that takes longer than this one.
"""

import collections
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Action, Compute, Kind, Recv, Send, Transfer, Wait
from mimogrid.core.simulate.rank_classes import RankClasses
from mimogrid.core.topology.topology import Stage


WARM_UP, DRAIN, EDGE, SLOWER_MODULE = "warm_up", "drain", "edge", "slower_module"
CAUSES: tuple[str, ...] = (WARM_UP, EDGE, SLOWER_MODULE, DRAIN)
CAUSES_IN_WORDS = {
    WARM_UP: "warm-up",
    SLOWER_MODULE: "waits for a slower stage",
    EDGE: "waits for a message",
    DRAIN: "drain",
}

Interval = tuple[float, float]
"""A begin and an end, in seconds."""


@attrs.frozen
class Event:
    """An action of a rank with its begin and end, in seconds of one clock for all ranks."""

    rank: int
    action: Action
    begin_s: float
    end_s: float


@attrs.frozen
class MessageInterval:
    """A message on its way: from the moment at which both ends have posted it until it has arrived."""

    rank_source: int
    rank_target: int
    transfer: Send
    begin_s: float
    end_s: float


@attrs.frozen
class Idle:
    """An interval in which a rank computes nothing, and the cause."""

    rank: int
    cause: str
    begin_s: float
    end_s: float


@attrs.frozen
class PathSegment:
    """A segment of the critical path: an action, or a message on its way, which is named by its `Send`."""

    rank: int
    action: Action
    begin_s: float
    end_s: float


@attrs.frozen
class RankTimeline:
    """The events of one rank, and for each of its transfers when each message is on its way, in order of rows."""

    events: tuple[Event, ...]
    on_the_way: Mapping[Transfer, tuple[Interval, ...]]

    def posted(self) -> dict[Transfer, float]:
        """Return when both ends of the last message to arrive of each transfer had been posted."""
        return {
            transfer: max(intervals, key=lambda interval: interval[::-1])[0]
            for transfer, intervals in self.on_the_way.items()
            if intervals
        }


@attrs.frozen(eq=False)
class Timeline:
    """A step in time.

    Attributes:
        program: what was timed.
        classes: which rank stands for which others.
        rank_timelines: the timeline of every rank that leads a class.
        step_s: when the last rank is done.
        lower_bound_s: seconds that no order of the same compute actions beats (`lower_bound`); 0 if measured.
        critical_path: what the step waited for, segment by segment from its begin to its end; empty if measured.
    """

    program: Program
    classes: RankClasses
    rank_timelines: Mapping[int, RankTimeline]
    step_s: float
    lower_bound_s: float
    critical_path: tuple[PathSegment, ...]

    @property
    def ratio_to_bound(self) -> float:
        """How many times as long as its lower bound the step takes; 1 if both are 0."""
        return self.step_s / self.lower_bound_s if self.lower_bound_s else 1.0

    @property
    def by_dp_ranks(self) -> bool:
        """Whether a rank stands for all of its dp rank; then the single messages are not known."""
        return self.classes.collapsed is not None

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they compute nothing; ranks without a module do not count."""
        whole = self.step_s * len(self.classes.leader)
        busy = sum(self._busy_s[rank] * len(ranks) for rank, ranks in self.classes.members.items())
        return 1 - busy / whole if whole else 0.0

    @functools.cached_property
    def busy_s(self) -> Mapping[int, float]:
        """The seconds that each rank computes."""
        return {rank: self._busy_s[first] for rank, first in self.classes.leader.items()}

    @functools.cached_property
    def idle_s(self) -> Mapping[str, float]:
        """Seconds of idling by cause, summed over ranks."""
        total = dict.fromkeys(CAUSES, 0.0)
        for rank, found in self._idles.items():
            for idle in found:
                total[idle.cause] += (idle.end_s - idle.begin_s) * len(self.classes.members[rank])
        return total

    @functools.cached_property
    def idle_s_by_rank(self) -> Mapping[int, Mapping[str, float]]:
        """Seconds of idling by rank and cause."""
        found: dict[int, dict[str, float]] = {}
        for rank, mine in self._idles.items():
            found[rank] = dict.fromkeys(CAUSES, 0.0)
            for idle in mine:
                found[rank][idle.cause] += idle.end_s - idle.begin_s
        return {rank: found[first] for rank, first in self.classes.leader.items()}

    @functools.cached_property
    def peak_in_flight(self) -> Mapping[Stage, int]:
        """How many microbatches each stage has in flight at most on any rank."""
        return peak_in_flight(event for mine in self.rank_timelines.values() for event in mine.events)

    @functools.cached_property
    def events(self) -> tuple[Event, ...]:
        """The events of every rank, in order of its program. In a large world these are many."""
        return tuple(event for rank in self.classes.leader for event in self.events_of(rank))

    @functools.cached_property
    def message_intervals(self) -> tuple[MessageInterval, ...]:
        """Every message on its way."""
        return tuple(
            message
            for rank in self.classes.leader
            for message in self.message_intervals_of(rank)
            if message.rank_source == rank
        )

    def events_of(self, rank: int) -> tuple[Event, ...]:
        """Return the events of a rank, in order of its program."""
        first = self.classes.leader[rank]
        events = self.rank_timelines[first].events
        if rank == first:
            return events
        return tuple(Event(rank, event.action, event.begin_s, event.end_s) for event in events)

    def idles_of(self, rank: int) -> tuple[Idle, ...]:
        """Return when a rank computes nothing, and why."""
        return tuple(attrs.evolve(idle, rank=rank) for idle in self._idles[self.classes.leader[rank]])

    def message_intervals_of(self, rank: int) -> Iterator[MessageInterval]:
        """Yield the messages that a rank sends and receives, where they are known."""
        if self.by_dp_ranks:
            return
        for transfer, intervals in self.rank_timelines[self.classes.leader[rank]].on_the_way.items():
            sends = isinstance(transfer, Send)
            for peer, (begin, end) in zip(self.program.peers_of(rank, transfer), intervals, strict=True):
                ends = (rank, peer) if sends else (peer, rank)
                yield MessageInterval(*ends, sent_as(transfer), begin, end)

    @functools.cached_property
    def _busy_s(self) -> Mapping[int, float]:
        return {rank: busy_s(mine.events).get(rank, 0.0) for rank, mine in self.rank_timelines.items()}

    @functools.cached_property
    def _idles(self) -> Mapping[int, tuple[Idle, ...]]:
        return {
            rank: tuple(idles_of(rank, mine.events, mine.posted(), whole=(0.0, self.step_s)))
            for rank, mine in self.rank_timelines.items()
        }


def spread(timeline: Timeline, program: Program, classes: RankClasses) -> Timeline:
    """Return the timeline of a collapsed program as that of the whole one, whose classes have `collapsed`."""
    assert classes.collapsed is not None
    leader = classes.collapsed.leader

    def moved(rank: int, mine: RankTimeline) -> RankTimeline:
        events = (Event(rank, event.action, event.begin_s, event.end_s) for event in mine.events)
        return RankTimeline(tuple(events), mine.on_the_way)

    return Timeline(
        program=program,
        classes=classes,
        rank_timelines={
            leader[rank]: moved(leader[rank], mine) for rank, mine in timeline.rank_timelines.items()
        },
        step_s=timeline.step_s,
        lower_bound_s=timeline.lower_bound_s,
        critical_path=tuple(attrs.evolve(each, rank=leader[each.rank]) for each in timeline.critical_path),
    )


# -- of events ---------------------------------------------------------------------------------------------


def by_rank(events: Iterable[Event]) -> dict[int, list[Event]]:
    """Return each rank's events, ranks ascending."""
    found: dict[int, list[Event]] = collections.defaultdict(list)
    for event in events:
        found[event.rank].append(event)
    return dict(sorted(found.items()))


def span(events: Sequence[Event]) -> Interval:
    """Return when the first event begins and the last one ends."""
    begin = min((event.begin_s for event in events), default=0.0)
    return begin, max((event.end_s for event in events), default=begin)


def busy_s(events: Sequence[Event]) -> dict[int, float]:
    """Return the seconds that each rank computes."""
    return {
        rank: sum(event.end_s - event.begin_s for event in mine if isinstance(event.action, Compute))
        for rank, mine in by_rank(events).items()
    }


def idles_of(
    rank: int, events: Sequence[Event], posted: Mapping[Transfer, float], *, whole: Interval
) -> Iterator[Idle]:
    """Yield when one rank computes nothing in the `whole` step, and why.

    `posted` has for each of its transfers when both ends of the last message to arrive had been posted.
    """
    begin, end = whole
    phases = _phases(events, whole)
    now = begin
    for event in (*events, None):
        edge = _edge_begin(event, posted) if event else None
        if event and edge is None and not isinstance(event.action, Compute):
            continue
        until = (event.begin_s if edge is None else max(edge, event.begin_s)) if event else end
        if now < until:
            for cause, start, stop in phases:
                if max(start, now) < min(stop, until):
                    yield Idle(rank, cause, max(start, now), min(stop, until))
        if event and edge is not None and event.end_s > max(until, now):
            yield Idle(rank, EDGE, max(until, now), event.end_s)
        now = max(now, event.end_s if event else end)


def _phases(events: Sequence[Event], whole: Interval) -> tuple[tuple[str, float, float], ...]:
    """Return from when to when idling of a rank is warm-up, waiting for a slower module, and drain."""
    begin, end = whole
    forwards = [e for e in events if _is_forward(e.action)]
    backwards = [e for e in events if isinstance(e.action, Compute) and not _is_forward(e.action)]
    first = backwards or forwards
    warm_until = first[0].begin_s if first else end
    drains_from = max(warm_until, forwards[-1].end_s) if forwards else end
    return (
        (WARM_UP, begin, warm_until),
        (SLOWER_MODULE, warm_until, drains_from),
        (DRAIN, drains_from, end),
    )


def _edge_begin(event: Event, posted: Mapping[Transfer, float]) -> float | None:
    """Return from when on an event only waits for a message that is on its way; None if it does something else."""
    match event.action:
        case Send() if event.end_s > event.begin_s and event.action in posted:
            return event.begin_s
        case Wait(transfer=transfer):
            return posted.get(transfer)
        case _:
            return None


def _is_forward(action: Action) -> bool:
    return isinstance(action, Compute) and action.kind is Kind.FORWARD


def peak_in_flight(events: Iterable[Event]) -> dict[Stage, int]:
    """Return how many microbatches a stage has in flight at most on any rank.

    A microbatch is in flight from the begin of its forward to the end of its backward, or of its weight gradient. A
    stage that runs no backward has in flight what it computes, and nothing after that.
    """
    peak: dict[Stage, int] = {}
    for mine in by_rank(events).values():
        computes = [event.action for event in mine if isinstance(event.action, Compute)]
        halves = {a.stage for a in computes if a.kind is Kind.WEIGHT_GRADIENT}
        ends = {a.stage: Kind.BACKWARD for a in computes if a.kind is Kind.BACKWARD}
        ends |= dict.fromkeys(halves, Kind.WEIGHT_GRADIENT)
        held: collections.Counter[Stage] = collections.Counter()
        for action in computes:
            held[action.stage] += action.kind is Kind.FORWARD
            peak[action.stage] = max(peak.get(action.stage, 0), held[action.stage])
            held[action.stage] -= action.kind is ends.get(action.stage, Kind.FORWARD)
    return peak


def sent_as(transfer: Transfer) -> Send:
    """Return a transfer by the name that its sender gives it.

    >>> from mimogrid.core.schedule.actions import parse
    >>> print(sent_as(parse("language.0 RECV_F2 <- vision.0")))
    vision.0 SEND_F2 -> language.0
    """
    if isinstance(transfer, Recv):
        return Send(transfer.peer, transfer.direction, transfer.microbatch, transfer.stage)
    return transfer
