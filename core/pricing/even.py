"""Even steps: the step of a job in which every sample is as large as the largest.

Layouts are compared by even steps. Compute actions take the mean over the real samples (`on_machine` with `spread`),
while messages and memory have the size of the largest sample. All dp ranks are alike, so a large world is timed as a
few rank classes, and what fits an even step fits every step of such samples.
"""

import math

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.pricing.footprint import fullest_cell
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.step.cells import samples_per_cell
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.topology import Topology


def even_step(step: Step) -> Step:
    """Return a step of as many samples, each with the most rows and the longest text of any.

    Under a limit of tokens it is one of as many microbatches, with full cells.
    """
    topology = step.topology
    if topology.tokens_per_cell:
        return _with_full_cells(step, topology)
    return step_of(topology, largest_samples(step.samples, topology.graph, topology.source.sequence))


def fullest_step(step: Step) -> Step:
    """Return a step in which every dp rank has the most that it may have of samples no larger than those of a step.

    Under a limit of tokens it has the most microbatches that a step may have, with full cells (`fullest_cell`).
    """
    topology = step.topology
    if topology.tokens_per_cell:
        most = (topology.of_job or topology).most_microbatches
        return _with_full_cells(step, topology.with_microbatches(most))
    if not topology.balances:
        return even_step(step)
    cells = math.prod(topology.cell_grid)
    each = samples_per_cell(len(step.samples), cells)
    largest = largest_samples(step.samples, topology.graph, topology.source.sequence)[:1]
    return Step(topology, largest * each * cells, tuple(range(0, each * cells + 1, each)))


def _with_full_cells(step: Step, topology: Topology) -> Step:
    """Return a step over a topology in which one sample stands for what fills a cell."""
    cells = math.prod(topology.cell_grid)
    return Step(topology, step.samples[:1] * cells, tuple(range(cells + 1)), (fullest_cell(step),) * cells)


def even_costs(step: Step, machine: Machine) -> Costs:
    """Return the costs of a step whose samples are spread evenly over dp ranks and microbatches."""
    return on_machine(step, machine, spread=True)


def largest_samples(
    samples: tuple[Sample, ...], graph: ModuleGraph, sequence: int | None
) -> tuple[Sample, ...]:
    """Return as many samples, each with the most rows and the longest text of any that a sequence has room for."""
    names = dict.fromkeys(name for sample in samples for name in sample.rows)
    largest = {name: max(samples, key=lambda sample: sample.rows.get(name, 0)) for name in names}
    rows = Sample(
        id=0,
        length=0,
        rows={name: of.rows.get(name, 0) for name, of in largest.items()},
        segments={name: of.segments[name] for name, of in largest.items() if name in of.segments},
    )
    length = max((sample.length for sample in samples), default=0)
    emitted = graph.rows_out(rows)
    room = sequence - sum(emitted.get(name, 0) for name in names) if sequence else length
    return (attrs.evolve(rows, length=min(length, max(room, 1))),) * len(samples)
