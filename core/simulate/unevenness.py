"""Unevenness: how much longer or shorter than its cost a compute action takes.

Costs are means. In a real step dp ranks differ: the data gives one of them more to compute than another (*ragged*), and
a machine varies from one moment to the next (*jitter*). Both are factors of mean one that follow from the plan and a
seed:

- ragged: the operations of a dp rank's share in a microbatch (`pricing.flops`), over their mean on the stage;
- jitter: log-normal, a draw for every stage, dp rank, microbatch and kind of compute action.

An action that several dp ranks start together takes as long as on the slowest of them.
"""

import functools
import math
from collections.abc import Hashable

import attrs

from mimogrid.core.base.hashing import draw_uniform
from mimogrid.core.pricing.flops import Load, Loads, in_row, module_units, of_units, sum_of
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Module, Stage


@attrs.frozen(eq=False)
class DurationFactors:
    """The factors of a step. `jitter` is the standard deviation of their logarithm.

    The costs that they multiply are the means of `costs_of`, by default the step itself.
    """

    step: Step = attrs.field(repr=False)
    ragged: bool = False
    jitter: float = 0.0
    seed: int = 0
    costs_of: Step | None = attrs.field(default=None, repr=False)
    _known: dict[tuple[Stage, int, int], float] = attrs.field(
        factory=dict[tuple[Stage, int, int], float], init=False, repr=False
    )
    """The operations of a forward by stage, dp rank and microbatch."""

    def factor(self, action: Compute, dp_rank: int) -> float:
        """Return by how much the cost of an action is multiplied on a dp rank."""
        ep_dp_ranks = self.step.topology.modules[action.stage.module].ep_dp_ranks(dp_rank)
        return max(self._ragged(action, one) * self._jitter(action, one) for one in ep_dp_ranks)

    def mark(self, stage: Stage, dp_rank: int) -> Hashable:
        """Return a value that is equal for two dp ranks only if all their factors are equal."""
        if self.jitter:
            return dp_rank
        if not self.ragged:
            return None
        count = self.step.topology.modules[stage.module].microbatches
        return tuple(self._operations(stage, dp_rank, k) for k in sorted(set(self.step.alike(count))))

    def _ragged(self, action: Compute, dp_rank: int) -> float:
        mean = self._means[action.stage] if self.ragged else 0.0
        return self._operations(action.stage, dp_rank, action.microbatch) / mean if mean else 1.0

    def _jitter(self, action: Compute, dp_rank: int) -> float:
        if not self.jitter:
            return 1.0
        field = f"{action.stage} {action.kind.letter}{action.microbatch}"
        # Box and Muller's method. The first draw is subtracted from 1, since 0 has no logarithm.
        radius = math.sqrt(-2 * math.log(1 - draw_uniform(self.seed, dp_rank, f"{field} radius")))
        normal = radius * math.cos(2 * math.pi * draw_uniform(self.seed, dp_rank, f"{field} angle"))
        return math.exp(self.jitter * normal - self.jitter**2 / 2)

    def _operations(self, stage: Stage, dp_rank: int, microbatch: int) -> float:
        """Return the operations of a forward; of a module of the user's own, its positions stand for them."""
        place = stage, dp_rank, microbatch
        if place not in self._known:
            loads, factors = self._loads[stage.module], self._per_unit[stage]
            share = self.step.samples_of(stage.module, dp_rank, microbatch)
            load = in_row(self._module(stage), loads.over(share))
            counts = attrs.astuple(load)
            self._known[place] = math.fsum(f * count for f, count in zip(factors, counts, strict=True))
        return self._known[place]

    def _module(self, stage: Stage) -> Module:
        return self.step.topology.modules[stage.module]

    @functools.cached_property
    def _loads(self) -> dict[str, Loads]:
        return {name: Loads.of(self.step, name) for name in self.step.topology.modules}

    @functools.cached_property
    def _per_unit(self) -> dict[Stage, tuple[float, ...]]:
        """Per stage, the operations of a forward for each count of a load; they are linear in these."""
        found: dict[Stage, tuple[float, ...]] = {}
        for stage, info in self.step.topology.stages.items():
            units = [module_units(self.step.topology, self._module(stage), one) for one in Load.units()]
            forwards = tuple(sum_of(of_units(info, parts)).forward if parts else 0.0 for parts in units)
            found[stage] = forwards if any(forwards) else attrs.astuple(Load(positions=1.0))
        return found

    @functools.cached_property
    def _means(self) -> dict[Stage, float]:
        """Per stage, the mean operations over all dp ranks and microbatches that have anything to compute."""
        means: dict[Stage, float] = {}
        if self.costs_of is not None:
            return attrs.evolve(self, step=self.costs_of, costs_of=None)._means
        for stage in self.step.topology.stages:
            counts = [
                self._operations(stage, dp_rank, k)
                for dp_rank in range(self._module(stage).dp_size)
                for k in self.step.active(stage.module, dp_rank)
            ]
            means[stage] = sum(counts) / len(counts) if counts else 0.0
        return means
