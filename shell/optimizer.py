"""The optimizer: torch's, one per rank over the weights that it holds.

Ranks that hold the same weight see the same gradient and take the same step, so nothing is exchanged here.
"""

from collections.abc import Iterable

import torch

from mimogrid.core.spec import OptimizerSpec


MOMENTS = ("exp_avg", "exp_avg_sq")
"""The running means that the optimizer keeps per weight."""


def build(spec: OptimizerSpec, weights: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return the optimizer of the job over some weights, or None where there is nothing to train.

    Its state is there from the start, all zeros, so that a checkpoint can be written or loaded at any step.
    """
    trained = list(weights)
    if not trained:
        return None
    optimizer = torch.optim.AdamW(
        trained,
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )
    for weight in trained:
        moments = {moment: torch.zeros_like(weight) for moment in MOMENTS}
        steps = torch.zeros((), dtype=torch.float32, device=weight.device)
        optimizer.state[weight] = {"step": steps, **moments}
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps the optimizer has taken."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_steps_taken(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set how many steps the optimizer has taken, by which it corrects the bias of its means."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)
