"""Memory: the bytes that a rank needs at most, as far as a plan can know them.

Weights, gradients and the two moments of Adam follow from the table of parameters, exactly. What a microbatch
in flight keeps for its backward is an estimate: per layer and position the values that a pre-norm transformer
layer saves (inputs of norms and linears, queries, keys and values, the middle of the MLP twice), and per head
the attention scores and their softmax. Temporary buffers and the allocator's losses are not in it, nor is a
module of the user's own.
"""

from collections.abc import Mapping

from mimogrid.core.models import BuiltIn, Own, Parameter
from mimogrid.core.steps import Step
from mimogrid.core.topology import Module, Stage, StageInfo
from mimogrid.core.traffic import VALUE_BYTES


def peak_bytes(step: Step, in_flight: Mapping[Stage, int]) -> dict[int, int]:
    """Return the bytes that each rank needs at most, given how many microbatches its stages hold."""
    topology = step.topology
    value = VALUE_BYTES[topology.spec.precision]
    found = dict.fromkeys(topology.ranks, 0)
    for rank in found:
        for info in topology.stages_of(rank):
            module = topology.modules[info.stage.module]
            lane = module.grid.position(rank)["dp"]
            values = _kept(module, info) + in_flight.get(info.stage, 0) * _saved(step, module, info, lane)
            found[rank] += round(value * values)
    return found


def _kept(module: Module, info: StageInfo) -> float:
    """Values of weights, and of gradients and moments of those that train."""
    return sum(
        _size(module, parameter) * (4 if parameter.name in info.trainable else 1)
        for parameter in info.parameters
    )


def _size(module: Module, parameter: Parameter) -> float:
    size = 1.0
    for extent in parameter.shape:
        size *= extent
    if parameter.expert is not None and module.experts:
        size /= module.experts.extent("ep")
        tp = module.experts.extent("expert_tp")
    else:
        tp = module.grid.extent("tp")
    return size / tp if parameter.tp_dim is not None else size


def _saved(step: Step, module: Module, info: StageInfo, lane: int) -> float:
    """Values that the largest microbatch of a lane keeps until its backward, where there is one."""
    if isinstance(module.model, Own) or not info.backward:
        return 0.0
    recompute = step.topology.spec.modules[module.name].recompute
    of_layer = (
        _of_layer(module, module.model, step.hop_shape(info.stage, lane, k), recompute)
        for k in range(module.microbatches)
    )
    return len(info.layers) * max(of_layer)


def _of_layer(module: Module, model: BuiltIn, shape: tuple[int, int, int], recompute: str) -> float:
    positions, samples, hidden = shape
    tp = module.grid.extent("tp")
    shared = tp if module.sequence_parallel else 1
    tokens = positions * samples
    keys = positions * module.grid.extent("cp")
    middle = model.ffn * (model.top_k if model.experts else 1)
    inputs = tokens * hidden
    if recompute == "full":
        return inputs / shared
    qkv = (model.heads + 2 * model.kv_heads) * model.head_width
    linear = tokens * (qkv + hidden + 2 * middle) / tp
    scores = 0.0 if recompute == "selective" else 2 * tokens * keys * model.heads / tp
    return 4 * inputs / shared + linear + scores
