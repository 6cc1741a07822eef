"""Simulate: the walk of `replay` with a clock.

Replay gives an order in which every action of a program may start. Along it an event graph (`events`) is built: pieces
of time, those of a rank behind each other, a joint action behind all of its ranks, a wait behind messages or
all-reduces. Then the graph is timed.

One rank of each class (`rank_classes_of`) is walked for all of it. With a limit on cores every rank is walked, because
all of them share the cores.
"""

import functools

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.schedule.work import seconds_of
from mimogrid.core.simulate.collapse import collapse_tp_cp
from mimogrid.core.simulate.events.graph import EventGraph
from mimogrid.core.simulate.events.pieces import shared, unlimited
from mimogrid.core.simulate.lower_bound import lower_bound_s
from mimogrid.core.simulate.rank_classes import RankClasses, alike_in_time, each_alone
from mimogrid.core.simulate.timeline import Timeline, spread
from mimogrid.core.simulate.unevenness import DurationFactors


MANY = 512
"""Ranks; of more, one stands for its whole dp rank where that is exact (`collapse`)."""


def simulate(
    program: Program,
    costs: Costs,
    listing: Listing | None = None,
    *,
    duration_factors: DurationFactors | None = None,
    classes: RankClasses | None = None,
) -> Timeline:
    """Time a listing of the program (default: its own). Raises ValueError where it never ends.

    `classes` says which rank stands for which others: of a listing each rank for itself, else `rank_classes_of` the
    same arguments. The more classes there are, the longer it takes.
    """
    if classes is None:
        classes = (
            each_alone(listing) if listing is not None else rank_classes_of(program, costs, duration_factors)
        )
    if classes.collapsed:
        smaller = simulate(classes.collapsed.program, costs, classes=classes.collapsed.classes)
        return spread(smaller, program, classes)
    lists = {rank: program.of(rank) if listing is None else listing[rank] for rank in classes.members}
    seconds = functools.partial(_seconds, program, costs, duration_factors)
    graph = EventGraph(program, costs, classes, lists, seconds)
    clock = unlimited(graph.pieces) if costs.cores is None else shared(graph.pieces, costs.cores)
    rank_timelines = graph.rank_timelines(clock)
    last = (mine.events[-1] for mine in rank_timelines.values() if mine.events)
    return Timeline(
        program=program,
        classes=classes,
        rank_timelines=rank_timelines,
        step_s=max((event.end_s for event in last), default=0.0),
        lower_bound_s=lower_bound_s(program, costs, classes, lists, seconds),
        critical_path=graph.critical_path(clock),
    )


def rank_classes_of(
    program: Program, costs: Costs, duration_factors: DurationFactors | None = None
) -> RankClasses:
    """Return the classes in which `simulate` times the ranks of a program: the coarsest that are exact."""
    ranks = program.topology.ranks
    if costs.cores is not None:
        return each_alone(ranks)
    if duration_factors is not None:
        return alike_in_time(program, costs, duration_factors.mark)
    collapsed = collapse_tp_cp(program, costs) if len(ranks) > MANY else None
    return collapsed or alike_in_time(program, costs)


def _seconds(
    program: Program, costs: Costs, duration_factors: DurationFactors | None, rank: int, action: Compute
) -> float:
    """Return the seconds that a compute action takes on a rank."""
    mean = seconds_of(action, costs) * program.order.share(action)
    if duration_factors is None:
        return mean
    return mean * duration_factors.factor(
        action, program.topology.modules[action.stage.module].dp_rank_of(rank)
    )
