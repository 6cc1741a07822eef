"""Two convolutions over a picture."""

from torch import nn


class Eyes(nn.Module):
    """Maps pixels [I, 1, 8, 8] of all pictures to rows [4 I, width]: one for each quarter."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, kernel_size=4, stride=4),
        )

    def forward(self, inputs):
        """Return the rows of all pictures, one picture after the other."""
        return {"rows": self.layers(inputs["pixels"]).flatten(2).transpose(1, 2).flatten(0, 1)}
