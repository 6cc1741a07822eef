"""Draws: where the random numbers of Megatron's networks start.

Megatron draws from torch's default generator for values that are alike along tp, and from a tracked state for values
that are apart. Recomputation saves and restores both.
"""

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from mimogrid.core.step.seeds import Seeds


APART = "model-parallel-rng"
"""Megatron's name of the state that differs along tp."""


def begin_draws(seeds: Seeds, device: torch.device) -> None:
    """Seed all draws from here on. On the CPU, call it inside `cpu.on_device`."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seeds.alike)
    else:
        torch.default_generator.manual_seed(seeds.alike)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(APART, seeds.apart)
