"""Flow matching over pictures of 8 x 16 pixels (Lipman et al. 2022, arXiv 2210.02747).

A picture x1 and noise x0 are joined by a straight line x_t = (1 - t) x0 + t x1. The network learns the velocity x1 - x0
from x_t, t and the state of the language model at the end of its answer. To draw, it follows the velocity from noise.
"""

import math

import torch
from torch import nn
from torch.nn import functional


PIXELS = 128


class Block(nn.Module):
    """A residual MLP; the condition scales and shifts what it reads."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden, condition):
        """Map hidden states [B, N, width] under conditions of the same shape."""
        scale, shift = self.condition(condition).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(self.up(self.norm(hidden) * (1 + scale) + shift)))


class Flow(nn.Module):
    """Learns to draw the answer that the last row of a sample stands for."""

    def __init__(self, reads, width, blocks, steps):
        super().__init__()
        self.steps = steps
        self.read = nn.Linear(reads, width)
        self.time = nn.Linear(32, width)
        self.enter = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.leave = nn.Linear(width, PIXELS)

    def forward(self, inputs):
        """Return the squared error of the velocity, or, where there is no picture to learn from, a drawing."""
        told_BW = self.read(inputs["language"][inputs["lengths"].cumsum(0) - 1])[:, None]
        noise_BNP = inputs["noise"]
        if "picture" not in inputs:
            return {"prediction": self._drawn(noise_BNP, told_BW)}
        picture_BNP, time_BN1 = inputs["picture"][:, None], inputs["time"]
        there = torch.lerp(noise_BNP, picture_BNP, time_BN1)
        error = self._velocity(there, time_BN1, told_BW) - (picture_BNP - noise_BNP)
        return {"loss": error.square().mean(dim=(1, 2)).sum()}

    def _velocity(self, there_BNP, time_BN1, told_BW):
        frequencies = torch.exp(torch.arange(16, device=time_BN1.device) * (-math.log(100.0) / 15)) * 50
        angles = time_BN1 * frequencies.to(time_BN1.dtype)
        condition = functional.silu(told_BW + self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)))
        hidden = self.enter(there_BNP)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.leave(hidden)

    def _drawn(self, noise_BNP, told_BW):
        there = noise_BNP
        for step in range(self.steps):
            time = torch.full_like(there[..., :1], step / self.steps)
            there = there + self._velocity(there, time, told_BW) / self.steps
        return there
