"""Mixtures: several sources that become one, each with its share of every stretch of the order.

Of the first n samples a source with weight w out of a total of W has n * w / W, rounded up or down: exactly its share
after every W samples, and never a whole sample away from it. The j-th sample of the source may stand at the places
from j * W / w up to (j + 1) * W / w; of the sources that may come, the one that must come soonest is taken. Such
windows can always be kept (Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress"). The pattern repeats
after W places, so a place is looked up, and no count runs along.

>>> mixture = Mixture.of((3, 1))
>>> [mixture.at(place) for place in range(8)]
[(0, 0), (0, 1), (0, 2), (1, 0), (0, 3), (0, 4), (0, 5), (1, 1)]
"""

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction

import attrs


PATTERN_MOST = 1_000_000
"""The longest pattern that is computed."""


@attrs.frozen(kw_only=True)
class Mixture:
    """Which source each place is from.

    Attributes:
        places: for each source, its places in the pattern, in order.
        pattern: the source of each place of the pattern.
    """

    places: tuple[tuple[int, ...], ...]
    pattern: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Mixture":
        """Return the mixture of sources with weights; 0.7 and 0.3 are 7 to 3.

        Raises ValueError for a weight that is not positive, and for weights whose pattern would be too long.
        """
        shares = _whole(weights)
        pattern = tuple(_pattern(shares))
        places = (tuple(p for p, s in enumerate(pattern) if s == source) for source in range(len(shares)))
        return cls(places=tuple(places), pattern=pattern)

    def at(self, place: int) -> tuple[int, int]:
        """Return the source at a place, and how many samples of that source stand before."""
        turn, within = divmod(place, len(self.pattern))
        source = self.pattern[within]
        places = self.places[source]
        return source, turn * len(places) + bisect.bisect_left(places, within)


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the proportions of weights as they are written."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError("a weight is more than 0")
    fractions = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * unit) for fraction in fractions]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor > PATTERN_MOST:
        raise ValueError(f"the proportions repeat only after {sum(whole) // divisor} samples")
    return tuple(number // divisor for number in whole)


def _pattern(shares: Sequence[int]) -> list[int]:
    """Return the source of each place: of those whose window has begun, that with the earliest end."""
    total, counts, pattern = sum(shares), [0] * len(shares), list[int]()
    for place in range(total):
        begun = (s for s, share in enumerate(shares) if counts[s] * total // share <= place)
        source = min(begun, key=lambda s: (-(-(counts[s] + 1) * total // shares[s]), s))
        counts[source] += 1
        pattern.append(source)
    return pattern
