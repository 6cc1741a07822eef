"""Gradients: one flat buffer per stage, summed over the ranks that the gradient plan names.

Every trainable parameter's gradient is a view of its stage's buffer: backward passes add into it, a reduction
is one all-reduce, and a parameter that a lane never touched counts as zeros there, not as absent.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.gradients import counts_in_norm
from mimogrid.core.topology import Module, StageInfo
from mimogrid.shell.groups import ModuleGroups


class GradientBuffer:
    """The gradients of one stage on this rank."""

    def __init__(
        self,
        module: Module,
        position: Mapping[str, int],
        info: StageInfo,
        weights: Mapping[str, nn.Parameter],
        groups: ModuleGroups,
    ) -> None:
        table = {parameter.name: parameter for parameter in info.parameters}
        partial = {name for name, p in table.items() if p.partial and module.sequence_parallel}
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        # Partial ones come first, so that one reduction covers them all.
        self.weights = dict(sorted(trained.items(), key=lambda item: item[0] not in partial))
        self._groups = groups
        size = sum(weight.numel() for weight in self.weights.values())
        like = next(iter(weights.values()))
        self._flat = torch.zeros(size, dtype=like.dtype, device=like.device)
        start = 0
        for weight in self.weights.values():
            weight.grad = self._flat[start : start + weight.numel()].view_as(weight)
            start += weight.numel()
        self._partial = self._flat[: sum(self.weights[n].numel() for n in partial & set(self.weights))]
        self._tied = [name for name, p in table.items() if p.copy and name in self.weights]
        self._counted = [
            weight for name, weight in self.weights.items() if counts_in_norm(position, info, table.get(name))
        ]

    def clear(self) -> None:
        """Set every gradient to zero."""
        self._flat.zero_()

    def reduce(self) -> None:
        """Sum over the data lanes, and what is partial over tp."""
        if len(self._partial):
            dist.all_reduce(self._partial, group=self._groups.tp)
        if self._groups.dp.size() > 1:
            dist.all_reduce(self._flat, group=self._groups.dp)

    def tie(self) -> None:
        """Sum tied weights over the two ends of the module."""
        for name in self._tied:
            gradient = self.weights[name].grad
            assert gradient is not None
            dist.all_reduce(gradient, group=self._groups.tie)

    def scale(self, factor: float) -> None:
        """Multiply every gradient by a factor."""
        self._flat.mul_(factor)

    def norm_squared(self) -> float:
        """Return the sum of squares, in fp64, of the gradients that count here."""
        partials = [w.grad.double().square().sum() for w in self._counted if w.grad is not None]
        return float(torch.stack(partials).sum()) if partials else 0.0
