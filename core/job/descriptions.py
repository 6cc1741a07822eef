"""Descriptions: whether what a source says of a sample fits the modules that read it.

A description says how many rows a module reads, and how they lie in segments. Both must agree, and the module must be
able to read every segment: its sides divide into the blocks that are merged, and there are positions for all of it.

>>> vision = Vit(layers=1, hidden=8, heads=2, features=12, merge=2)
>>> sample = Sample(id=7, length=3, rows={"vision": 12}, segments={"vision": ((1, 3, 4),)})
>>> print(*(problem.message for problem in description_problems([sample], {"vision": vision})))
has a segment for module 'vision' that it cannot read: a grid of (1, 3, 4) cannot be merged 2 by 2.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.models import BuiltIn, Gpt, Own, Vit
from mimogrid.core.models.segments import PLANE, is_whole, placed


FRAMES_MOST = 100_000
"""More frames are taken for a mistake: each is an attention segment."""
LONG: SegmentGrid = (2**60,)
"""A module that can read this can read rows without a grid, however many."""


def description_problems(
    samples: Iterable[Sample], sources: Mapping[str, BuiltIn | Own]
) -> Iterator[Problem]:
    """Yield what is wrong with the rows and segments of samples; `sources` are the modules that read rows."""
    # A step may have a million samples, many of them alike, and most without a segment.
    known: dict[object, tuple[Problem, ...]] = {}
    any_length = not any(_grid_problem(model, LONG) for model in sources.values())
    for sample in samples:
        if any_length and not sample.segments and not sample.intervals:
            continue
        alike = [(sample.rows.get(name), sample.segments.get(name)) for name in sources]
        key = (*alike, *(len(of) for of in sample.intervals.values()))
        if key not in known:
            known[key] = tuple(_problems(sample, sources))
        yield from (attrs.evolve(problem, where=f"sample {sample.id}") for problem in known[key])


def _problems(sample: Sample, sources: Mapping[str, BuiltIn | Own]) -> Iterator[Problem]:
    for name, model in sources.items():
        rows, grids = sample.rows.get(name, 0), sample.grids(name)
        if message := _disagreement(rows, grids, len(sample.intervals.get(name, grids))):
            remedy = "The source must describe the grid of every segment of its rows."
            yield Problem("", f"{message} for module '{name}'.", remedy)
        elif message := next(filter(None, (_grid_problem(model, grid) for grid in dict.fromkeys(grids))), ""):
            message = f"has a segment for module '{name}' that it cannot read: {message}."
            yield Problem("", message, _remedy(name, model))


def torn_images(
    sample: Sample, rows_out: Mapping[str, int], graph: ModuleGraph, models: Mapping[str, BuiltIn | Own]
) -> Iterator[Problem]:
    """Yield the images of a sample within which text stands, for language models whose positions have three axes."""
    for name in graph.texts:
        model, places = models[name], sample.placeholders.get(name)
        if places is None or not isinstance(model, Gpt) or not model.rotary_sections:
            continue
        feeders = graph.nodes[name].feeders
        grids = [grid for feeder in feeders for grid in graph.grids_out(feeder, sample, rows_out)]
        for taken, grid in placed(places, grids):
            if len(grid) == PLANE and not is_whole(taken):
                between = f"position {taken[0]} and {taken[-1]} of '{name}'"
                message = f"has text between {between}, inside an image of {grid}."
                remedy = "Describe what text stands between as segments of their own, such as the frames of a video."
                yield Problem(f"sample {sample.id}", message, remedy)


def _disagreement(rows: int, grids: tuple[SegmentGrid, ...], intervals: int) -> str:
    """Return what is wrong with grids of segments by themselves; nothing is "".

    >>> _disagreement(5, ((1, 2, 2),), 1)
    'has 5 rows, and segments of 4'
    """
    if strange := [grid for grid in grids if len(grid) not in {1, PLANE} or min(grid) < 0]:
        return f"has a segment of {strange[0]}, neither (frames, height, width) nor (length,)"
    if (most := max((grid[0] for grid in grids if len(grid) == PLANE), default=0)) > FRAMES_MOST:
        return f"has a segment of {most:,} frames, more than {FRAMES_MOST:,},"
    if (total := sum(map(math.prod, grids))) != rows:
        return f"has {rows} rows, and segments of {total}"
    return "" if intervals == len(grids) else f"has {intervals} intervals for {len(grids)} segments"


def _grid_problem(model: BuiltIn | Own, grid: SegmentGrid) -> str:
    try:
        model.expect(grid)
    except ValueError as error:
        return str(error)
    return ""


def _remedy(name: str, model: BuiltIn | Own) -> str:
    if not isinstance(model, Vit) or model.stem == "whisper":
        return "Cut the sound, or leave the sample out."
    wanted = f" in multiples of {model.merge}" if model.merge > 1 else ""
    size = f" of {model.position_count - model.class_token} patches" if model.position_count else ""
    return (
        f"Resize its images{size}: describe segments['{name}'] as (frames, height, width) in patches{wanted}."
    )
