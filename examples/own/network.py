"""A listener of two layers."""

from torch import nn


class Ears(nn.Module):
    """Maps rows [R, frames] to rows [R, width]; the rows of all samples are concatenated."""

    def __init__(self, width, frames):
        super().__init__()
        self.inner = nn.Linear(frames, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, inputs):
        """Return a row for each row; ``inputs["lengths"]`` has the number of rows of each sample."""
        return {"rows": self.outer(nn.functional.gelu(self.inner(inputs["rows"])))}
