"""The optimizer: torch's, one per rank over the weights that it holds.

Ranks that hold the same weight see the same gradient and take the same step, so nothing is exchanged here.
"""

from collections.abc import Iterable

import torch

from mimogrid.core.spec import OptimizerSpec


def build(spec: OptimizerSpec, weights: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return the optimizer of the job over some weights, or None where there is nothing to train."""
    trained = list(weights)
    if not trained:
        return None
    return torch.optim.AdamW(
        trained,
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
