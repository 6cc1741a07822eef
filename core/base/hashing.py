"""Random draws as a hash of what they are for.

A draw depends on (seed, id, field) and nothing else: no state, no order of calls, no rank. So any rank can
say what sample 12,345 looks like without drawing the 12,344 before it.
"""

import hashlib


def draw_bits(seed: int, sample_id: int | str, field: str) -> int:
    """Return 64 random bits that belong to (seed, id, field).

    >>> draw_bits(0, 7, "length") == draw_bits(0, 7, "length") != draw_bits(0, 8, "length")
    True
    """
    text = f"{seed}/{sample_id}/{field}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def draw_uniform(seed: int, sample_id: int | str, field: str) -> float:
    """Return a draw from [0, 1)."""
    return (draw_bits(seed, sample_id, field) >> 11) / (1 << 53)


def draw_integer(seed: int, sample_id: int | str, field: str, low: int, high: int) -> int:
    """Return a draw from low..high, both included; where they are equal, nothing is left to draw."""
    if low == high:
        return low
    return low + draw_bits(seed, sample_id, field) % (high - low + 1)
