"""Networks that sleep, in their forward and in the backward of what they return."""

import time

import torch
from torch import nn


class Sleep(torch.autograd.Function):
    """The identity, which takes its time both ways."""

    @staticmethod
    def forward(ctx, rows, forward_s, backward_s):
        """Sleep and return the rows."""
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient):
        """Sleep and return the gradient."""
        time.sleep(ctx.backward_s)
        return gradient, None, None


class Passes(nn.Module):
    """Rows through one layer, slowly."""

    def __init__(self, width, forward_s, backward_s):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.seconds = forward_s, backward_s

    def forward(self, inputs):
        """Return a row for each that comes in."""
        fed = [rows for name, rows in inputs.items() if not name.startswith(("lengths", "grids"))]
        return {"rows": Sleep.apply(self.linear(torch.cat(fed)), *self.seconds)}


class Judges(Passes):
    """The sum of squares."""

    def forward(self, inputs):
        """Return a loss."""
        return {"loss": super().forward(inputs)["rows"].square().sum()}
