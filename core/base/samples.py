"""Samples: what a source says about a sample without loading it.

Descriptions determine every shape of a step: how many rows each encoder reads, how long the text is, which positions
of the language sequence take rows, and how much each sample counts in a loss. Both ends of an edge work from
descriptions, so no count is sent over the network.

There is one global order of samples, independent of any module's grid. Step s holds the G samples with ids
s*G .. (s+1)*G-1, and a share of them is always a contiguous range.
"""

import itertools
from collections.abc import Mapping, Sequence

import attrs


# Most samples have neither. They share one value: a step may have a million samples.
_NO_PLACES: Mapping[str, tuple[int, ...]] = {}
_NO_UNITS: Mapping[str, float] = {}
_NO_SEGMENTS: Mapping[str, tuple[tuple[int, ...], ...]] = {}
_NO_INTERVALS: Mapping[str, tuple[float, ...]] = {}

SegmentGrid = tuple[int, ...]
"""How the rows of a segment lie: (frames, height, width) of an image or a video in patches, (length,) of a sound."""


@attrs.frozen
class Sample:
    """One sample, described.

    Attributes:
        id: the position of the sample in the global order.
        length: the number of text tokens, without placeholders.
        rows: the number of rows that each source module reads; 0 or no entry: the sample lacks the modality.
        placeholders: for a language module, the positions of its sequence that take rows, where these are not the
            leading positions.
        segments: for a source module, the grid of each segment of its rows (an image, a clip, a sound), in order; no
            entry: all its rows are one segment. Attention stays within a segment.
        intervals: for a source module, how many positions of a language model lie between two frames of each segment;
            no entry: one.
        units: for a module with a loss, the sum of the sample's loss weights, where it is not the default
            (`gpt`: `length`; `regressor`: its rows times outputs; custom modules: 1).
    """

    id: int
    length: int
    rows: Mapping[str, int]
    placeholders: Mapping[str, tuple[int, ...]] = _NO_PLACES
    units: Mapping[str, float] = _NO_UNITS
    segments: Mapping[str, tuple[SegmentGrid, ...]] = _NO_SEGMENTS
    intervals: Mapping[str, tuple[float, ...]] = _NO_INTERVALS

    def grids(self, module: str) -> tuple[SegmentGrid, ...]:
        """Return the grid of each segment that a source module reads.

        >>> Sample(id=0, length=3, rows={"vision": 6}).grids("vision")
        ((6,),)
        """
        rows = self.rows.get(module, 0)
        return self.segments.get(module, ((rows,),) if rows else ())


def share(index: int, parts: int, total: int) -> range:
    """Return which of `total` things part `index` of `parts` has; the parts are contiguous and in order.

    Sizes of parts differ by at most 1, and every thing is in one part.

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
    # Dp rank i begins at i * size // dp_size. Wanted are the first that ends after `start` and the last that begins
    # before `stop`.
    size = len(whole)
    return range(-(-(start + 1) * dp_size // size) - 1, -(-stop * dp_size // size))


def prefix_sums(counts: Sequence[int]) -> tuple[int, ...]:
    """Return where each count begins when all lie end to end, and where the last ends.

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
