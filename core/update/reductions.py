"""The gradient plan: which sums make every gradient that of the same model on one process.

The loss of a module is a sum over its units divided by their global count N (`steps.Step.units`), so each
dp rank's gradient is a term of one sum, and nothing is ever averaged:

- a parameter's gradient is summed over the dp ranks (cp and dp) of its own module's grid;
- a weight that both ends of a module hold is summed over the two;
- where sequence parallelism leaves a tp rank only its part of the sequence, `partial` gradients are summed
  over tp, and so are a router's wherever tp ranks deal the tokens among them;
- an expert's gradient already holds the tokens of all ranks that send to it, so it is summed over its copies
  only (expert_dp).

The auxiliary loss of a module with experts is one more sum, over samples, divided by how many the step has.

The global norm counts every value once, and a checkpoint writes it once: of several ranks that hold the same
values, the first one does.
"""

import math
from collections.abc import Iterable, Mapping

from mimogrid.core.job.models import Parameter
from mimogrid.core.topology.topology import StageInfo, Topology


def loss_scale(topology: Topology, module: str, units: float) -> float:
    """Return what a module's loss sum is multiplied by: its weight over N, and 0 where N is 0."""
    return topology.modules[module].loss_weight / units if units else 0.0


def loss_weight(topology: Topology, loss: str) -> float:
    """Return the weight of a loss in that of the job, by its name among `steps.Step.units`."""
    name, _, aux = loss.partition(".")
    return topology.modules[name].aux_loss if aux else topology.modules[name].loss_weight


def counts_in_norm(position: Mapping[str, int], info: StageInfo, parameter: Parameter | None) -> bool:
    """Whether the values that a rank holds of a parameter enter the global norm from there.

    `position` is the rank's (`Module.position`); `parameter` is None for one of an own module.
    """
    if parameter is not None and parameter.expert is not None:
        sharded = parameter.tp_dim is not None
        return position["expert_dp"] == 0 and (sharded or position["expert_tp"] == 0)
    sharded = parameter is not None and parameter.tp_dim is not None
    second_copy = parameter is not None and parameter.copy is not None and not info.first
    first_lane = position["dp"] == position["cp"] == 0
    return first_lane and not second_copy and (sharded or position["tp"] == 0)


NORM_TERMS = 4


def exact_terms(partials: Iterable[float]) -> tuple[float, ...]:
    """Return a few floats whose sum is that of squares (0 or more) far beyond what one float can hold.

    The sum of the terms of all ranks (`math.fsum`) is then the correctly rounded sum of all partials, whoever
    held which and in whatever order: it does not change where dp ranks share what they used to repeat.

    >>> math.fsum((*exact_terms([1.0, 1e-30]), *exact_terms([1e30]))) == math.fsum([1e30, 1e-30, 1.0])
    True
    """
    rest = list(partials)
    if not all(map(math.isfinite, rest)):
        return (math.inf,) * NORM_TERMS
    terms: list[float] = []
    for _ in range(NORM_TERMS):
        terms.append(sum_of_terms(rest))
        rest.append(-terms[-1])
    return tuple(terms)


def sum_of_terms(terms: Iterable[float]) -> float:
    """Return the correctly rounded sum of terms; infinite where it is too large, or one of them is."""
    found = tuple(terms)
    try:
        return math.fsum(found) if all(map(math.isfinite, found)) else math.inf
    except OverflowError:
        return math.inf


def is_written_by(position: Mapping[str, int], info: StageInfo, parameter: Parameter | None) -> bool:
    """Whether a rank is the one that hands over a parameter once its shards are put together."""
    along = "tp" if parameter is None or parameter.expert is None else "expert_tp"
    return position[along] == 0 and counts_in_norm(position, info, parameter)
