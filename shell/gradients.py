"""Gradients: one flat buffer per stage, summed over the ranks that the gradient plan names.

Every trainable parameter's gradient is a view of its stage's buffer: backward passes add into it, a reduction
is one all-reduce (one more for what is partial over tp, and one for experts), and a parameter that a lane
never touched counts as zeros there, not as absent.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.gradients import counts_in_norm
from mimogrid.core.models import Parameter
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
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        # What is reduced alike lies together: partial ones first, experts last.
        sections = {name: _section(module, table.get(name)) for name in trained}
        self.weights = dict(sorted(trained.items(), key=lambda item: sections[item[0]]))
        self._groups = groups
        size = sum(weight.numel() for weight in self.weights.values())
        like = next(iter(weights.values()), torch.empty(0))  # A module of the user's may have none.
        self._flat = torch.zeros(size, dtype=like.dtype, device=like.device)
        start = 0
        for weight in self.weights.values():
            weight.grad = self._flat[start : start + weight.numel()].view_as(weight)
            start += weight.numel()
        sizes = [sum(w.numel() for n, w in trained.items() if sections[n] == section) for section in range(3)]
        self._partial, _, self._experts = self._flat.split(sizes)
        self._common = self._flat[: size - sizes[-1]]
        self._tied = [name for name, p in table.items() if p.copy and name in self.weights]
        self._counted = [
            weight for name, weight in self.weights.items() if counts_in_norm(position, info, table.get(name))
        ]

    def clear(self) -> None:
        """Set every gradient to zero."""
        self._flat.zero_()

    def reduce(self) -> None:
        """Sum over the data lanes, what is partial over tp, and experts over their copies."""
        _all_reduce(self._partial, self._groups.tp)
        _all_reduce(self._common, self._groups.dp)
        _all_reduce(self._experts, self._groups.expert_dp)

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


def _section(module: Module, parameter: Parameter | None) -> int:
    if parameter is None:
        return 1
    return 2 if parameter.expert is not None else int(not module.is_partial(parameter))


def _all_reduce(gradients: torch.Tensor, group: dist.ProcessGroup) -> None:
    if len(gradients) and group.size() > 1:
        dist.all_reduce(gradients, group=group)
