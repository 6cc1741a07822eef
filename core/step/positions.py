"""Positions: what the rotary embedding of a module's layers turns each position of a row by.

The row of a share has the segments of its samples end to end, so the positions follow from the share alone, on every
stage of the pipeline. Most modules count within each segment. Others have several axes: a tower's patches have height
and width, and a language model with sections has time, height and width. It counts text in all three, and the rows of
an image or a clip by their grid.
"""

import functools
import itertools
import math
from collections.abc import Sequence

from mimogrid.core.base.samples import SegmentGrid
from mimogrid.core.job.models import BuiltIn, Gpt, Vit
from mimogrid.core.models.positions import Grid, Ints, multimodal_positions, patch_positions, windows
from mimogrid.core.models.segments import PLANE, placed
from mimogrid.core.step.step import Share


def rotary_positions(model: BuiltIn, share: Share) -> tuple[Ints, ...]:
    """Return the positions of a share's row, axis by axis: [P][T]; () where they count within each segment."""
    if isinstance(model, Vit) and model.positions == "rotary_2d":
        (name,) = share.rows
        return tower_axes(model, [grid for sample in share.samples for grid in sample.grids(name)])
    if isinstance(model, Gpt) and model.rotary_sections:
        samples = (_of_sample(share, i) for i in range(len(share.samples)))
        return tuple(tuple(itertools.chain.from_iterable(axis)) for axis in zip(*samples, strict=True))
    return ()


def tower_axes(model: Vit, grids: Sequence[SegmentGrid]) -> tuple[Ints, Ints]:
    """Return the row and the column of each patch, in the order of the layers: by windows, where there are any."""
    found = [_axes_of(_plane(grid), model.merge, model.window) for grid in grids]
    height, width = (tuple(itertools.chain.from_iterable(axis[i] for axis in found)) for i in range(2))
    return height, width


# Images of a batch often have the same size, and every stage asks again.
@functools.lru_cache(maxsize=256)
def _axes_of(grid: Grid, merge: int, window: int) -> tuple[Ints, Ints]:
    height, width = patch_positions([grid], merge)
    if not window:
        return height, width
    blocks = windows([grid], merge, window).order
    patches = [block * merge**2 + i for block in blocks for i in range(merge**2)]
    return tuple(height[patch] for patch in patches), tuple(width[patch] for patch in patches)


def _of_sample(share: Share, index: int) -> tuple[Ints, Ints, Ints]:
    """Return the positions (time, height, width) of one sample of a language model."""
    places, sample = share.placeholders[index], share.samples[index]
    segments: list[tuple[Ints, Grid, float]] = []
    begin = 0
    for feeder, of_samples in share.segments_in.items():
        grids = of_samples[index]
        end = begin + sum(map(math.prod, grids))
        intervals = sample.intervals.get(feeder, (1.0,) * len(grids))
        segments += [
            (taken, _plane(grid), interval)
            for (taken, grid), interval in zip(placed(places[begin:end], grids), intervals, strict=True)
            if taken and len(grid) == PLANE
        ]
        begin = end
    segments.sort(key=lambda segment: segment[0])
    return multimodal_positions(
        share.lengths[index],
        [place for taken, *_ in segments for place in taken],
        [grid for _, grid, _ in segments],
        [interval for *_, interval in segments],
    )


def _plane(grid: SegmentGrid) -> Grid:
    frames, height, width = grid
    return frames, height, width
