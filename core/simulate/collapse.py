"""Collapse: tp and cp left out of a program, so that one rank stands for all ranks of a dp rank.

The ranks along tp and cp of a dp rank compute together: every compute action begins and ends on all of them at once.
Where the size of a message takes no time, it makes no difference how the rows of a dp rank are shared among its ranks:
the dp rank goes on when the last message to any of its ranks has arrived. So the same order on grids with tp = cp = 1
takes the same time. How many rows a sample has does not matter either, only whether it has any. So ragged samples
become alike.

This holds if bandwidth is infinite, no sender is blocked, modules share no ranks, no experts are spread over ranks, and
a sum or a gather over cp alone takes no time.
"""

import itertools
import math
from collections.abc import Mapping

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import Program
from mimogrid.core.simulate.rank_classes import Collapsed, RankClasses, alike_in_time
from mimogrid.core.step.routes import Routes
from mimogrid.core.step.step import Step
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


def collapse_tp_cp(program: Program, costs: Costs) -> RankClasses | None:
    """Return the classes of a program by the classes of the collapsed one.

    None if the collapsed one may take another time, or would not be smaller.
    """
    topology = program.topology
    if not _takes_the_same_time(topology, costs):
        return None
    modules = {
        name: attrs.evolve(
            module,
            grid=attrs.evolve(module.grid, tp=1, cp=1, sequence_parallel=False, offset=None),
        )
        for name, module in topology.spec.modules.items()
    }
    collapsed = assemble(attrs.evolve(topology.spec, modules=modules, world_size=None), topology.source)
    if topology.tokens_per_cell:
        collapsed = collapsed.with_microbatches(topology.most_microbatches)
    collapsed = attrs.evolve(collapsed, graph=collapsed.graph.emitting_each())
    if len(collapsed.ranks) == len(topology.ranks):
        return None
    before = program.routes.step
    step = Step(collapsed, tuple(map(_with_two_rows, before.samples, before.rows_out)), before.cells)
    smaller = Program(program.order, Routes(step))
    classes = alike_in_time(smaller, costs)
    stands_for = _standing(topology, collapsed)
    whole = RankClasses.of({rank: classes.leader[stands_for[rank]] for rank in sorted(stands_for)})
    leader = {classes.leader[stands_for[rank]]: rank for rank in whole.members}
    return attrs.evolve(whole, collapsed=Collapsed(smaller, classes, leader))


def _with_two_rows(sample: Sample, rows_out: Mapping[str, int]) -> Sample:
    """Return a sample that gives two rows where another gives any: so most samples are alike.

    Two, because a tower of sound has one position for two rows.
    """
    rows = {name: 2 * min(rows_out.get(name, 0), 1) for name in sample.rows}
    return Sample(sample.id, min(sample.length, 1), rows)


def _takes_the_same_time(topology: Topology, costs: Costs) -> bool:
    modules = topology.modules.values()
    edges = [costs.on(link, link.edge) for link in topology.links]
    ranks = [module.grid.ranks for module in modules]
    return (
        costs.cores is None
        and all(edge.overlap and edge.bytes_per_s == math.inf for edge in edges)
        and all(module.experts is None for module in modules)
        and not any(
            costs.of(i.stage).reduce or costs.of(i.stage).gather
            for m in modules
            if m.dp_size == 1
            for i in m.stages
        )
        and all(set(a).isdisjoint(b) for a, b in itertools.combinations(ranks, 2))
    )


def _standing(topology: Topology, collapsed: Topology) -> Mapping[int, int]:
    """Return, for every rank, the rank of the collapsed topology that stands for it."""
    return {
        rank: collapsed.modules[name].tp_cp_ranks(info.stage, dp_rank)[0]
        for name, module in topology.modules.items()
        for info in module.stages
        for dp_rank in range(module.dp_size)
        for rank in module.tp_cp_ranks(info.stage, dp_rank)
    }
