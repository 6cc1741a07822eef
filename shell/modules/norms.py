"""Norms of rows outside of the layers: before the first one, and in projectors.

Every tp rank computes them on whole rows, so their gradients are never partial over tp.
"""

import torch
from torch import nn


KINDS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def norm_of(kind: str, width: int, *, eps: float, dtype: torch.dtype) -> nn.Module:
    """Return a norm of rows of a width; `kind` is the option `norm`."""
    return KINDS[kind](width, eps=eps, dtype=dtype)
