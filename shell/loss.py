"""Losses: weighted sums over tokens or values, never divided; who divides knows the count of the whole step.

Nothing is rounded below the dtype that comes in; half precision is raised to fp32.

Shapes in names: T tokens, V vocabulary entries of this tp rank, P the pair of the label's logit
and the sum of exponentials.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def cross_entropy_sum(
    logits_TV: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return the sum over tokens of weight times cross entropy; each rank of `group` holds a part of V.

    A token of weight 0 may have any label.
    """
    exact = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss: Tensor = _CrossEntropySum.apply(exact, labels_T, weights_T.to(exact.dtype), group)  # type: ignore[no-untyped-call]
    return loss


def squared_error_sum(prediction: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of squared differences over all values."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    return functional.mse_loss(prediction.to(exact), targets.to(exact), reduction="sum")


class _CrossEntropySum(torch.autograd.Function):
    """Two all-reduces forward (a maximum, a sum), none backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        group: dist.ProcessGroup,
    ) -> Tensor:
        tokens, entries = logits_TV.shape
        highest_T = logits_TV.amax(dim=1)
        if group.size() > 1:
            dist.all_reduce(highest_T, op=dist.ReduceOp.MAX, group=group)
        shifted_TV = logits_TV - highest_T[:, None]
        local_T = labels_T - entries * group.rank()
        here_T = (local_T >= 0) & (local_T < entries)
        index_T1 = local_T.clamp(0, entries - 1)[:, None]
        sums_PT = shifted_TV.new_empty(2, tokens)
        torch.mul(shifted_TV.gather(1, index_T1).squeeze(1), here_T, out=sums_PT[0])
        exponentials_TV = shifted_TV.exp_()
        torch.sum(exponentials_TV, dim=1, out=sums_PT[1])
        if group.size() > 1:
            dist.all_reduce(sums_PT, group=group)
        labelled_T, total_T = sums_PT.unbind()
        ctx.save_for_backward(exponentials_TV, total_T, index_T1, here_T, weights_T)
        return torch.dot(weights_T, total_T.log() - labelled_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exponentials_TV, total_T, index_T1, here_T, weights_T = ctx.saved_tensors
        scale_T = weights_T * grad
        grad_TV = exponentials_TV * (scale_T / total_T)[:, None]
        grad_TV.scatter_add_(1, index_T1, -(scale_T * here_T)[:, None])
        return grad_TV, None, None, None
