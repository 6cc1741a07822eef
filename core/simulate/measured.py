"""Measured: what ranks did in a step, by their clocks, as a timeline, and the costs that follow from it.

A message is on its way from when both ends have posted it until, at the latest, its receiver goes on. So a measured
rank idles for the same causes as a simulated one. A simulation with the mean costs of a measured step computes for the
same time; where the two differ, a rank waited.
"""

import collections
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import (
    Compute,
    Kind,
    Norm,
    Recv,
    Send,
    Transfer,
    Update,
    Wait,
    WaitGather,
    WaitReduce,
    matching_op,
)
from mimogrid.core.simulate.rank_classes import each_alone
from mimogrid.core.simulate.timeline import Event, Interval, RankTimeline, Timeline, by_rank, span
from mimogrid.core.topology.topology import Stage


def measured(program: Program, events: Iterable[Event]) -> Timeline:
    """Return the timeline of what all ranks of a program did. It begins at 0, without lower bound and critical path."""
    mine = on_one_clock(by_rank(events))
    begin, end = span([event for found in mine.values() for event in found])
    moved = {rank: [_later(event, -begin) for event in found] for rank, found in mine.items()}
    transfers = _Transfers.of(program, moved)
    return Timeline(
        program=program,
        classes=each_alone(moved),
        rank_timelines={
            rank: RankTimeline(tuple(found), dict(transfers.on_the_way(rank, found)))
            for rank, found in moved.items()
        },
        step_s=end - begin,
        lower_bound_s=0.0,
        critical_path=(),
    )


@attrs.frozen(eq=False)
class _Transfers:
    """When each rank posted each of its transfers, and when it had waited for it."""

    program: Program
    posted: Mapping[tuple[int, Transfer], float]
    waited: Mapping[tuple[int, Transfer], float]

    @classmethod
    def of(cls, program: Program, events: Mapping[int, Sequence[Event]]) -> "_Transfers":
        posted: dict[tuple[int, Transfer], float] = {}
        waited: dict[tuple[int, Transfer], float] = {}
        for rank, found in events.items():
            for event in found:
                match event.action:
                    case Send() | Recv():
                        posted[rank, event.action] = event.begin_s
                    case Wait(transfer=transfer):
                        waited[rank, transfer] = event.end_s
                    case _:
                        pass
        return cls(program, posted, waited)

    def on_the_way(
        self, rank: int, events: Iterable[Event]
    ) -> Iterator[tuple[Transfer, tuple[Interval, ...]]]:
        """Yield the transfers of a rank with the intervals of their messages, as far as ranks could tell."""
        for event in events:
            if isinstance(transfer := event.action, Transfer):
                peers = self.program.peers_of(rank, transfer)
                yield transfer, tuple(self._interval(rank, transfer, peer) for peer in peers)

    def _interval(self, rank: int, transfer: Transfer, peer: int) -> Interval:
        ends = (rank, transfer), (peer, matching_op(transfer))
        begin_s = max(self.posted[each] for each in ends)
        return begin_s, max(begin_s, self.waited[ends[isinstance(transfer, Send)]])


def on_one_clock(mine: Mapping[int, Sequence[Event]]) -> dict[int, list[Event]]:
    """Return the events of ranks on the clock of the first.

    All ranks are in NORM at one moment: none leaves it before the last has entered. Where the clocks say otherwise, as
    on several hosts, each is set so that its NORM ends when that of the first rank does.
    """
    norms = {rank: event for rank, found in mine.items() for event in found if isinstance(event.action, Norm)}
    entered = max((norm.begin_s for norm in norms.values()), default=0.0)
    left = min((norm.end_s for norm in norms.values()), default=entered)
    if entered <= left or len(norms) < len(mine):
        return {rank: list(found) for rank, found in mine.items()}
    first = next(iter(norms.values())).end_s
    return {
        rank: [_later(event, first - norms[rank].end_s) for event in found] for rank, found in mine.items()
    }


def mean_costs(events: Iterable[Event]) -> Costs:
    """Return the costs of what was measured: the mean of each kind of action of a stage; messages cost nothing.

    The parts of a backward count together.

    The cost of a sum or a gather is the shortest wait for it, that of the last dp rank: the waits of the others include
    time in which they wait for that dp rank. What runs while the dp ranks compute is not included.
    """
    found: dict[Stage, _Seconds] = collections.defaultdict(_Seconds)
    for mine in by_rank(events).values():
        upper: dict[Stage, float] = collections.defaultdict(float)
        hosted = dict.fromkeys(event.action.stage for event in mine if isinstance(event.action, Compute))
        for event in mine:
            seconds = event.end_s - event.begin_s
            match event.action:
                case Compute(kind=Kind.BACKWARD_PART, stage=stage):
                    upper[stage] += seconds
                case Compute(kind=kind, stage=stage):
                    whole = seconds + (upper.pop(stage, 0.0) if kind is Kind.BACKWARD else 0.0)
                    found[stage].computed[kind].append(whole)
                case WaitReduce(stage, bucket):
                    found[stage].reduced[bucket].append(seconds)
                case WaitGather(stage, bucket):
                    found[stage].gathered[bucket].append(seconds)
                case Update():
                    for stage in hosted:
                        found[stage].updated.append(seconds / len(hosted))
                case _:
                    pass
    return Costs(stages={str(stage): of.costs() for stage, of in found.items() if of.computed})


@attrs.frozen(eq=False)
class _Seconds:
    """Seconds of a stage: compute actions by kind, waits for sums and gathers by bucket, parts of updates."""

    computed: dict[Kind, list[float]] = attrs.field(
        factory=lambda: collections.defaultdict[Kind, list[float]](list)
    )
    reduced: dict[int, list[float]] = attrs.field(
        factory=lambda: collections.defaultdict[int, list[float]](list)
    )
    gathered: dict[int, list[float]] = attrs.field(
        factory=lambda: collections.defaultdict[int, list[float]](list)
    )
    updated: list[float] = attrs.field(factory=list[float])

    def costs(self) -> StageCosts:
        return StageCosts(
            forward=_mean(self.computed, Kind.FORWARD) or 0.0,
            backward=_mean(self.computed, Kind.BACKWARD),
            input_gradient=_mean(self.computed, Kind.INPUT_GRADIENT),
            weight_gradient=_mean(self.computed, Kind.WEIGHT_GRADIENT),
            reduce=sum(map(min, self.reduced.values())),
            gather=sum(map(min, self.gathered.values())),
            update=statistics.fmean(self.updated) if self.updated else 0.0,
        )


def _mean(kinds: Mapping[Kind, Sequence[float]], kind: Kind) -> float | None:
    return statistics.fmean(kinds[kind]) if kind in kinds else None


def _later(event: Event, seconds: float) -> Event:
    return attrs.evolve(event, begin_s=event.begin_s + seconds, end_s=event.end_s + seconds)
