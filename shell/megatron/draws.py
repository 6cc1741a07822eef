"""Draws: where the random numbers of megatron's networks begin.

Its networks draw from torch's default generator what is alike along tp, and from a tracked state of their own
what is apart. Recomputation saves and restores both by itself.
"""

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from mimogrid.core.step.seeds import Seeds


APART = "model-parallel-rng"
"""Megatron's name for the state that differs along tp."""


def begin_draws(seeds: Seeds, device: torch.device) -> None:
    """Let all draws from here on follow from seeds. On the CPU, call it inside `cpu.on_device`."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seeds.alike)
    else:
        torch.default_generator.manual_seed(seeds.alike)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(APART, seeds.apart)
