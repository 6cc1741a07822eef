"""Even steps: the step of a job in which every sample is as large as the largest.

Layouts are compared by even steps. Compute actions take the mean over the real samples (`on_machine` with `spread`),
while messages and memory have the size of the largest sample. All dp ranks are alike, so a large world is timed as a
few rank classes, and what fits an even step fits every step of such samples.
"""

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import Costs
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.step.step import Step, step_of


def even_step(step: Step) -> Step:
    """Return a step of as many samples, each with the most rows and the longest text of any."""
    return step_of(step.topology, largest_samples(step.samples, step.topology.source.sequence))


def even_costs(step: Step, machine: Machine) -> Costs:
    """Return the costs of a step whose samples are spread evenly over dp ranks and microbatches."""
    return on_machine(step, machine, spread=True)


def largest_samples(samples: tuple[Sample, ...], sequence: int | None) -> tuple[Sample, ...]:
    """Return as many samples, each with the most rows and the longest text of any that a sequence has room for."""
    names = dict.fromkeys(name for sample in samples for name in sample.rows)
    rows = {name: max(sample.rows.get(name, 0) for sample in samples) for name in names}
    length = max((sample.length for sample in samples), default=0)
    room = sequence - sum(rows.values()) if sequence else length
    return (Sample(id=0, length=min(length, max(room, 1)), rows=rows),) * len(samples)
