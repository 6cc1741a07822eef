"""A listener of two layers."""

from torch import nn


class Ears(nn.Module):
    """Rows of `frames` numbers in, as many rows of `width` out; the rows of all samples lie end to end."""

    def __init__(self, width, frames):
        super().__init__()
        self.inner = nn.Linear(frames, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, inputs):
        """Return a row per row; ``inputs["lengths"]`` says how many each sample has."""
        return {"rows": self.outer(nn.functional.gelu(self.inner(inputs["rows"])))}
