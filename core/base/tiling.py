"""Tilings: whether the parts of a tensor fill it exactly, each value once.

>>> tiling_fault((4, 2), [((0, 0), (1, 2)), ((1, 0), (3, 2))])
''
>>> tiling_fault((4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))])
'has two parts that overlap, at [0, 0] and at [1, 0]'
"""

import math
from collections.abc import Sequence


Part = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins in the full tensor, and its shape."""


def tiling_fault(shape: tuple[int, ...], parts: Sequence[Part]) -> str:
    """Say why parts do not tile a tensor of this shape; "" if they do. All numbers are 0 or more."""
    for offsets, sizes in parts:
        if not len(offsets) == len(sizes) == len(shape):
            return f"has a part {list(sizes)} at {list(offsets)}, which has not the dims of {list(shape)}"
        if any(o + n > full for o, n, full in zip(offsets, sizes, shape, strict=True)):
            return f"has a part {list(sizes)} at {list(offsets)}, outside of {list(shape)}"
        if 0 in sizes and 0 not in shape:
            return f"has an empty part at {list(offsets)}"
    overlap = _overlap(shape, parts)
    if overlap:
        return f"has two parts that overlap, at {list(overlap[0][0])} and at {list(overlap[1][0])}"
    if not parts or sum(math.prod(sizes) for _, sizes in parts) != math.prod(shape):
        return f"has parts that do not make {list(shape)} together"
    return ""


def _overlap(shape: tuple[int, ...], parts: Sequence[Part]) -> tuple[Part, Part] | None:
    """Return two parts that share a value. Parts are compared only where they meet along the dim with most cuts."""
    dims = range(len(shape))
    dim = max(dims, key=lambda d: len({offsets[d] for offsets, _ in parts}), default=None)
    reaching: list[Part] = []
    for part in sorted(parts) if dim is None else sorted(parts, key=lambda part: part[0][dim]):
        if dim is not None:
            reaching = [other for other in reaching if other[0][dim] + other[1][dim] > part[0][dim]]
        for other in reaching:
            if all(
                other[0][d] < part[0][d] + part[1][d] and part[0][d] < other[0][d] + other[1][d] for d in dims
            ):
                return other, part
        reaching.append(part)
    return None
