"""Construction: a stage of built-in layers, or of a network of the user's or the host's, with its first weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.layer_engines import choose
from mimogrid.core.job.lora import held_in
from mimogrid.core.job.models import Gpt, Own, Parameter, Vit
from mimogrid.core.job.placement import trainable_names
from mimogrid.core.topology.topology import UNKNOWN, StageInfo, Topology
from mimogrid.shell.device.device import DTYPES
from mimogrid.shell.megatron import engine
from mimogrid.shell.megatron.lora import attach
from mimogrid.shell.modules.built_in import RowsStage, TextStage
from mimogrid.shell.modules.interface import (
    StageGroups,
    StageModule,
    ep_position,
    name_of_weight,
    named_weights,
)
from mimogrid.shell.modules.published import load_published
from mimogrid.shell.modules.tower import TowerStage
from mimogrid.shell.modules.transformer import Context, TransformerStage
from mimogrid.shell.modules.user_modules import HostStage, OwnStage, check_groups, check_patterns, own_network
from mimogrid.shell.modules.weights import cut_over, initialize, shard_shape


def build_stage(
    topology: Topology,
    info: StageInfo,
    groups: StageGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    user_module: nn.Module | None = None,
) -> StageModule:
    """Build a stage that computes in `dtype`, with its initial weights. Frozen weights take no gradient.

    Weights have at least fp32; the caller rounds them (`round_weights`). A `user_module` (`OwnNetwork`,
    `HostNetwork`) takes the place of a network built here. It moves to the device, and every dp rank gets the weights
    of the first. `StageModule.info` of such a stage lists its own parameters.
    """
    module = topology.modules[info.stage.module]
    written = topology.spec.modules[module.name]
    stage = _stage(topology, info, groups, device=device, dtype=dtype, user_module=user_module)
    stage.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    held = module.held(stage.info, ep_position(groups))
    _check(stage, held, groups)
    weights = named_weights(stage)
    if not isinstance(stage, HostStage):
        drawn = held
        if written.weights is not None:
            drawn = load_published(Path(written.weights), weights, held, module=module.name, groups=groups)
        initialize(weights, drawn, seed=topology.spec.seed, module=module.name, groups=groups)
    trainable = stage.info.trainable
    if UNKNOWN in trainable:  # An own module's names are known only now.
        check_patterns(written, module.name, tuple(weights))
        trainable = trainable_names(written, tuple(weights))
        check_groups(topology.spec.optimizer, module.name, tuple(weights))
    for name, weight in weights.items():
        weight.requires_grad_(name in trainable)
    if user_module is not None:
        _broadcast_weights(stage, user_module, groups)
    return stage


def round_weights(stage: StageModule, topology: Topology) -> None:
    """Give the weights of a stage the precision of the job, and those of a base the one that LoRA says for it."""
    precision, lora = topology.spec.precision, topology.modules[stage.name].lora
    stage.to(DTYPES[precision])
    weights = named_weights(stage)
    for parameter in (each for each in stage.info.parameters if each.name in weights):
        weight = weights[parameter.name]
        held = held_in(parameter, lora, precision, trains=weight.requires_grad)
        if held != precision:
            weight.data = weight.data.to(DTYPES[held])


def _stage(
    topology: Topology,
    info: StageInfo,
    groups: StageGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    user_module: nn.Module | None,
) -> StageModule:
    """Return a stage of `user_module`, or of layers of the chosen engine, wherever torch allocates them."""
    module, spec = topology.modules[info.stage.module], topology.spec
    written = spec.modules[module.name]
    if isinstance(module.model, Own):
        own = user_module
        if own is None:
            own = own_network(module.model, written.options, seed=spec.seed, module=module.name)
        return OwnStage(module, info, own, dtype=dtype)
    if user_module is not None:
        if module.lora is not None:
            fact = "is for layers that are built here, and the host program gives a network."
            raise PlanError([Problem(f"modules.{module.name}.lora", fact, "Put LoRA into that network.")])
        table = user_module.table(info, tp=groups.tp.size(), expert_tp=groups.expert_tp.size())  # type: ignore[operator]
        return HostStage(module, info, user_module, table=table, dtype=dtype)
    choice = choose(module.name, spec, missing=engine.missing(device), version=engine.version())
    context = Context(module, info, groups, written.recompute, dtype, choice, written.fp8)
    stage: TransformerStage
    match module.model:
        case Gpt():
            stage = TextStage(context, module.model, sequence=topology.sequence)
        case Vit():
            stage = TowerStage(context, module.model)
        case _:
            stage = RowsStage(context, module.model)
    if module.lora is not None:
        attach(
            stage.decoder.layers,
            info.layers,
            module.model,
            module.lora,
            tp=groups.tp,
            sequence_parallel=stage.sequence_parallel,
            dtype=dtype,
            weight_grads=stage.weight_grads,
        )
    return stage


def _broadcast_weights(stage: StageModule, user_module: nn.Module, groups: StageGroups) -> None:
    """Give all copies of a weight the values of the first: along dp, along tp if it is not cut, and at both ends."""
    weights = named_weights(stage)
    experts = {parameter.name for parameter in stage.info.parameters if parameter.expert is not None}
    common = [weight for name, weight in weights.items() if name not in experts]
    for tensor in (*common, *user_module.buffers()):
        dist.broadcast(tensor.detach(), group=groups.dp, group_src=0)
    for name in (name for name in weights if name in experts):
        dist.broadcast(weights[name].detach(), group=groups.expert_dp, group_src=0)
    for parameter in stage.info.parameters:
        if parameter.name in weights and parameter.tp_dim is None:
            dist.broadcast(weights[parameter.name].detach(), group=cut_over(parameter, groups), group_src=0)
        if parameter.copy is not None and stage.info.first != stage.info.last:
            dist.broadcast(weights[parameter.name].detach(), group=groups.tie, group_src=0)


def _check(stage: StageModule, held: Sequence[Parameter], groups: StageGroups) -> None:
    """Assert that the built parameters are those of the core's table."""
    planned = {p.name: shard_shape(p, tp_size=cut_over(p, groups).size()) for p in held}
    built = {name_of_weight(stage, name): tuple(w.shape) for name, w in stage.named_parameters()}
    if isinstance(stage, OwnStage):  # The table holds its projectors only.
        built = {name: shape for name, shape in built.items() if name in planned}
    assert built == planned, sorted(set(built.items()) ^ set(planned.items()))
