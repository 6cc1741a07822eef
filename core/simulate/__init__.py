"""Simulate: the walk of `replay` with a clock.

Replay gives an order in which every action of a program may start. Along it each action is hung behind what it waits
for, which makes a `graph` of *pieces* of time: those of a rank behind each other, a joint action behind all of its
ranks, a wait behind messages (`channels`) or sums of gradients (`sums`). Then the graph is timed (`pieces`).

One rank of each class walks for all of it (`fold`). With a limit on cores every rank walks, because all of them share
the cores.
"""

import functools
from collections.abc import Callable

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.schedule.work import seconds_of
from mimogrid.core.simulate.collapse import collapse_tp_cp
from mimogrid.core.simulate.graph import Graph
from mimogrid.core.simulate.lower_bound import limit_s
from mimogrid.core.simulate.pieces import shared, unlimited
from mimogrid.core.simulate.rank_classes import Classes, alone, classes_of
from mimogrid.core.simulate.rank_timelines import Timeline, spread
from mimogrid.core.simulate.unevenness import DurationFactors


MANY = 512
"""Ranks; of more, those of a dp rank are timed as one where that is exact (`collapsed`)."""


def simulate(
    program: Program,
    costs: Costs,
    listing: Listing | None = None,
    *,
    duration_factors: DurationFactors | None = None,
    fold: bool = True,
    told: Callable[[Classes], None] | None = None,
) -> Timeline:
    """Time a listing of the program (default: its own). Raises ValueError where it never ends.

    With a `duration_factors`, compute actions take longer or shorter than `costs` say. Without `fold`, every rank
    walks by itself. `told` is who stands for whom before they walk: the more classes there are, the longer that
    takes.
    """
    ranks = program.topology.ranks
    folds = fold and listing is None and costs.cores is None
    if (
        folds
        and duration_factors is None
        and len(ranks) > MANY
        and (collapsed := collapse_tp_cp(program, costs))
    ):
        return spread(simulate(collapsed.program, costs, told=told), program, collapsed.standing)
    classes = (
        classes_of(program, costs, duration_factors.mark if duration_factors else None)
        if folds
        else alone(tuple(listing or ranks))
    )
    if told is not None:
        told(classes)
    lists = {rank: program.of(rank) if listing is None else listing[rank] for rank in classes.members}
    seconds = functools.partial(_seconds, program, costs, duration_factors)
    graph = Graph(program, costs, classes, lists, seconds)
    clock = unlimited(graph.pieces) if costs.cores is None else shared(graph.pieces, costs.cores)
    rank_timelines = graph.rank_timelines(clock)
    return Timeline(
        program=program,
        classes=classes,
        rank_timelines=rank_timelines,
        step_s=max(
            (
                rank_timeline.events[-1].end_s
                for rank_timeline in rank_timelines.values()
                if rank_timeline.events
            ),
            default=0.0,
        ),
        limit_s=limit_s(program, costs, classes, lists, seconds),
        critical_path=graph.critical_path(clock),
    )


def _seconds(
    program: Program, costs: Costs, duration_factors: DurationFactors | None, rank: int, action: Compute
) -> float:
    """Return how long a compute action takes on a rank."""
    mean = seconds_of(action, costs)
    if duration_factors is None:
        return mean
    return mean * duration_factors.factor(
        action, program.topology.modules[action.stage.module].dp_rank_of(rank)
    )
