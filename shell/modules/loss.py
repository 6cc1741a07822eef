"""Losses: weighted sums over tokens or values. They are not divided here; the runtime divides by the step's count.

Results have at least the dtype of the inputs; half precision is raised to fp32.

Shapes in names: T tokens, V vocabulary entries of this tp rank, P the pair of the label's logit and the sum of
exponentials.
"""

from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mimogrid.core.step.step import Share


@attrs.frozen(eq=False)
class Predictions:
    """The logits of a language model for the tokens of a share, with their labels.

    Attributes:
        logits: [T, V], sample after sample. Under tp V is this rank's part of the vocabulary, under cp T are this
            rank's positions.
        labels: [T].
        weights: [T], the weight of each token; their sum is the number of units of the samples.
        share: The share of the tokens.
        tp: The ranks that hold the parts of V.
    """

    logits: Tensor
    labels: Tensor
    weights: Tensor
    share: Share
    tp: dist.ProcessGroup

    def cross_entropies(self) -> Tensor:
        """Return the cross entropy of each token [T], equal on all ranks of `tp`."""
        return cross_entropies(self.logits, self.labels, self.tp)


Loss = Callable[[Predictions], Tensor]
"""A loss of a language model: a scalar sum over the rank's tokens. The runtime divides it by the units of the step."""


@attrs.frozen
class StepLoss:
    """The loss of a step as a network keeps it: a plain value.

    A loss may be an `nn.Module`, and a network that had it as an attribute would take it for a part of itself.
    """

    loss: Loss

    def __call__(self, predictions: Predictions) -> Tensor:
        """Return the loss."""
        return self.loss(predictions)


def weighted_cross_entropy(predictions: Predictions) -> Tensor:
    """Return the sum over tokens of weight times cross entropy: the default loss."""
    losses_T = predictions.cross_entropies()
    return torch.dot(predictions.weights.to(losses_T.dtype), losses_T)


def cross_entropies(logits_TV: Tensor, labels_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the cross entropy of each token [T]; each rank of `group` holds a part of V.

    A token with weight 0 may have any label.
    """
    exact = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    losses: Tensor = _CrossEntropies.apply(exact, labels_T, group)  # type: ignore[no-untyped-call]
    return losses


def squared_error_sum(prediction: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of squared differences over all values."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    return functional.mse_loss(prediction.to(exact), targets.to(exact), reduction="sum")


class _CrossEntropies(torch.autograd.Function):
    """Two all-reduces forward (a maximum, a sum), none backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
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
        # Not a product: logits of padding are minus infinity.
        sums_PT[0] = shifted_TV.gather(1, index_T1).squeeze(1).masked_fill_(~here_T, 0.0)
        exponentials_TV = shifted_TV.exp_()
        torch.sum(exponentials_TV, dim=1, out=sums_PT[1])
        if group.size() > 1:
            dist.all_reduce(sums_PT, group=group)
        labelled_T, total_T = sums_PT.unbind()
        ctx.save_for_backward(exponentials_TV, total_T, index_T1, here_T)
        return total_T.log() - labelled_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        exponentials_TV, total_T, index_T1, here_T = ctx.saved_tensors
        grad_TV = exponentials_TV * (grad_T / total_T)[:, None]
        grad_TV.scatter_add_(1, index_T1, -(grad_T * here_T)[:, None])
        return grad_TV, None, None
