"""Unevenness: how much longer or shorter than its cost a compute action takes.

Costs are means. In a real step dp ranks differ: the data gives one of them more to compute than another (*ragged*), and
a machine varies from one moment to the next (*jitter*). Both are factors of mean one that follow from the plan and a
seed:

- ragged: the positions that a dp rank computes in a microbatch over their mean in the module;
- jitter: log-normal, a draw for every stage, dp rank, microbatch and kind of compute action.

An action that several dp ranks start together takes as long as on the slowest of them.
"""

import functools
import math
from collections.abc import Hashable

import attrs

from mimogrid.core.base.hashing import draw_uniform
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Stage


@attrs.frozen(eq=False)
class DurationFactors:
    """The factors of a step. `jitter` is the standard deviation of their logarithm."""

    step: Step = attrs.field(repr=False)
    ragged: bool = False
    jitter: float = 0.0
    seed: int = 0

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
        return tuple(self._computed(stage.module, dp_rank, k) for k in sorted(set(self.step.alike(count))))

    def _ragged(self, action: Compute, dp_rank: int) -> float:
        mean = self._means[action.stage.module] if self.ragged else 0.0
        return self._computed(action.stage.module, dp_rank, action.microbatch) / mean if mean else 1.0

    def _jitter(self, action: Compute, dp_rank: int) -> float:
        if not self.jitter:
            return 1.0
        field = f"{action.stage} {action.kind.value}{action.microbatch}"
        # Box and Muller's method. The first draw is subtracted from 1, since 0 has no logarithm.
        radius = math.sqrt(-2 * math.log(1 - draw_uniform(self.seed, dp_rank, f"{field} radius")))
        normal = radius * math.cos(2 * math.pi * draw_uniform(self.seed, dp_rank, f"{field} angle"))
        return math.exp(self.jitter * normal - self.jitter**2 / 2)

    def _computed(self, module: str, dp_rank: int, microbatch: int) -> int:
        positions, samples = self.step.shape(module, dp_rank, microbatch)
        return positions * samples

    @functools.cached_property
    def _means(self) -> dict[str, float]:
        """Per module, the mean positions over all dp ranks and microbatches that have anything to compute."""
        means: dict[str, float] = {}
        for name, module in self.step.topology.modules.items():
            counts = [
                self._computed(name, dp_rank, k)
                for dp_rank in range(module.dp_size)
                for k in self.step.active(name, dp_rank)
            ]
            means[name] = sum(counts) / len(counts) if counts else 0.0
        return means
