"""Records: what an index says of a sample, without opening its media; and the description that follows.

>>> record = Record(id="a", length=5, units=2.0, runs=((1, 4),), segments={"vision": ((1, 2, 2),)})
>>> sample = record.described(7, "language")
>>> sample.rows, sample.placeholders
({'vision': 4}, {'language': (1, 2, 3, 4)})
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import Sample, SegmentGrid


LANGUAGE = "language"
"""The module of a published checkpoint that reads text."""
Run = tuple[int, int]
"""Neighbouring positions of a sequence: the first of them, and how many."""


@attrs.frozen(kw_only=True)
class Record:
    """A sample of an index.

    Attributes:
        id: its name in the store.
        length: the number of its text tokens.
        units: the sum of its loss weights.
        runs: the positions of its placeholders.
        segments: for each module that reads rows of it, the grids of its images or sounds.
    """

    id: str
    length: int
    units: float
    runs: tuple[Run, ...]
    segments: Mapping[str, tuple[SegmentGrid, ...]]

    def described(self, sample_id: int, language: str) -> Sample:
        """Return the description of the sample at a place of the global order, for a language model."""
        return Sample(
            id=sample_id,
            length=self.length,
            rows={module: sum(map(math.prod, grids)) for module, grids in self.segments.items()},
            placeholders={language: tuple(expanded(self.runs))} if self.runs else {},
            units={language: self.units},
            segments=self.segments,
        )


def runs_of(positions: Sequence[int]) -> tuple[Run, ...]:
    """Return ascending positions as runs; `expanded` is the inverse.

    >>> runs_of((1, 2, 3, 7))
    ((1, 3), (7, 1))
    """
    groups = itertools.groupby(enumerate(positions), key=lambda item: item[1] - item[0])
    runs = ([position for _, position in group] for _, group in groups)
    return tuple((run[0], len(run)) for run in runs)


def expanded(runs: Sequence[Run]) -> Iterator[int]:
    """Yield the positions of runs."""
    for first, count in runs:
        yield from range(first, first + count)
