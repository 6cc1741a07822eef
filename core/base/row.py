"""Rows: segments of positions end to end, the part of each context-parallel rank, and what attends to what.

A stage computes one row of T positions: the attention segments of its samples, one after the other, without padding
between them. A position attends to positions of its own segment only.

Under context parallelism every segment of length L is cut into two chunks for each rank, and a rank has two of them
(`zigzag`). L need not divide: the L % (2 * size) chunks that are one longer go round the chunks, from where the segment
before stopped. So ranks differ by one position at most over the whole row, also if it consists of a thousand segments
of length 1. A rank's own row has the first chunks of all segments and then the second ones, so that segments of equal
lengths stay neighbours.

>>> [[[*piece] for piece in itertools.chain(*pieces((4, 1, 6), ZigZag(rank, size=2)))] for rank in range(2)]
[[[0], [4], [5], [3], [10]], [[1], [6, 7], [2], [8, 9]]]

Attention is computed run by run: neighbouring segments whose queries and keys lie alike are one batched product.

>>> [(run.count, run.queries, run.keys) for run in runs(((range(0, 9),),), (3, 3, 2, 1), causal=True)[0]]
[(2, range(0, 3), range(0, 3)), (1, range(0, 2), range(0, 2)), (1, range(0, 1), range(0, 1))]
"""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence

import attrs

from mimogrid.core.base.zigzag import ZigZag


Pieces = tuple[tuple[range, ...], ...]
"""The ranges of a row that a rank has, in the order of its own row, by which of its chunks they are in."""


@attrs.frozen
class Run:
    """Neighbouring segments whose queries and keys lie alike on a rank.

    Attributes:
        start: where the first segment begins in the row of all ranks.
        count: the number of segments.
        length: the length of each.
        queries: the positions of a segment that attend.
        keys: the positions of a segment that they attend to; causal queries to the last of these that is not later.
    """

    start: int
    count: int
    length: int
    queries: range
    keys: range

    @property
    def stop(self) -> int:
        """Where the last segment ends in the row of all ranks."""
        return self.start + self.count * self.length


def row_length(positions: int, *, parts: int, multiple: int) -> int:
    """Return the length of the row of each of `parts` ranks, a multiple of `multiple`.

    It is at least one `multiple`: ranks without positions compute along with those that share their experts.

    >>> row_length(9, parts=2, multiple=1), row_length(9, parts=1, multiple=4), row_length(0, parts=1, multiple=4)
    (5, 12, 4)
    """
    largest = -(-max(positions, 1) // parts)
    return -(-largest // multiple) * multiple


def pairs(lengths: Sequence[int], *, causal: bool) -> int:
    """Return the pairs of a query and a key that it may see, over segments of these lengths.

    >>> pairs((3, 1), causal=False), pairs((3, 1), causal=True)
    (10, 7)
    """
    squares: int = sum(map(operator.mul, lengths, lengths))
    return (squares + sum(lengths)) // 2 if causal else squares


@functools.lru_cache(maxsize=256)
def pieces(lengths: tuple[int, ...], cut: ZigZag) -> Pieces:
    """Return the ranges of a row of segments that a rank computes."""
    count = 2 * cut.size if cut.size > 1 else 1
    found: tuple[list[range], ...] = tuple([] for _ in cut.chunks)
    begin = dealt = 0
    for length in lengths:
        each, more = divmod(length, count)
        for ranges, chunk in zip(found, cut.chunks, strict=True):
            start, stop = (
                begin + c * each + _longer(c, dealt=dealt, more=more, count=count) for c in (chunk, chunk + 1)
            )
            if start < stop:
                ranges.append(range(start, stop))
        begin += length
        dealt = (dealt + more) % count
    return tuple(map(tuple, found))


def _longer(chunk: int, *, dealt: int, more: int, count: int) -> int:
    """Return how many chunks before `chunk` are one longer: of `count`, the `more` from `dealt` on, round the end."""
    return min(max(chunk - dealt, 0), more) + min(chunk, max(dealt + more - count, 0))


def runs(of: Pieces, lengths: Sequence[int], *, causal: bool, window: int = 0) -> tuple[tuple[Run, ...], ...]:
    """Return how a rank that has these pieces of a row attends within segments of these lengths, piece by piece.

    The segments may be finer than those that were cut into the pieces. With a `window` a causal query sees itself and
    the `window` - 1 positions before it.
    """
    return tuple(tuple(_joined(_runs(ranges, lengths, causal, window))) for ranges in of)


def _runs(ranges: Sequence[range], lengths: Sequence[int], causal: bool, window: int) -> Iterator[Run]:
    """Yield a run for each overlap of a piece and a segment."""
    segments = zip(itertools.accumulate(lengths, initial=0), lengths, strict=False)
    start, length = next(segments, (0, 0))
    for piece in ranges:
        at = piece.start
        while at < piece.stop:
            while start + length <= at:
                start, length = next(segments)
            stop = min(piece.stop, start + length)
            queries = range(at - start, stop - start)
            first = max(queries.start - window + 1, 0) if window else 0
            keys = range(first, queries.stop) if causal else range(length)
            yield Run(start, 1, length, queries, keys)
            at = stop


def _joined(single: Iterator[Run]) -> Iterator[Run]:
    """Join neighbours that lie alike."""
    last: Run | None = None
    for run in single:
        if last and last.stop == run.start and _shape(last) == _shape(run):
            last = attrs.evolve(last, count=last.count + 1)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last


def _shape(run: Run) -> tuple[int, range, range]:
    return run.length, run.queries, run.keys
