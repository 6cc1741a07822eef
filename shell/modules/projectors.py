"""Projectors: the rows that an edge carries, from the positions behind the layers of the source module.

A row is made of one position or of several side by side (`core.models.tower`). Whatever a projector is, it first lays
them side by side: a linear layer, two with an activation between them, or a merger, which has a norm before. The norm
of a merger is of single positions, that of a deepstack merger of what lies side by side.

Shapes in names: P positions, R rows, H hidden.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mimogrid.core.job.models import BuiltIn, Own
from mimogrid.core.job.projectors import Projector, deepstack_layers
from mimogrid.core.topology.topology import Edge
from mimogrid.shell.megatron.layers import ACTIVATIONS, Affine
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.modules.norms import norm_of


class LinearProjector(Affine):
    """One linear layer."""

    def forward(self, positions_PH: Tensor, inner: Sequence[Tensor] = ()) -> Tensor:
        """Return the rows [R, width]."""
        return super().forward(positions_PH.reshape(-1, self.in_features))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, and before them a norm if `norm_width` is not 0."""

    def __init__(
        self,
        projector: Projector,
        widths: tuple[int, int, int],
        *,
        norm_width: int = 0,
        dtype: torch.dtype,
        weight_grads: WeightGradStore,
    ) -> None:
        super().__init__()
        wide, inner, width = widths
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[projector.activation]
        self.norm_width = norm_width
        self.norm = (
            norm_of(projector.norm, norm_width, eps=projector.norm_eps, dtype=dtype) if norm_width else None
        )
        self.up, self.down = (
            Affine(*shape, dtype=dtype, weight_grads=weight_grads, bias=projector.bias)
            for shape in ((wide, inner), (inner, width))
        )
        self.deepstack = nn.ModuleList()

    def forward(self, positions_PH: Tensor, inner: Sequence[Tensor] = ()) -> Tensor:
        """Return the rows [R, width], and beside them those of inner layers, each through a merger of its own."""
        if self.norm is not None:
            positions_PH = self.norm(positions_PH.reshape(-1, self.norm_width))
        rows: Tensor = self.down(self.activation(self.up(positions_PH.reshape(-1, self.up.in_features))))
        if not inner:
            return rows
        deep = [merger(positions) for merger, positions in zip(self.deepstack, inner, strict=True)]
        return torch.cat((rows, *deep), dim=-1)


def projector_of(
    edge: Edge, source: BuiltIn | Own, *, dtype: torch.dtype, weight_grads: WeightGradStore
) -> nn.Module:
    """Return the projector of an edge out of a module."""
    projector = edge.projector
    assert projector is not None
    assert source.hidden is not None
    assert source.row_width is not None
    width = edge.width // edge.parts
    if projector.kind == "linear":
        return LinearProjector(
            source.row_width, width, dtype=dtype, weight_grads=weight_grads, bias=projector.bias
        )
    widths = (source.row_width, projector.inner(source, width), width)
    merges = projector.kind == "merger"
    mlp = Mlp(
        projector,
        widths,
        norm_width=source.hidden if merges else 0,
        dtype=dtype,
        weight_grads=weight_grads,
    )
    for _ in deepstack_layers(source):
        mlp.deepstack.append(
            Mlp(projector, widths, norm_width=source.row_width, dtype=dtype, weight_grads=weight_grads)
        )
    return mlp
