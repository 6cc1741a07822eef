"""Breakdown: where the time of a simulated step goes.

Idling has causes. Those of the pipeline (`timeline.CAUSES`) are those of the same step with mean costs. What ranks
idle more when each dp rank has its real share of the data to compute is *ragged*, and what they idle more yet on
machines that are not even is *jitter*. So the causes add up to all idling, rank by rank, and a loss to the data is
not mistaken for one to the pipeline. (A rank may idle less for being the slow one: then its part is below zero.)

The critical path is what the step waited for, leg by leg from its begin to its end; its *shares* are the seconds that
stages and links have of it. To make anything faster that has no share gains nothing.
"""

import collections
from collections.abc import Mapping

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import link_of
from mimogrid.core.schedule.actions import Compute, Recv, Send
from mimogrid.core.simulate import simulate
from mimogrid.core.simulate.rank_timelines import PathSegment, Timeline
from mimogrid.core.simulate.timeline import CAUSES
from mimogrid.core.simulate.unevenness import DurationFactors


RAGGED, JITTER = "ragged", "jitter"
ALL_CAUSES = (*CAUSES, RAGGED, JITTER)


def idle_s_by_rank(
    timeline: Timeline, costs: Costs, duration_factors: DurationFactors | None = None
) -> dict[int, dict[str, float]]:
    """Return the seconds that each rank idles for each cause, given what the timeline was made from."""
    program = timeline.program
    even = ragged = timeline
    if duration_factors and duration_factors.jitter:
        even = ragged = simulate(program, costs, duration_factors=attrs.evolve(duration_factors, jitter=0.0))
    if duration_factors and duration_factors.ragged:
        even = simulate(program, costs)
    return {
        rank: {
            **causes,
            RAGGED: _idle_s(ragged, rank) - _idle_s(even, rank),
            JITTER: _idle_s(timeline, rank) - _idle_s(ragged, rank),
        }
        for rank, causes in even.idle_s_by_rank.items()
    }


def idle_s(timeline: Timeline, by_rank: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Return the seconds by cause, summed over ranks."""
    sizes = {rank: len(ranks) for rank, ranks in timeline.classes.members.items()}
    return {cause: sum(by_rank[rank][cause] * size for rank, size in sizes.items()) for cause in ALL_CAUSES}


def shares(timeline: Timeline) -> dict[str, float]:
    """Return the seconds of the critical path by stage and link, most first."""
    total: dict[str, float] = collections.defaultdict(float)
    for segment in timeline.critical_path:
        total[_place(timeline, segment)] += segment.end_s - segment.begin_s
    return dict(sorted(total.items(), key=lambda share: -share[1]))


def _idle_s(timeline: Timeline, rank: int) -> float:
    return sum(timeline.idle_s_by_rank[rank].values())


def _place(timeline: Timeline, segment: PathSegment) -> str:
    """Return what the time of a segment is spent on: a stage, an edge, a pipeline link, or the end of the step."""
    match segment.action:
        case Compute(stage=stage):
            return str(stage)
        case Send() | Recv() as transfer:
            link = link_of(timeline.program.topology, transfer)
            return str(link.edge or link)
        case action:
            return str(action)
