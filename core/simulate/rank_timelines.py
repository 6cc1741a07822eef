"""Tracks: a simulated step, in which one rank has a track for all that live through the step alike.

What is asked of one rank is answered by the track of whoever stands for it, so a step of thousands of ranks is as small
as that of their classes (`fold`).
"""

import functools
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Action, Send, Transfer
from mimogrid.core.simulate.rank_classes import Classes
from mimogrid.core.simulate.timeline import (
    CAUSES,
    Event,
    Flight,
    Idle,
    busy_s,
    idles_of,
    peak_in_flight,
    sent_as,
)
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class PathSegment:
    """A part of the critical path: an action, or the way of a message, which is its `Send`, from begin to end."""

    rank: int
    action: Action
    begin_s: float
    end_s: float


@attrs.frozen
class RankTimeline:
    """What one rank does when, and when each message of its transfers is on the way, in order of rows."""

    events: tuple[Event, ...]
    on_the_way: Mapping[Transfer, tuple[tuple[float, float], ...]]

    def posted(self) -> dict[Transfer, float]:
        """Return when both ends of the message of each transfer that arrives last had been posted."""
        return {
            transfer: max(ways, key=lambda way: way[::-1])[0]
            for transfer, ways in self.on_the_way.items()
            if ways
        }


@attrs.frozen(eq=False)
class Timeline:
    """A simulated step.

    Attributes:
        program: what was timed.
        classes: which rank stands for which.
        tracks: the track of every rank that stands for others.
        step_s: when the last rank is through.
        limit_s: a lower bound of `step_s` (`limit`).
        critical_path: what the step waited for, from its begin to its end, one leg after the other.
        by_lanes: a rank stands for all of its dp rank (`collapsed`), and the messages of each are not known.
    """

    program: Program
    classes: Classes
    rank_timelines: Mapping[int, RankTimeline]
    step_s: float
    limit_s: float
    critical_path: tuple[PathSegment, ...]
    by_dp_ranks: bool = False

    @property
    def ratio_to_limit(self) -> float:
        """How many times longer the step takes than the lower bound; 1 if both are nothing."""
        return self.step_s / self.limit_s if self.limit_s else 1.0

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they compute nothing; ranks without a module do not count."""
        whole = self.step_s * len(self.classes.leader)
        busy = sum(self._busy_s[rank] * len(ranks) for rank, ranks in self.classes.members.items())
        return 1 - busy / whole if whole else 0.0

    @functools.cached_property
    def busy_s(self) -> Mapping[int, float]:
        """Return how long each rank computes."""
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
        """How many microbatches each stage holds at most on any rank."""
        return peak_in_flight(
            event for rank_timeline in self.rank_timelines.values() for event in rank_timeline.events
        )

    @functools.cached_property
    def events(self) -> tuple[Event, ...]:
        """The events of every rank, in order of its program. In a large world these are many."""
        return tuple(event for rank in self.classes.leader for event in self.events_of(rank))

    @functools.cached_property
    def flights(self) -> tuple[Flight, ...]:
        """Every message on its way."""
        return tuple(
            flight
            for rank in self.classes.leader
            for flight in self.flights_of(rank)
            if flight.rank_source == rank
        )

    @functools.cached_property
    def idles(self) -> tuple[Idle, ...]:
        """When each rank computes nothing, and why."""
        return tuple(
            attrs.evolve(idle, rank=rank)
            for rank, first in self.classes.leader.items()
            for idle in self._idles[first]
        )

    def events_and_flights(
        self, ranks: Iterable[int] | None = None
    ) -> tuple[tuple[Event, ...], tuple[Flight, ...]]:
        """Return what these ranks (default: all) do, and the messages between them and any others."""
        if ranks is None:
            return self.events, self.flights
        chosen = list(ranks)
        events = tuple(event for rank in chosen for event in self.events_of(rank))
        return events, tuple(dict.fromkeys(flight for rank in chosen for flight in self.flights_of(rank)))

    def events_of(self, rank: int) -> tuple[Event, ...]:
        """Return what a rank does when, in order of its program."""
        first = self.classes.leader[rank]
        events = self.rank_timelines[first].events
        if rank == first:
            return events
        return tuple(Event(rank, event.action, event.begin_s, event.end_s) for event in events)

    def flights_of(self, rank: int) -> Iterator[Flight]:
        """Yield the messages that a rank sends and receives, where they are known."""
        if self.by_dp_ranks:
            return
        for transfer, ways in self.rank_timelines[self.classes.leader[rank]].on_the_way.items():
            sends = isinstance(transfer, Send)
            for peer, (begin, end) in zip(self.program.peers_of(rank, transfer), ways, strict=True):
                ends = (rank, peer) if sends else (peer, rank)
                yield Flight(*ends, sent_as(transfer), begin, end)

    @functools.cached_property
    def _busy_s(self) -> Mapping[int, float]:
        return {
            rank: busy_s(rank_timeline.events).get(rank, 0.0)
            for rank, rank_timeline in self.rank_timelines.items()
        }

    @functools.cached_property
    def _idles(self) -> Mapping[int, tuple[Idle, ...]]:
        return {
            rank: tuple(
                idles_of(rank, rank_timeline.events, rank_timeline.posted(), whole=(0.0, self.step_s))
            )
            for rank, rank_timeline in self.rank_timelines.items()
        }


def spread(timeline: Timeline, program: Program, standing: Mapping[int, int]) -> Timeline:
    """Return the timeline of a collapsed program as that of the whole one; `standing` says who stands for each rank."""
    first: dict[int, int] = {}
    for rank, stands in standing.items():
        first[stands] = min(rank, first.get(stands, rank))
    leader = {rank: first[timeline.classes.leader[stands]] for rank, stands in sorted(standing.items())}
    members: dict[int, list[int]] = {rank: [rank] for rank in leader.values()}
    for rank, stands in leader.items():
        members[stands] += [rank] if rank != stands else []
    rank_timelines = {
        first[rank]: RankTimeline(
            tuple(
                Event(first[rank], event.action, event.begin_s, event.end_s) for event in rank_timeline.events
            ),
            rank_timeline.on_the_way,
        )
        for rank, rank_timeline in timeline.rank_timelines.items()
    }
    return Timeline(
        program=program,
        classes=Classes(leader, {rank: tuple(ranks) for rank, ranks in members.items()}),
        rank_timelines=rank_timelines,
        step_s=timeline.step_s,
        limit_s=timeline.limit_s,
        critical_path=tuple(
            attrs.evolve(segment, rank=first[segment.rank]) for segment in timeline.critical_path
        ),
        by_dp_ranks=True,
    )
