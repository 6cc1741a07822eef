"""Thin: a program in which one rank stands for all that share a dp rank of a stage.

The ranks along tp and cp of a dp rank compute together, so they begin and end every compute action at once. Where
messages take as long whatever is in them, it makes no difference how a dp rank's rows are dealt among them: a dp rank
goes on when the last of what is sent to any of its ranks is there. So the same order on grids with tp = cp = 1
takes the same time, and how many rows a sample has does not matter, only whether it has any: what is ragged becomes
alike.

That holds where bandwidth is infinite and nobody is held up by sending, modules share no ranks, no experts are
spread over them, and a sum over cp that has no dp ranks takes no time.
"""

import itertools
import math
from collections.abc import Mapping

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import Program
from mimogrid.core.step.routes import Routes
from mimogrid.core.step.step import Step
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


@attrs.frozen(eq=False)
class Collapsed:
    """The collapsed program, and for every rank of the whole one the rank that stands for it there."""

    program: Program
    standing: Mapping[int, int]


def collapse_tp_cp(program: Program, costs: Costs) -> Collapsed | None:
    """Return the collapsed program of one; None where it may take another time, or would not be thinner."""
    topology = program.topology
    if not _is_like_its_dp_ranks(topology, costs):
        return None
    modules = {
        name: attrs.evolve(
            module,
            grid=attrs.evolve(module.grid, tp=1, cp=1, sequence_parallel=False, offset=None),
        )
        for name, module in topology.spec.modules.items()
    }
    collapsed = assemble(attrs.evolve(topology.spec, modules=modules, world_size=None), topology.source)
    if len(collapsed.ranks) == len(topology.ranks):
        return None
    step = Step(collapsed, tuple(map(_present, program.routes.step.samples)))
    return Collapsed(Program(program.order, Routes(step)), _standing(topology, collapsed))


def _present(sample: Sample) -> Sample:
    """Return a sample that is there where another one is, with one row of each: so that most are alike."""
    return Sample(
        sample.id, min(sample.length, 1), {name: min(rows, 1) for name, rows in sample.rows.items()}
    )


def _is_like_its_dp_ranks(topology: Topology, costs: Costs) -> bool:
    modules = topology.modules.values()
    edges = [costs.on(link, link.edge) for link in topology.links]
    ranks = [module.grid.ranks for module in modules]
    return (
        costs.cores is None
        and all(edge.overlap and edge.bytes_per_s == math.inf for edge in edges)
        and all(module.experts is None for module in modules)
        and not any(costs.of(i.stage).reduce for m in modules if m.dp_size == 1 for i in m.stages)
        and all(set(a).isdisjoint(b) for a, b in itertools.combinations(ranks, 2))
    )


def _standing(topology: Topology, collapsed: Topology) -> dict[int, int]:
    return {
        rank: collapsed.modules[name].tp_cp_ranks(info.stage, dp_rank)[0]
        for name, module in topology.modules.items()
        for info in module.stages
        for dp_rank in range(module.dp_size)
        for rank in module.tp_cp_ranks(info.stage, dp_rank)
    }
