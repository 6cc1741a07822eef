"""Roofline: the seconds of a product on one rank of a machine, by the sizes of its matrices.

A product takes the longer of two times:

    compute    its operations at the machine's part of the peak, as if its output filled whole tiles of 128 x 128:
               the tile quantization of NVIDIA, "Matrix Multiplication Background User's Guide", section 3.1
    memory     its rows, its matrix and its result, each read or written once, at the bandwidth of the memory: what has
               few operations for each byte is slow (the roofline of Williams, Waterman and Patterson 2009)

So a product of few rows, or one that tp cuts into narrow strips, reaches less than a large one. Attention reads little
memory. Its short sequences are slow in another way: each query takes as long as so many more keys (`QUERY_KEYS`). With
170 that follows the forward of FlashAttention-2 and 3 on an H100 with heads of width 128 (Shah et al. 2024, arXiv
2407.08608, figure 5, as transcribed): for 512, 1,024, 2,048, 4,096 positions a part of 0.57, 0.78, 0.89, 0.95 and
0.47, 0.69, 0.85, 0.94 of its speed at 16,384, if causal; else 0.84, 0.95, 0.98, 0.99 and 0.72, 0.87, 0.96, 0.98.

>>> [round(attention_part(length, causal=True), 2) for length in (512, 1024, 2048, 4096)]
[0.6, 0.75, 0.86, 0.92]
>>> [round(attention_part(length, causal=False), 2) for length in (512, 1024, 2048, 4096)]
[0.75, 0.86, 0.92, 0.96]
"""

import math
from collections.abc import Sequence

from mimogrid.core.pricing.flops import IN, OUT, Flops, Load, Measure, Product, Terms, measured
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.topology.topology import Module


TILE = 128
"""Rows and columns of a result that are computed together."""
QUERY_KEYS = 170
"""A query takes as long as so many keys beside those that it sees."""
Seconds = Flops
"""Seconds of a part in place of its operations."""


def attention_part(length: int, *, causal: bool) -> float:
    """Return the part of its speed on long sequences that attention reaches on sequences of one length."""
    pairs = length * (length + 1) / 2 if causal else length**2
    return pairs / (pairs + QUERY_KEYS * length)


def unit_seconds(parts: Sequence[Terms], load: Load, module: Module, machine: Machine) -> tuple[Seconds, ...]:
    """Return the seconds of a rank in place of the operations of all ranks of a dp rank, part by part (`flops.units`).

    `load` is that of the dp rank. Collectives do not count here.
    """
    return measured(parts, _seconds(load, module, machine))


def _seconds(load: Load, module: Module, machine: Machine) -> Measure:
    """Return what says the seconds of a product: forward, and of the gradients of its inputs and of its weights."""
    cp, bandwidth = module.grid.extent("cp"), machine.accelerator.memory_bytes_per_s

    def seconds(product: Product) -> tuple[float, float, float]:
        shared, matrices = _shares(product, module)
        operations = product.operations(load)[0] / (cp * (module.grid.extent("tp") if product.split else 1))
        if not operations:
            return 0.0, 0.0, 0.0
        once = operations / machine.flops
        if product.is_attention:
            once *= 1 + QUERY_KEYS * load.positions / getattr(load, product.rows)
            return once, 2 * once, 0.0
        wide = product.width_in / (shared if product.split == IN else 1)
        narrow = product.width_out / (shared if product.split == OUT else 1)
        rows = operations / (2 * matrices * wide * narrow)
        values = matrices * (rows * wide + wide * narrow + rows * narrow)
        least = values * machine.value_bytes / bandwidth
        return (
            max(once / _tile_part(rows, narrow), least),
            max(once / _tile_part(rows, wide), least),
            max(once / _tile_part(wide, narrow), least),
        )

    return seconds


def _shares(product: Product, module: Module) -> tuple[int, float]:
    """Return among how many ranks a matrix of a product is split, and how many matrices a rank has."""
    if product.copies > 1 and module.experts is not None:
        return module.experts.extent("expert_tp"), product.copies / module.experts.extent("ep")
    return module.grid.extent("tp"), 1.0


def _tile_part(*sizes: float) -> float:
    """Return the part of the tiles of a result that it fills.

    >>> _tile_part(512, 4096), _tile_part(64, 4096), _tile_part(129, 128)
    (1.0, 0.5, 0.50390625)
    """
    return math.prod(size / (math.ceil(size / TILE) * TILE) for size in sizes)
