"""Timelines: who did what from when to when, planned by `simulate` or measured by an executor.

A timeline is a sequence of events in which each rank's stand in the order of its program. From them alone
follow how busy a rank was and why it idled. Idle is all the time in which a rank computes nothing:

- *edge*: what it waits for has been posted by both ends and is on its way;
- *warm_up*: before its first backward (its first forward, if it has no backward);
- *drain*: after its last forward, for the gradients still to come and for the step to end;
- *slower_module*: in between, for a stage that takes longer than this one.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.schedule.actions import Action, Compute, Kind, Recv, Send, Transfer, Wait, matching_op
from mimogrid.core.topology.topology import Stage


WARM_UP, DRAIN, EDGE, SLOWER_MODULE = "warm_up", "drain", "edge", "slower_module"
CAUSES: tuple[str, ...] = (WARM_UP, EDGE, SLOWER_MODULE, DRAIN)
CAUSES_IN_WORDS = {
    WARM_UP: "warm-up",
    SLOWER_MODULE: "waits for a slower stage",
    EDGE: "waits for a message",
    DRAIN: "drain",
}


@attrs.frozen
class Event:
    """An action of a rank with its begin and end, in seconds of one clock for all ranks."""

    rank: int
    action: Action
    begin_s: float
    end_s: float


@attrs.frozen
class Flight:
    """A message on its way: from the moment at which both ends have posted it until it is there."""

    rank_source: int
    rank_target: int
    transfer: Send
    begin_s: float
    end_s: float


@attrs.frozen
class Idle:
    """A rank that computes nothing for a while, and why."""

    rank: int
    cause: str
    begin_s: float
    end_s: float


def by_rank(events: Iterable[Event]) -> dict[int, list[Event]]:
    """Return each rank's events, ranks ascending."""
    found: dict[int, list[Event]] = collections.defaultdict(list)
    for event in events:
        found[event.rank].append(event)
    return dict(sorted(found.items()))


def span(events: Sequence[Event]) -> tuple[float, float]:
    """Return when the first event begins and the last one ends."""
    begin = min((event.begin_s for event in events), default=0.0)
    return begin, max((event.end_s for event in events), default=begin)


def busy_s(events: Sequence[Event]) -> dict[int, float]:
    """Return how long each rank computes."""
    return {
        rank: sum(event.end_s - event.begin_s for event in mine if isinstance(event.action, Compute))
        for rank, mine in by_rank(events).items()
    }


def idles(events: Sequence[Event], flights: Iterable[Flight] = ()) -> tuple[Idle, ...]:
    """Return when each rank computes nothing, and why. Without flights, no cause is *edge*."""
    begin, end = span(events)
    posted: dict[int, dict[Transfer, float]] = collections.defaultdict(dict)
    for flight in sorted(flights, key=lambda flight: (flight.end_s, flight.begin_s)):
        posted[flight.rank_source][flight.transfer] = flight.begin_s
        posted[flight.rank_target][matching_op(flight.transfer)] = flight.begin_s
    return tuple(
        idle
        for rank, mine in by_rank(events).items()
        for idle in idles_of(rank, mine, posted[rank], whole=(begin, end))
    )


def idles_of(
    rank: int, events: Sequence[Event], posted: Mapping[Transfer, float], *, whole: tuple[float, float]
) -> Iterator[Idle]:
    """Yield when one rank computes nothing in the `whole` step, and why.

    `posted` tells of its transfers when both ends of the last message to arrive had been posted.
    """
    begin, end = whole
    forwards = [e for e in events if _is_forward(e.action)]
    computes = [e for e in events if isinstance(e.action, Compute)]
    backwards = [e for e in computes if not _is_forward(e.action)]
    first = backwards or forwards
    warm_until = first[0].begin_s if first else end
    drains_from = max(warm_until, forwards[-1].end_s) if forwards else end
    phases = (
        (WARM_UP, begin, warm_until),
        (SLOWER_MODULE, warm_until, drains_from),
        (DRAIN, drains_from, end),
    )
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


def idle_s(found: Iterable[Idle]) -> dict[str, float]:
    """Return the seconds of idling by cause, summed over ranks."""
    total = dict.fromkeys(CAUSES, 0.0)
    for idle in found:
        total[idle.cause] += idle.end_s - idle.begin_s
    return total


def peak_in_flight(events: Iterable[Event]) -> dict[Stage, int]:
    """Return how many microbatches a stage holds at most on any rank.

    A microbatch is in flight from the start of its forward to the end of its backward, or of its weight
    gradient. A stage that runs no backward holds what it computes, and nothing after that.
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
    """Return a transfer as its sender calls it.

    >>> from mimogrid.core.schedule.actions import parse
    >>> print(sent_as(parse("language.0 RECV_F2 <- vision.0")))
    vision.0 SEND_F2 -> language.0
    """
    if isinstance(transfer, Recv):
        return Send(transfer.peer, transfer.direction, transfer.microbatch, transfer.stage)
    return transfer


def _edge_begin(event: Event, posted: Mapping[Transfer, float]) -> float | None:
    """From when on an event is only the time that a message takes; None where it is anything else."""
    match event.action:
        case Send() if event.end_s > event.begin_s and event.action in posted:
            return event.begin_s
        case Wait(transfer=transfer):
            return posted.get(transfer)
        case _:
            return None


def _is_forward(action: Action) -> bool:
    return isinstance(action, Compute) and action.kind is Kind.FORWARD
