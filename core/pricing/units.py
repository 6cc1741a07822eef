"""Units: the seconds of the parts of a module that no stage cuts (`flops.units`), on a machine, for a dp rank's load.

Any stage is a sum of such parts (`joined`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import attrs

from mimogrid.core.job.costs import StageCosts
from mimogrid.core.job.models import FIRST, LAST, BuiltIn, Gpt, Own, Parameter
from mimogrid.core.pricing.collectives import all_reduce_s, gather_s, moved_s
from mimogrid.core.pricing.flops import Load, Terms
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.pricing.roofline import Seconds, unit_seconds
from mimogrid.core.topology.topology import Module, StageInfo
from mimogrid.core.update.buckets import local_size


ADAM_VALUES = 7
"""How many values an update reads (weight, gradient, two moments) and writes (weight, two moments)."""


@attrs.frozen
class Values:
    """Values of weights that a rank holds, and of these, those that train: of experts, and all others."""

    held: float = 0.0
    trained: float = 0.0
    trained_experts: float = 0.0


def unit_costs(
    module: Module,
    load: Load,
    machine: Machine,
    *,
    terms: Sequence[Terms],
    values: Sequence[Values],
    recomputes: bool,
    sharded: bool,
) -> tuple[StageCosts, ...]:
    """Return the seconds of a module in parts that no stage cuts (see `flops.units`), for a dp rank's load.

    `terms` and `values` are of these parts. With `recomputes`, layers are computed again in the backward, with their
    collectives. With `sharded`, gradients are reduce-scattered over dp ranks and weights gathered.

    Nothing for a module of the user's own.
    """
    if isinstance(module.model, Own):
        return ()
    model, last = module.model, module.model.layers + 1
    times = machine.times(module.name)
    kinds: dict[object, StageCosts] = {}  # most layers are alike
    costs: list[StageCosts] = []
    for i, (work, held) in enumerate(zip(unit_seconds(terms, load, module, machine), values, strict=True)):
        in_layers = 0 < i < last
        routes = in_layers and model.has_experts(i - 1)
        kind = id(work), id(held), in_layers, i == 0, routes
        if kind not in kinds:
            forward, inputs, weights = _computing_s(
                work,
                collectives=_collectives_s(
                    module,
                    model,
                    load,
                    machine,
                    entry=i == 0,
                    leaves=i == last,
                    routes=routes,
                ),
                recomputes=recomputes and in_layers,
            )
            kinds[kind] = StageCosts(
                forward=times * forward,
                input_gradient=times * inputs,
                weight_gradient=times * weights,
                reduce=(1 if sharded else 2) * _copies_s(module, held, machine, machine.state_bytes),
                gather=_copies_s(module, held, machine, machine.value_bytes) if sharded else 0.0,
                update=_update_s(held, machine),
            )
        costs.append(kinds[kind])
    return tuple(costs)


def joined(parts: Iterable[StageCosts]) -> StageCosts:
    """Return the costs of a stage that consists of these parts."""
    parts = tuple(parts)
    return StageCosts(
        forward=math.fsum(part.forward for part in parts),
        input_gradient=math.fsum(part.input_gradient or 0.0 for part in parts),
        weight_gradient=math.fsum(part.weight_gradient or 0.0 for part in parts),
        reduce=math.fsum(part.reduce for part in parts),
        gather=math.fsum(part.gather for part in parts),
        update=math.fsum(part.update for part in parts),
    )


def _computing_s(
    products: Seconds, *, collectives: tuple[float, float], recomputes: bool
) -> tuple[float, float, float]:
    """Return the seconds of a forward, of the gradients of inputs, and of those of weights.

    They are those of `products` and of `collectives`, forward and backward. Recomputation comes before the first
    gradient.
    """
    forward_s, backward_s = collectives
    inputs, weights = products.input_gradient, products.weight_gradient
    again = products.recomputed + (forward_s if recomputes and products.recomputed else 0.0)
    if inputs:
        inputs += backward_s + again
    elif weights:
        weights += again
    return products.forward + forward_s, inputs, weights


def _tp(module: Module) -> int:
    return module.grid.extent("tp")


def _collectives_s(
    module: Module, model: BuiltIn, load: Load, machine: Machine, *, entry: bool, leaves: bool, routes: bool
) -> tuple[float, float]:
    """Return the seconds in which the ranks of a dp rank exchange data in a part, forward and backward."""
    block = load.positions / module.cp * model.hidden * machine.value_bytes
    tp = all_reduce_s(block, module.grid, ("tp",), machine)
    if entry or leaves:
        # The embedding is all-reduced forward, the gradient of the head's input backward.
        return (tp * entry, tp * leaves) if isinstance(model, Gpt) else (0.0, 0.0)
    keys = load.positions * 2 * model.kv_heads * model.head_width / _tp(module) * machine.value_bytes
    both = 2 * tp + gather_s(keys, module.grid, ("cp",), machine)
    if module.experts is not None and routes:
        tokens = block * model.top_k / _tp(module)
        both += 2 * gather_s(tokens, module.experts, ("expert_tp", "ep"), machine)
    return both, both


def values_of_units(module: Module) -> tuple[Values, ...]:
    """Return the values that a rank holds of each part of a module that no stage cuts (see `flops.units`)."""
    if isinstance(module.model, Own):
        return ()
    last = module.model.layers + 1
    held, trained, experts = ([0.0] * (last + 1) for _ in range(3))
    for info in module.stages:
        for parameter in info.parameters:
            size = _values_of(module, parameter)
            for unit in _units_with(parameter, info, last):
                held[unit] += size
                if parameter.name in info.trainable:
                    (trained if parameter.expert is None else experts)[unit] += size
    kinds: dict[tuple[float, float, float], Values] = {}
    each = zip(held, trained, experts, strict=True)
    return tuple(kinds.setdefault(sizes, Values(*sizes)) for sizes in each)


def _units_with(parameter: Parameter, info: StageInfo, last: int) -> Iterator[int]:
    """Yield the parts in which a stage has a parameter."""
    if isinstance(parameter.layer, int):
        yield 1 + parameter.layer
    if parameter.layer == FIRST and info.first:
        yield 0
    if LAST in (parameter.layer, parameter.copy) and info.last:
        yield last


def _values_of(module: Module, parameter: Parameter) -> float:
    """Return how many values of a parameter a rank holds; of an expert, the mean over ranks."""
    size = local_size(module, parameter)
    return size / module.experts.extent("ep") if parameter.expert is not None and module.experts else size


def _copies_s(module: Module, values: Values, machine: Machine, value_bytes: int) -> float:
    """Return the seconds of an all-gather, or a reduce-scatter, of trained values among the ranks that hold copies.

    Buckets are too large for latency to count.
    """
    experts = 0.0
    if module.experts is not None:
        experts = moved_s(values.trained_experts * value_bytes, module.experts, ("expert_dp",), machine)
    return experts + moved_s(values.trained * value_bytes, module.grid, ("cp", "dp"), machine)


def _update_s(values: Values, machine: Machine) -> float:
    """Return the seconds of the optimizer step of what a rank updates."""
    size = (values.trained + values.trained_experts) * machine.state_bytes
    return ADAM_VALUES * size / machine.accelerator.memory_bytes_per_s
