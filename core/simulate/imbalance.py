"""Imbalance: what ragged samples cost a step in their order, and assigned by cost (`[batch] balance`).

Three steps of one job with the same costs are timed. In the first every compute action takes its mean, which is what
the total work allows. In the second the samples lie in their order, in the third they are assigned by cost. What
ranks idle more than in the first is the idle time by imbalance.
"""

import math
from collections.abc import Mapping

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.orders import Orders
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.timeline import Timeline
from mimogrid.core.simulate.unevenness import DurationFactors
from mimogrid.core.step.step import Step, step_of


@attrs.frozen
class Imbalance:
    """Seconds of a step, and those that all ranks together idle by imbalance, by `[batch] balance`.

    `even_s` is the step if every compute action took its mean.
    """

    even_s: float
    step_s: Mapping[str, float]
    idle_s: Mapping[str, float]


def imbalance(step: Step, orders: Orders, costs: Costs) -> Imbalance | None:
    """Compare the samples of a step in their order with the same ones assigned by cost. `costs` are of the former.

    None where there is one cell only, or fewer samples than cells.
    """
    cells = math.prod(step.topology.cell_grid)
    if not 1 < cells <= len(step.samples):
        return None
    plain = step_of(step.topology, tuple(sorted(step.samples, key=lambda sample: sample.id)))
    even = simulate(plan_step(plain, orders.of(plain.topology)), costs)
    steps = {"none": plain, "cost": Balance(step.topology).assigned(plain)}
    timelines = {
        name: simulate(
            plan_step(laid_out, orders.of(laid_out.topology)),
            costs,
            duration_factors=DurationFactors(laid_out, ragged=True, costs_of=plain),
        )
        for name, laid_out in steps.items()
    }
    return Imbalance(
        even.step_s,
        {name: timeline.step_s for name, timeline in timelines.items()},
        {name: _idle_s(timeline) - _idle_s(even) for name, timeline in timelines.items()},
    )


def _idle_s(timeline: Timeline) -> float:
    return sum(timeline.idle_s.values())
