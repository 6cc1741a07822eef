"""Modules: the networks of one stage on one rank, built from megatron-core to match the core's table.

A stage is a function of its inputs and the description of its share: flat rows in, flat rows out, one block
of positions times samples between the stages of a module.

| stage | inputs | outputs |
|---|---|---|
| first, nothing feeds it | ``rows`` | |
| first, fed | the rows of each feeder by its name | |
| first, `gpt` | also ``tokens``, -1 at placeholders | |
| any but the last | | the module's own name: hidden states [S, B, H] |
| any but the first | the module's own name: hidden states | |
| last | | rows by the name of each target |
| last, with targets | ``labels``, ``loss_weights`` (`gpt`); ``targets`` (`regressor`) | ``loss``, a sum |
| last, without targets | | ``logits`` (`gpt`); ``prediction`` (`regressor`) |
| any with an auxiliary loss, in training | | ``NAME.aux``, this rank's term of it; its gradient is attached |

Under tensor and context parallelism inputs and outputs are whole on every rank that shares them, and so are the
gradients of the inputs. Two things are each cp rank's own, with what it computes them from: hidden states, which
are its part of S, and its term of the loss. Building, forward and backward happen inside `megatron.cpu.on_device`.

Shapes in names: S positions, B samples, H hidden, T tokens, R rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.job.layer_engines import choose
from mimogrid.core.job.models import Gpt, Own, Parameter
from mimogrid.core.job.placement import trainable_names
from mimogrid.core.topology.topology import UNKNOWN, StageInfo, Topology
from mimogrid.shell.megatron import engine
from mimogrid.shell.modules.built_in import RowsStage, TextStage
from mimogrid.shell.modules.given import HostStage, OwnStage, check_groups, check_patterns, own_network
from mimogrid.shell.modules.interface import (
    HostNetwork,
    OwnNetwork,
    StageGroups,
    StageModule,
    ep_position,
    name_of_weight,
    named_weights,
)
from mimogrid.shell.modules.transformer import Context
from mimogrid.shell.modules.weights import cut_over, initialize, shard_shape


__all__ = ["HostNetwork", "OwnNetwork", "StageModule", "build_stage", "named_weights"]


def build_stage(
    topology: Topology,
    info: StageInfo,
    groups: StageGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    given: nn.Module | None = None,
) -> StageModule:
    """Build a stage that computes in `dtype`, with its initial weights; what the plan freezes takes no gradient.

    The weights are not rounded below fp32 yet: ``stage.to(dtype)`` does that. The network may be `given` instead
    of built (`OwnNetwork`, `HostNetwork`): it is moved to the device, and begins on every dp rank with the
    weights that the first dp rank has. `StageModule.info` of such a stage tells of the parameters that it has.
    """
    module = topology.modules[info.stage.module]
    written = topology.spec.modules[module.name]
    stage = _stage(topology, info, groups, device=device, dtype=dtype, given=given)
    stage.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    held = module.held(stage.info, ep_position(groups))
    _check(stage, held, groups)
    weights = named_weights(stage)
    if not isinstance(stage, HostStage):
        initialize(weights, held, seed=topology.spec.seed, module=module.name, groups=groups)
    trainable = stage.info.trainable
    if UNKNOWN in trainable:  # The names of an own module are known only now.
        check_patterns(written, module.name, tuple(weights))
        trainable = trainable_names(written, tuple(weights))
        check_groups(topology.spec.optimizer, module.name, tuple(weights))
    for name, weight in weights.items():
        weight.requires_grad_(name in trainable)
    if given is not None:
        _begin_alike(stage, given, groups)
    return stage


def _stage(
    topology: Topology,
    info: StageInfo,
    groups: StageGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    given: nn.Module | None,
) -> StageModule:
    """Return a stage of the network given, or of the layers of its engine, wherever torch allocates them."""
    module, spec = topology.modules[info.stage.module], topology.spec
    written = spec.modules[module.name]
    if isinstance(module.model, Own):
        own = given
        if own is None:
            own = own_network(module.model, written.options, seed=spec.seed, module=module.name)
        return OwnStage(module, info, own, dtype=dtype)
    if given is not None:
        table = given.table(info, tp=groups.tp.size(), expert_tp=groups.expert_tp.size())  # type: ignore[operator]
        return HostStage(topology, module, info, given, table=table, dtype=dtype)
    choice = choose(module.name, spec, missing=engine.missing(device), version=engine.version())
    context = Context(module, info, groups, written.recompute, dtype, choice, written.fp8)
    if isinstance(module.model, Gpt):
        return TextStage(context, module.model, sequence=topology.sequence)
    return RowsStage(context, module.model)


def _begin_alike(stage: StageModule, given: nn.Module, groups: StageGroups) -> None:
    """Give all copies of a weight the values of the first: along dp, along tp where it is whole, at both ends."""
    weights = named_weights(stage)
    experts = {parameter.name for parameter in stage.info.parameters if parameter.expert is not None}
    common = [weight for name, weight in weights.items() if name not in experts]
    for tensor in (*common, *given.buffers()):
        dist.broadcast(tensor.detach(), group=groups.dp, group_src=0)
    for name in (name for name in weights if name in experts):
        dist.broadcast(weights[name].detach(), group=groups.expert_dp, group_src=0)
    for parameter in stage.info.parameters:
        if parameter.name in weights and parameter.tp_dim is None:
            dist.broadcast(weights[parameter.name].detach(), group=cut_over(parameter, groups), group_src=0)
        if parameter.copy is not None and stage.info.first != stage.info.last:
            dist.broadcast(weights[parameter.name].detach(), group=groups.tie, group_src=0)


def _check(stage: StageModule, held: Sequence[Parameter], groups: StageGroups) -> None:
    """The table of the core and what was built are the same."""
    planned = {p.name: shard_shape(p, tp_size=cut_over(p, groups).size()) for p in held}
    built = {name_of_weight(stage, name): tuple(w.shape) for name, w in stage.named_parameters()}
    if isinstance(stage, OwnStage):  # The table holds its projectors only.
        built = {name: shape for name, shape in built.items() if name in planned}
    assert built == planned, sorted(set(built.items()) ^ set(planned.items()))
