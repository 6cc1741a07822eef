"""Measured: what ranks did in a step, by their clocks, as a timeline; and the costs that follow from it.

A message was on its way from when both ends had posted it until, at the latest, its receiver went on. So a measured
rank idles for the same causes as a simulated one. A plan with the mean costs of what was measured computes as long;
where the two differ, somebody waited.
"""

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence

import attrs

from mimogrid.core.costs import Costs, StageCosts
from mimogrid.core.fold import alone
from mimogrid.core.schedule.actions import (
    Compute,
    Kind,
    Norm,
    Send,
    Transfer,
    Update,
    Wait,
    WaitReduce,
    other_end,
)
from mimogrid.core.schedule.lower import Program
from mimogrid.core.simulate.tracks import Timeline, Track
from mimogrid.core.timeline import Event, by_rank, span
from mimogrid.core.topology import Stage


def measured(program: Program, events: Iterable[Event]) -> Timeline:
    """Return the timeline of what all ranks of a program did. It begins at 0, and has no limit or critical path."""
    mine = on_one_clock(by_rank(events))
    begin, end = span([event for found in mine.values() for event in found])
    moved = {rank: [_later(event, -begin) for event in found] for rank, found in mine.items()}
    posted = {
        (rank, event.action): event.begin_s
        for rank, found in moved.items()
        for event in found
        if isinstance(event.action, Transfer)
    }
    waited = {
        (rank, event.action.transfer): event.end_s
        for rank, found in moved.items()
        for event in found
        if isinstance(event.action, Wait)
    }

    def way(rank: int, transfer: Transfer, peer: int) -> tuple[float, float]:
        ends = (rank, transfer), (peer, other_end(transfer))
        begin_s = max(posted[each] for each in ends)
        return begin_s, max(begin_s, waited[ends[isinstance(transfer, Send)]])

    tracks = {
        rank: Track(
            tuple(found),
            {
                event.action: tuple(
                    way(rank, event.action, peer) for peer in program.peers_of(rank, event.action)
                )
                for event in found
                if isinstance(event.action, Transfer)
            },
        )
        for rank, found in moved.items()
    }
    return Timeline(
        program=program,
        classes=alone(tuple(tracks)),
        tracks=tracks,
        step_s=end - begin,
        limit_s=0.0,
        critical_path=(),
    )


def on_one_clock(mine: Mapping[int, Sequence[Event]]) -> dict[int, list[Event]]:
    """Return the events of ranks on the clock of the first.

    All ranks are in NORM at one moment: none leaves it before the last has come. Where clocks say otherwise, they are
    not one, as on several hosts, and each is set so that its NORM ends when that of the first rank does.
    """
    norms = {rank: event for rank, found in mine.items() for event in found if isinstance(event.action, Norm)}
    came = max((norm.begin_s for norm in norms.values()), default=0.0)
    left = min((norm.end_s for norm in norms.values()), default=came)
    if came <= left or len(norms) < len(mine):
        return {rank: list(found) for rank, found in mine.items()}
    first = next(iter(norms.values())).end_s
    return {
        rank: [_later(event, first - norms[rank].end_s) for event in found] for rank, found in mine.items()
    }


def mean_costs(events: Iterable[Event]) -> Costs:
    """Return the costs of what was measured: the mean of each kind of action of a stage; messages cost nothing.

    Of a sum over lanes it is the shortest wait for it, that of the lane that came last: the others waited for it, too.
    What went on while the lanes computed is not in it.
    """
    computed: dict[Stage, dict[Kind, list[float]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    reduced: dict[Stage, dict[int, list[float]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    updated: dict[Stage, list[float]] = collections.defaultdict(list)
    for found in by_rank(events).values():
        hosted = dict.fromkeys(event.action.stage for event in found if isinstance(event.action, Compute))
        for event in found:
            seconds = event.end_s - event.begin_s
            match event.action:
                case Compute(kind=kind, stage=stage):
                    computed[stage][kind].append(seconds)
                case WaitReduce(stage, bucket):
                    reduced[stage][bucket].append(seconds)
                case Update():
                    for stage in hosted:
                        updated[stage].append(seconds / len(hosted))
                case _:
                    pass
    return Costs(
        stages={
            str(stage): StageCosts(
                forward=_mean(kinds, Kind.FORWARD) or 0.0,
                backward=_mean(kinds, Kind.BACKWARD),
                input_gradient=_mean(kinds, Kind.INPUT_GRADIENT),
                weight_gradient=_mean(kinds, Kind.WEIGHT_GRADIENT),
                reduce=sum(map(min, reduced[stage].values())),
                update=statistics.fmean(updated[stage]) if updated[stage] else 0.0,
            )
            for stage, kinds in computed.items()
        }
    )


def _mean(kinds: Mapping[Kind, Sequence[float]], kind: Kind) -> float | None:
    return statistics.fmean(kinds[kind]) if kind in kinds else None


def _later(event: Event, seconds: float) -> Event:
    return attrs.evolve(event, begin_s=event.begin_s + seconds, end_s=event.end_s + seconds)
