"""Draws: the random numbers of dropout.

A built-in network keeps no random state. Whether a value is dropped is a hash of (seed, module, step, sample, position
in the sample, layer, place in the layer) and of its column; of an attention weight, of its head and its key. So a
sample is masked alike in every layout and beside any other samples, and a recomputed layer draws what it drew.

Each position of a row has a key of 64 bits. Numbers of a key are those of the generator SplitMix64 that begins at it
(Steele, Lea and Flood 2014): the mix of the key plus so many times an odd constant. Torch's int64 wraps around as
the generator's numbers do.

Networks of users and host programs draw from torch's default generator for values that are alike along tp, and from a
state that Megatron tracks for values that are apart (`begin_draws`).

Shapes in names: T positions; any other dims `...`.
"""

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from mimogrid.core.step.seeds import Seeds


APART = "model-parallel-rng"
"""Megatron's name of the state that differs along tp."""

STEP = 0x9E3779B97F4A7C15 - (1 << 64)
FACTORS = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
SHIFTS = 30, 27, 31
"""The constants of SplitMix64."""
BITS = 53
"""Bits of a draw that are compared with a probability, as many as a double holds."""


EMBEDDING, BEHIND_ATTENTION, BEHIND_MLP, WEIGHTS = range(4)
"""What values are dropped of: text embeddings, what attention and MLP add to hidden states, attention weights."""


def draw_of(what: int, layer: int = 0) -> int:
    """Return the number of the draws for something in a layer of a model."""
    return 4 * layer + what


def beside(keys: Tensor, adapter: int) -> Tensor:
    """Return the draws of what LoRA drops before its pair with this number; `draw_of` gives no number below 0."""
    return child(keys, -1 - adapter)


def child(keys: Tensor, numbers: Tensor | int) -> Tensor:
    """Return the draws with these numbers of keys, int64, broadcast; each may be a key in turn."""
    first, second, third = SHIFTS
    steps = _wrapped(numbers * STEP) if isinstance(numbers, int) else numbers * STEP
    x = keys + steps
    x = (x ^ _shifted(x, first)) * FACTORS[0]
    x = (x ^ _shifted(x, second)) * FACTORS[1]
    return x ^ _shifted(x, third)


def _wrapped(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def kept(keys: Tensor, numbers: Tensor, probability: float) -> Tensor:
    """Return which of the numbers of keys are kept, where each is dropped with a probability."""
    return _shifted(child(keys, numbers), 64 - BITS) >= int(probability * (1 << BITS))


def dropped(values: Tensor, keys_T: Tensor, probability: float, *, first: int = 0) -> Tensor:
    """Return values [T, ..., H] without some, and the others larger by as much as these are fewer.

    `first` is the number of their first column.
    """
    columns = torch.arange(first, first + values.shape[-1], device=values.device)
    mask = kept(keys_T.view(-1, *[1] * (values.dim() - 1)), columns, probability)
    return values * mask * (1 / (1 - probability))


def begin_draws(seeds: Seeds, device: torch.device) -> None:
    """Seed torch's draws from here on. On the CPU, call it inside `cpu.on_device`."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seeds.alike)
    else:
        torch.default_generator.manual_seed(seeds.alike)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(APART, seeds.apart)
