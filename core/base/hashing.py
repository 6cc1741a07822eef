"""Random draws as hashes of their purpose.

A draw depends on (seed, id, field) only: not on a state, the order of calls, or the rank. So any rank can
describe sample 12,345 without drawing the 12,344 samples before it.
"""

import hashlib


def draw_bits(seed: int, sample_id: int | str, field: str) -> int:
    """Return 64 random bits for (seed, id, field).

    >>> draw_bits(0, 7, "length") == draw_bits(0, 7, "length") != draw_bits(0, 8, "length")
    True
    """
    text = f"{seed}/{sample_id}/{field}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def draw_uniform(seed: int, sample_id: int | str, field: str) -> float:
    """Return a draw from [0, 1)."""
    return (draw_bits(seed, sample_id, field) >> 11) / (1 << 53)


def draw_integer(seed: int, sample_id: int | str, field: str, low: int, high: int) -> int:
    """Return a draw from low..high, both included. Where they are equal, nothing is drawn."""
    if low == high:
        return low
    return low + draw_bits(seed, sample_id, field) % (high - low + 1)
