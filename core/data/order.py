"""Order: which sample of a store stands at a place of the endless order that a job trains on.

An epoch is every sample once. Its order is a permutation with a key of its own, computed for one place at a time: a
Feistel network permutes the numbers of so many bits, and a result beyond the last sample is permuted again until it is
within (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). So no list of samples is made or stored, and
the number of the step is all that a resumed run must know.

>>> order = Order(seed=0, count=4)
>>> sorted(order.at(place) for place in range(4, 8))
[0, 1, 2, 3]
"""

import attrs

from mimogrid.core.base.hashing import draw_bits


ROUNDS = 8
"""Four make a pseudorandom permutation of many numbers (Luby and Rackoff 1988); few numbers need more of them."""
BITS_LEAST = 4
"""With fewer bits a half would have none or one, and the network would reach few permutations."""


@attrs.frozen(kw_only=True)
class Order:
    """The order of `count` samples, epoch after epoch; without `shuffle` they stay in the order of the store."""

    seed: int
    count: int
    shuffle: bool = True

    def at(self, place: int) -> int:
        """Return the sample at a place, counted from 0 over all epochs."""
        epoch, within = divmod(place, self.count)
        return permuted(within, self.count, f"{self.seed}/{epoch}") if self.shuffle else within


def permuted(number: int, count: int, key: str) -> int:
    """Return where a permutation of 0 .. count-1 takes a number; each key has another permutation.

    The network permutes fewer than twice as many numbers as there are (16 at least), so that few results are beyond.
    """
    bits = max(BITS_LEAST, (count - 1).bit_length())
    number = _network(number, bits, key)
    while number >= count:
        number = _network(number, bits, key)
    return number


def _network(number: int, bits: int, key: str) -> int:
    """Permute the numbers of `bits` bits. The halves differ by one bit where `bits` is odd, and change places."""
    low = bits // 2
    high = bits - low
    left, right = number >> low, number & ((1 << low) - 1)
    for turn in range(ROUNDS):
        width = low if turn % 2 else high
        left, right = right, left ^ (draw_bits(turn, right, key) & ((1 << width) - 1))
    return left << low | right
