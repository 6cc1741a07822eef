"""Records: what an index says of a sample, without opening its media; and the description that follows.

>>> record = Record(id="a", length=5, units=2.0, kinds=("image",), grids=((1, 2, 2),), runs=((1, 4),))
>>> record.positions
(1, 2, 3, 4)
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.models.network import Model


Run = tuple[int, int]
"""Neighbouring positions of a sequence: the first of them, and how many."""


@attrs.frozen(kw_only=True)
class Record:
    """A sample of an index.

    Attributes:
        id: its name in the store.
        length: the number of its text tokens.
        units: the sum of its loss weights.
        kinds: what its segments are (image, video, audio), in the order of the sequence.
        grids: the grid of each segment.
        runs: the positions of its placeholders.
    """

    id: str
    length: int
    units: float
    kinds: tuple[str, ...] = ()
    grids: tuple[SegmentGrid, ...] = ()
    runs: tuple[Run, ...] = ()

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions of the sequence that take rows."""
        return tuple(expanded(self.runs))

    def described(self, sample_id: int, model: Model, language: str) -> Sample:
        """Return the description of the sample at a place of the global order."""
        segments: dict[str, tuple[SegmentGrid, ...]] = {}
        for kind, grid in zip(self.kinds, self.grids, strict=True):
            module = model.placeholders[kind].module
            segments[module] = (*segments.get(module, ()), grid)
        return Sample(
            id=sample_id,
            length=self.length,
            rows={module: sum(map(math.prod, grids)) for module, grids in segments.items()},
            placeholders={language: self.positions} if self.runs else {},
            units={language: self.units},
            segments=segments,
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


def placed(
    tokens: Sequence[int], model: Model, grids: Mapping[str, Sequence[SegmentGrid]]
) -> tuple[tuple[str, int], ...]:
    """Return the segments of a sequence in order, each as its kind and its number among those of the kind.

    Raises ValueError where a sequence has not as many placeholders as its segments make rows.
    """
    kinds = {placeholder.token: kind for kind, placeholder in model.placeholders.items()}
    found: list[tuple[str, int]] = []
    missing = dict.fromkeys(kinds.values(), 0)
    begun = dict.fromkeys(kinds.values(), 0)
    for kind in (kinds[token] for token in tokens if token in kinds):
        if not missing[kind]:
            number = begun[kind]
            if number == len(grids.get(kind, ())):
                raise ValueError(f"the text has a placeholder of {kind} more than its {number} segments make")
            missing[kind] = model.modules[model.placeholders[kind].module].rows_out(
                tuple(grids[kind][number])
            )
            begun[kind] += 1
            found.append((kind, number))
        missing[kind] -= 1
    for kind, segments in grids.items():
        if missing[kind] or begun[kind] != len(segments):
            raise ValueError(
                f"the text has fewer placeholders of {kind} than its {len(segments)} segments make"
            )
    return tuple(found)
