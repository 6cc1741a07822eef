"""Histograms: how often numbers of a list occur, in bins as wide as 1, 2 or 5 times a power of ten.

>>> found = histogram("images", [0, 0, 1, 3])
>>> [(found.bounds(i), count) for i, count in enumerate(found.counts)]
[((0, 0), 2), ((1, 1), 1), ((2, 2), 0), ((3, 3), 1)]
"""

import itertools
from collections.abc import Sequence

import attrs


BINS_MOST = 16
FEW = 100
"""A list in a unit has a largest number of so many at least, so that rounding hides little."""


@attrs.frozen(kw_only=True)
class Histogram:
    """The numbers of a list in bins.

    Attributes:
        name: what the numbers are.
        first: the smallest number of the first bin.
        width: how many whole numbers a bin has.
        counts: the numbers in each bin.
        quantiles: the smallest number, the median, that which 95 % are not above, and the largest.
        mean: their mean.
    """

    name: str
    first: int
    width: int
    counts: tuple[int, ...]
    quantiles: tuple[int, int, int, int]
    mean: float

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the smallest and the largest number of a bin."""
        start = self.first + index * self.width
        return start, start + self.width - 1

    @property
    def summary(self) -> str:
        """What the numbers are in a line."""
        least, median, most_of, most = self.quantiles
        return f"min {least:,}   median {median:,}   mean {self.mean:,.1f}   95 % {most_of:,}   max {most:,}"


def histogram(name: str, values: Sequence[int]) -> Histogram:
    """Return the histogram of numbers, of which there is one at least."""
    ordered = sorted(values)
    least, most = ordered[0], ordered[-1]
    widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    width = next(w for w in widths if most // w - least // w < BINS_MOST)
    counts = [0] * (most // width - least // width + 1)
    for value in ordered:
        counts[value // width - least // width] += 1
    last = len(ordered) - 1
    return Histogram(
        name=name,
        first=least // width * width,
        width=width,
        counts=tuple(counts),
        quantiles=(least, ordered[last // 2], ordered[-(-last * 95 // 100)], most),
        mean=sum(ordered) / len(ordered),
    )


def operations(name: str, flops: Sequence[float]) -> Histogram:
    """Return the histogram of numbers of operations, in whole FLOPs or the largest unit in which they differ.

    >>> operations("a step", [1e9, 4e12]).name
    'GFLOPs of a step'
    """
    power = max(p for p in range(len(_PREFIXES)) if p == 0 or max(flops) >= FEW * 1000**p)
    return histogram(f"{_PREFIXES[power]}FLOPs of {name}", [round(each / 1000**power) for each in flops])


_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
