"""The optimizer: torch's, one per rank, over the flat main parameters that this rank updates.

Ranks that hold the same weight have the same gradient and take the same step, so nothing is exchanged here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.optimizers import EMA, arguments_of, group_of, kind_of
from mimogrid.core.job.spec import GroupSpec, OptimizerSpec
from mimogrid.core.update.learning_rate import learning_rate
from mimogrid.shell.runtime.gradients import Shard


_FUSED = {"AdamW", "Adam", "SGD"}
"""Optimizers that update all parameters in one operation, on CPU and CUDA."""


def build(spec: OptimizerSpec, shards: Iterable[tuple[str, Shard]]) -> torch.optim.Optimizer | None:
    """Return the optimizer of the job over shards of each module, or None where this rank has none.

    Raises PlanError for options that torch refuses.
    """
    kind = kind_of(spec)
    members: dict[GroupSpec, list[torch.nn.Parameter]] = {}
    for module, shard in shards:
        members.setdefault(group_of(spec, module, shard.part.name), []).append(shard.main)
    groups: list[dict[str, Any]] = [
        {"params": mains, "lr": group.lr, "highest": group.lr}
        | ({"weight_decay": group.weight_decay} if kind.decays else {})
        for group, mains in members.items()
    ]
    if not groups:
        return None
    arguments = {**arguments_of(spec), **({"fused": True} if kind.name in _FUSED else {})}
    create = getattr(torch.optim, kind.name)
    try:
        optimizer: torch.optim.Optimizer = create(groups, **arguments)
    except ValueError as error:
        raise PlanError([Problem("optimizer", f"{kind.name}: {error}.", "Change its options.")]) from error
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, spec: OptimizerSpec, *, step: int, steps: int) -> None:
    """Set the learning rates of step `step` of `steps`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(spec, step=step, steps=steps, lr=group["highest"])


@torch.no_grad()
def average(optimizer: torch.optim.Optimizer, kept: float) -> None:
    """Move the running means of the weights after an update; after the first one they are the weights.

    A mean is among the states of its parameter, so it is sharded, saved and loaded as they are.
    """
    for group in optimizer.param_groups:
        for main in group["params"]:
            state = optimizer.state[main]
            if EMA in state:
                state[EMA].lerp_(main, 1 - kept)
            else:
                state[EMA] = main.detach().clone()


def begin_states(optimizer: torch.optim.Optimizer, *, ema: float) -> None:
    """Let the optimizer make its state, as in its first step; a checkpoint then overwrites it, and the weights."""
    for group in optimizer.param_groups:
        for main in group["params"]:
            main.grad.zero_()
    optimizer.step()
    if ema:
        average(optimizer, ema)


def states_of(optimizer: torch.optim.Optimizer | None, shard: Shard) -> Mapping[str, torch.Tensor]:
    """Return the state of the optimizer for a shard: tensors with a value for each of its own, or one for all."""
    if optimizer is None:
        return {}
    kept = optimizer.state.get(shard.main, {})
    return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}
