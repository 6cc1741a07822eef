"""Breakdown: where the time of a simulated step goes.

Idling has causes. Those of the pipeline (`timeline.CAUSES`) are the causes in the same step with mean costs. What ranks
idle more when each dp rank computes on its real share of the data is *ragged*, and what they idle more again on
machines that vary is *jitter*. So the causes add up to all idling, rank by rank, and a loss to the data is not mistaken
for one to the pipeline. (A slow rank may idle less; then its number is below zero.)

The critical path is what the step waits for, segment by segment from its begin to its end. The *shares* of a stage or a
link are its seconds on that path. A stage or link without a share gains nothing if it becomes faster.
"""

import collections
from collections.abc import Mapping

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import link_of
from mimogrid.core.schedule.actions import Compute, Recv, Send
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.timeline import CAUSES, PathSegment, Timeline
from mimogrid.core.simulate.unevenness import DurationFactors


RAGGED, JITTER = "ragged", "jitter"
ALL_CAUSES = (*CAUSES, RAGGED, JITTER)


def idle_s_by_rank(
    timeline: Timeline, costs: Costs, duration_factors: DurationFactors | None = None
) -> dict[int, dict[str, float]]:
    """Return the seconds that each rank idles for each cause. `costs` and factors are those of the timeline."""
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
    """Return what a segment belongs to: a stage, an edge, a pipeline link, or an action at the end of the step."""
    match segment.action:
        case Compute(stage=stage):
            return str(stage)
        case Send() | Recv() as transfer:
            link = link_of(timeline.program.topology, transfer)
            return str(link.edge or link)
        case action:
            return str(action)
