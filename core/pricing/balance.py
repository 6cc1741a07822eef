"""Balance: the step of a job whose `[batch] balance` is "cost", with its samples assigned by what they cost.

The cost of a sample on a group of ranks is its part of the seconds that these are busy in the step:

    its part       its operations (`flops`), forward and backward, over those of all samples; its positions, in a module
                   of the user's own, whose parts the plan does not know
    the seconds    of a microbatch of all stages, by the job's costs (`schedule.costs`), times its microbatches, over
                   the stages of the pipeline; without costs, the operations of the module over its ranks. A module of
                   the user's own without costs counts as the busiest of the others

Modules that share ranks are one group, since these compute one after the other. All of it follows from the job and the
descriptions of the samples, by sums and products alone. So every rank assigns alike, and a resumed run finds again
what it had.
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Own
from mimogrid.core.job.tokens import microbatch_multiple
from mimogrid.core.pricing.flops import Load, columns_of, sum_of, units_of_counts
from mimogrid.core.step.cells import assign_samples, even_most
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.topology import Module, Topology


@attrs.frozen(eq=False)
class Balance:
    """What a job's samples are assigned by, over all of its steps."""

    topology: Topology

    def step(self, samples: tuple[Sample, ...]) -> Step:
        """Lay the samples of a step over the topology. Raises PlanError, naming the sample, if one does not fit."""
        step = step_of(self.topology, samples)
        return self.assigned(step) if self.topology.balances else step

    def assigned(self, step: Step) -> Step:
        """Return a step whose samples are assigned by cost, whatever the job asks for.

        With a limit of tokens it has as many microbatches as in order, or more if its samples do not fit into these.
        """
        microbatches, lanes = step.topology.cell_grid
        columns, (sizes, most) = self.costs(step), self._sizes(step)
        busy = [group for group, column in enumerate(columns) if any(column)] or [0]
        costs = list(zip(*(columns[group] for group in busy), strict=True))
        joined = [lanes // self._dp_size(self._groups[group]) for group in busy]
        found = None
        while found is None:
            found = assign_samples(costs, sizes, most, microbatches=microbatches, lanes=lanes, joined=joined)
            microbatches += microbatch_multiple(step.topology.spec)
        return step.assigned(found)

    def _sizes(self, step: Step) -> tuple[Sequence[tuple[int, ...]], tuple[int, ...]]:
        """Return what cells have limits of, sample by sample, and the limits."""
        if limit := step.topology.tokens_per_cell:
            return [(tokens,) for tokens in step.sample_tokens], (limit,)
        columns = [[of.positions[name] for of in step.sizes] for name in self.topology.modules]
        sizes = list(zip(*filter(any, columns), strict=True)) or [(0,)] * len(step.samples)
        return sizes, even_most(sizes, math.prod(step.topology.cell_grid))

    def _dp_size(self, names: Sequence[str]) -> int:
        """Return the dp size of a group of modules: the least, if they have several."""
        return min(self.topology.modules[name].dp_size for name in names)

    def costs(self, step: Step) -> list[list[float]]:
        """Return the cost of each sample on each group of ranks: in seconds, or in operations if none are measured."""
        columns = {name: self._weighted(step, name) for name in self.topology.modules}
        totals = {name: math.fsum(f * sum(column) for f, column in own) for name, own in columns.items()}
        busy = self._busy(totals)
        scales = {name: busy[name] / total if total else 0.0 for name, total in totals.items()}
        scaled = {
            name: [
                [weight * count for count in column] for f, column in own for weight in (scales[name] * f,)
            ]
            for name, own in columns.items()
        }
        none = [0.0] * len(step.samples)
        return [_sum_of([c for name in names for c in scaled[name]] or [none]) for names in self._groups]

    def _weighted(self, step: Step, name: str) -> list[tuple[float, list[int]]]:
        """Return what a module has to do for each sample: counts, and the operations that one of each takes.

        The sum of their products is its operations, or its positions in a module of the user's own.
        """
        if not any(of.positions[name] for of in step.sizes):
            return []
        return [
            (factor, column)
            for factor, column in zip(self._per_unit[name], columns_of(step, name), strict=True)
            if factor
        ]

    def _busy(self, totals: Mapping[str, float]) -> Mapping[str, float]:
        """Return how long a rank of each module is busy in the step."""
        modules, costs = self.topology.modules, self.topology.spec.schedule.costs
        if costs is not None:
            stages = {
                name: [costs.of(info.stage) for info in module.stages] for name, module in modules.items()
            }
            return {
                name: math.fsum(of.forward + of.whole_backward for of in stages[name])
                * module.microbatches
                / module.grid.extent("pp")
                for name, module in modules.items()
            }
        known = {n: totals[n] / m.grid.size for n, m in modules.items() if not isinstance(m.model, Own)}
        busiest = max(known.values(), default=1.0)
        return {name: known.get(name, busiest) for name in modules}

    @functools.cached_property
    def _per_unit(self) -> Mapping[str, tuple[float, ...]]:
        """Per module, the operations for each count of a load; they are linear in these."""
        return {name: self._operations(module) for name, module in self.topology.modules.items()}

    def _operations(self, module: Module) -> tuple[float, ...]:
        found = tuple(
            flops.model + flops.recomputed for flops in map(sum_of, units_of_counts(self.topology, module))
        )
        return found if any(found) else attrs.astuple(Load(positions=1.0))

    @functools.cached_property
    def _groups(self) -> tuple[tuple[str, ...], ...]:
        """The modules by the ranks that they share."""
        groups: list[tuple[set[int], list[str]]] = []
        for name, module in self.topology.modules.items():
            ranks, names = set(module.grid.ranks), [name]
            for group in [group for group in groups if not ranks.isdisjoint(group[0])]:
                groups.remove(group)
                ranks |= group[0]
                names = group[1] + names
            groups.append((ranks, names))
        return tuple(tuple(names) for _, names in groups)


def _sum_of(columns: Sequence[list[float]]) -> list[float]:
    first, *others = columns
    for column in others:
        first = list(map(operator.add, first, column))
    return first
