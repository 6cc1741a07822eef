"""Samples: what a source says about a sample without loading it.

A description is enough to know every shape of a step: how many rows each encoder reads, how long the text
is, which positions of the language sequence wait for rows, and how much each sample counts in a loss. Both
ends of an edge work from descriptions, so no count ever crosses the network.

The global order of samples is one and independent of any module's grid: step s holds the G samples with ids
s*G .. (s+1)*G-1, and a share of them is always a contiguous range.
"""

import itertools
from collections.abc import Mapping, Sequence

import attrs


# Most samples have neither. One value for all: a step may have a million samples.
_NO_PLACES: Mapping[str, tuple[int, ...]] = {}
_NO_UNITS: Mapping[str, float] = {}


@attrs.frozen
class Sample:
    """One sample, described.

    Attributes:
        id: its place in the global order.
        length: text tokens; the placeholders of a language sequence come on top.
        rows: rows that each source module reads; 0 or no entry: the sample lacks the modality.
        placeholders: per language module, the positions that take rows where they are not the leading
            block of its sequence.
        units: per module with a loss, the sum of the sample's loss weights where it is not the default
            (`gpt`: `length`; `regressor`: its rows times outputs; own modules: 1).
    """

    id: int
    length: int
    rows: Mapping[str, int]
    placeholders: Mapping[str, tuple[int, ...]] = _NO_PLACES
    units: Mapping[str, float] = _NO_UNITS


def share(index: int, parts: int, total: int) -> range:
    """Return part `index` of `total` things dealt evenly, in order, to `parts`.

    Shares may be uneven; together they are everything once.

    >>> [share(i, 3, 8) for i in range(3)]
    [range(0, 2), range(2, 5), range(5, 8)]
    """
    return range(index * total // parts, (index + 1) * total // parts)


def dp_samples(*, dp_rank: int, dp_size: int, microbatch: int, microbatches: int, total: int) -> range:
    """Return which of a step's `total` samples a dp rank has in a microbatch.

    >>> dp_samples(dp_rank=1, dp_size=2, microbatch=1, microbatches=2, total=8)
    range(6, 8)
    """
    whole = share(microbatch, microbatches, total)
    part = share(dp_rank, dp_size, len(whole))
    return range(whole.start + part.start, whole.start + part.stop)


def dp_ranks_over(samples: range, *, dp_size: int, microbatch: int, microbatches: int, total: int) -> range:
    """Return which dp ranks have any of these samples in a microbatch: the inverse of `dp_samples`.

    >>> dp_ranks_over(range(3, 7), dp_size=2, microbatch=1, microbatches=2, total=8)
    range(0, 2)
    """
    whole = share(microbatch, microbatches, total)
    start, stop = max(samples.start, whole.start) - whole.start, min(samples.stop, whole.stop) - whole.start
    if start >= stop:
        return range(0)
    # Dp rank i begins at i * size // dp ranks; wanted: the first that ends after `start`, the last that begins
    # before `stop`.
    size = len(whole)
    return range(-(-(start + 1) * dp_size // size) - 1, -(-stop * dp_size // size))


def prefix_sums(counts: Sequence[int]) -> tuple[int, ...]:
    """Return where each count begins when all are laid end to end, and the end of the last.

    >>> prefix_sums((4, 0, 3))
    (0, 4, 4, 7)
    """
    return tuple(itertools.accumulate(counts, initial=0))


def overlapping(microbatch: int, count: int, other_count: int) -> range:
    """Return which of `other_count` microbatches of a step share samples with one of `count`.

    >>> overlapping(1, 4, 2), overlapping(1, 2, 4), overlapping(3, 4, 4)
    (range(0, 1), range(2, 4), range(3, 4))
    """
    start = microbatch * other_count // count
    stop = -(-(microbatch + 1) * other_count // count)
    return range(start, stop)
