"""Reductions: the sums that make every gradient equal to that of the same model on one process.

The loss of a module is a sum over its units divided by their global count N (`Step.units`). So the gradient on each
dp rank is a term of one sum, and nothing is averaged:

- the gradient of a parameter is summed over the cp and dp ranks of its module's grid;
- the gradient of a tied weight is also summed over the first and the last stage;
- under sequence parallelism a tp rank has only its part of the sequence, so `partial` gradients are summed over tp
  too; so are the gradients of a router if tp ranks split the tokens;
- the gradient of an expert already includes the tokens of all ranks that send to it, so it is summed over the
  expert's copies only (expert_dp).

The auxiliary loss of a module with experts is a sum over samples, divided by the number of samples in the step.

The gradient norm counts every value once, and a checkpoint writes it once: the first of the ranks that hold it does.
"""

import math
from collections.abc import Iterable, Mapping

from mimogrid.core.job.models import Parameter
from mimogrid.core.topology.topology import StageInfo, Topology


def loss_scale(topology: Topology, module: str, units: float) -> float:
    """Return the factor of a module's loss sum: its weight divided by N (`units`); 0 if N is 0."""
    return topology.modules[module].loss_weight / units if units else 0.0


def loss_weight(topology: Topology, loss: str) -> float:
    """Return the weight of a loss in the job's loss, by its name in `Step.units`."""
    name, _, aux = loss.partition(".")
    return topology.modules[name].aux_loss if aux else topology.modules[name].loss_weight


def counts_in_norm(position: Mapping[str, int], info: StageInfo, parameter: Parameter | None) -> bool:
    """Whether a rank adds its values of a parameter to the gradient norm.

    `position` is the rank's (`Module.position`). `parameter` is None for a parameter of an own module.
    """
    if parameter is not None and parameter.expert is not None:
        sharded = parameter.tp_dim is not None
        return position["expert_dp"] == 0 and (sharded or position["expert_tp"] == 0)
    sharded = parameter is not None and parameter.tp_dim is not None
    second_copy = parameter is not None and parameter.copy is not None and not info.first
    first_copy = position["dp"] == position["cp"] == 0
    return first_copy and not second_copy and (sharded or position["tp"] == 0)


NORM_TERMS = 4
"""Floats that carry the squared norm of one rank."""


def exact_terms(partials: Iterable[float]) -> tuple[float, ...]:
    """Return a few floats whose exact sum is that of the partials (0 or more), beyond the precision of one float.

    `math.fsum` of the terms of all ranks is the correctly rounded sum of all partials. It does not depend on which
    rank held which partial, nor on their order. So a sharded update has the same gradient norm as a replicated one.

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
    """Return the correctly rounded sum of terms; infinity if the sum is too large or a term is not finite."""
    found = tuple(terms)
    try:
        return math.fsum(found) if all(map(math.isfinite, found)) else math.inf
    except OverflowError:
        return math.inf


def is_written_by(position: Mapping[str, int], info: StageInfo, parameter: Parameter | None) -> bool:
    """Whether a rank is the one that writes a parameter after its tp shards are gathered."""
    along = "tp" if parameter is None or parameter.expert is None else "expert_tp"
    return position[along] == 0 and counts_in_norm(position, info, parameter)
