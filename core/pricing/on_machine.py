"""Pricing: the costs of a job before anything is measured.

Seconds on an accelerator follow from what the job does:

    products       operations (`flops`, rounding included) divided among ranks, at a part of the peak that follows
                   from the sizes of matrices and the lengths of segments (`roofline`)
    tp, cp, ep     inside the compute action: two all-reduces over tp per layer and direction, the all-gather of keys
                   and values over cp, the tokens that go to experts and back
    links          bytes over the bandwidth of the node, or of the network if any of their ranks is in another node
    reduce         the all-reduce of gradients over dp ranks: each byte twice over the slowest link
    gather         with a sharded update a reduce-scatter, each byte once, and the all-gather of weights, once more
    update         Adam reads and writes weights, gradients and moments, at memory bandwidth

In a microbatch the dp rank with the largest load counts, since the others wait for it in the end. A stage costs the
mean of its microbatches. A module of the user's own takes no time. Where the accelerator is unknown, every layer takes
one second (`assumed`).
"""

import functools
import math
from collections.abc import Sequence

import attrs

from mimogrid.core.base.samples import dp_samples
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.pricing.collectives import is_near
from mimogrid.core.pricing.flops import Load, Loads, module_terms, of_units
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.pricing.units import joined, unit_costs, values_of_units
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Module


def on_machine(step: Step, machine: Machine, *, spread: bool = False) -> Costs:
    """Return the costs of a job on a machine.

    With `spread`, the rows of each module are spread evenly over all its microbatches.
    """
    topology = step.topology
    stages: dict[str, StageCosts] = {}
    for module in topology.modules.values():
        load = _dp_rank_load(step, module, spread=spread)
        parts = unit_costs(
            module,
            load,
            machine,
            terms=module_terms(topology, module),
            values=values_of_units(module),
            recomputes=topology.spec.modules[module.name].recompute == "full",
            sharded=topology.spec.optimizer.sharded,
        )
        for info in module.stages:
            stages[str(info.stage)] = joined(of_units(info, parts) if parts else ())
    edges = {str(link): machine.link(within=is_near(topology, link, machine)) for link in topology.links}
    return Costs(stages=stages, edges=edges)


def measured_on(machine: Machine, step: Step, costs: Costs) -> Machine:
    """Return the machine on which the modules of a job take as long as its costs say.

    For each module all stages count together, forward and backward, so that its layout may change. A module of the
    user's own, or one that took no time, stays as it is.
    """
    assumed_costs = on_machine(step, attrs.evolve(machine, measured=()))
    found: list[tuple[str, float]] = []
    for name, module in step.topology.modules.items():
        stages = [info.stage for info in module.stages]
        took, should = (
            math.fsum(_whole_s(each.of(stage)) for stage in stages) for each in (costs, assumed_costs)
        )
        if took and should:
            found.append((name, took / should))
    return attrs.evolve(machine, measured=tuple(found))


def _whole_s(costs: StageCosts) -> float:
    return costs.forward + costs.whole_backward


def _dp_rank_load(step: Step, module: Module, *, spread: bool = False) -> Load:
    """Return the load of a microbatch on the dp rank with most: the mean over microbatches in which it has any.

    With `spread`, the mean over all microbatches.
    """
    loads, shares = Loads.of(step, module.name), _shares(step, module)
    # Whoever has fewer positions need not be asked for the rest: a share is computed in a row that is rounded up.
    positions = [
        [module.row_shape(each)[0] if each else 0 for each in loads.positions(mine)] for mine in shares
    ]
    each = [sum(mine) * (1 if spread else 1 / max(sum(map(bool, mine)), 1)) for mine in positions]
    most = max(each)
    largest = [i for i, size in enumerate(each) if size == most]
    return max((_mean(loads.sums(shares[i]), positions[i], spread=spread) for i in largest), key=_size)


def _shares(step: Step, module: Module) -> Sequence[Sequence[range]]:
    """Return the samples of each dp rank, microbatch by microbatch."""
    cells = _cells(module.dp_size, module.microbatches, step.cell_count)
    return [list(map(step.samples_in, mine)) for mine in cells] if step.cells else cells


@functools.lru_cache(maxsize=64)
def _cells(dp_size: int, microbatches: int, total: int) -> Sequence[Sequence[range]]:
    """Return the same for cells. Planning asks again and again."""
    return tuple(
        tuple(
            dp_samples(
                dp_rank=dp_rank,
                dp_size=dp_size,
                microbatch=microbatch,
                microbatches=microbatches,
                total=total,
            )
            for microbatch in range(microbatches)
        )
        for dp_rank in range(dp_size)
    )


def _mean(sums: Load, positions: Sequence[int], *, spread: bool) -> Load:
    """Return the mean of a dp rank's loads, whose sums are given: with `spread` over all microbatches."""
    count = len(positions) if spread else max(sum(map(bool, positions)), 1)
    return attrs.evolve(sums, positions=sum(positions)) * (1 / count)


def _size(load: Load) -> tuple[float, float, float]:
    return load.positions, load.pairs, load.rows
