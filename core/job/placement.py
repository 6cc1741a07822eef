"""Placement: the ranks of each module, the layers of each stage, and the module graph, as the spec says them.

Validation uses these facts, so they hold for illegal specs, too.
"""

import fnmatch
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.base.grid import Axis, Grid
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.lora import MARK
from mimogrid.core.job.models import BuiltIn, Own, Vit
from mimogrid.core.job.projectors import Projector
from mimogrid.core.job.spec import GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.models.segments import Emission


AXES = ("tp", "cp", "dp", "pp")


def graph_of(spec: JobSpec) -> ModuleGraph:
    """Return the module graph. Raises ValueError for a cycle."""
    modules = {name: (module.model, module.feeds) for name, module in spec.modules.items()}
    return ModuleGraph.of(modules, {name: _emission(module) for name, module in spec.modules.items()})


def _emission(module: ModuleSpec) -> Emission:
    """Return how many rows a module emits for those that it reads."""
    return module.rows_out if isinstance(module.options, Mapping) else module.options.emission


def largest_sample(graph: ModuleGraph, source: SourceFacts) -> Sample:
    """Return a sample as large as those of a source can be.

    Where the source does not say the segments of rows that are merged, they are one strip.
    """
    merges = {name: graph.nodes[name].emission.merge for name in graph.sources if source.rows.get(name)}
    strips = {
        name: ((1, merge, -(-source.rows[name] // merge**2) * merge),)
        for name, merge in merges.items()
        if merge > 1
    }
    segments = strips | dict(source.segments)
    rows = {**source.rows, **{name: sum(map(math.prod, grids)) for name, grids in segments.items()}}
    return Sample(id=0, length=source.length or 0, rows=rows, segments=segments)


def size_of(grid: GridSpec) -> int:
    """Return how many ranks a module has."""
    return math.prod(int(getattr(grid, axis)) for axis in AXES)


def place(spec: JobSpec) -> Mapping[str, Grid]:
    """Return the grid of each module; without an offset it begins where the grid of the module before it ends."""
    grids: dict[str, Grid] = {}
    end = 0
    for name, module in spec.modules.items():
        offset = end if module.grid.offset is None else module.grid.offset
        axes = tuple(Axis(axis, getattr(module.grid, axis)) for axis in module.grid.order)
        grids[name] = Grid(axes, offset)
        end = offset + size_of(module.grid)
    return grids


def model_of(name: str, spec: JobSpec, source: SourceFacts) -> BuiltIn | Own:
    """Return the model of a module, completed with what the source knows."""
    module = spec.modules[name]
    if isinstance(module.options, Vit) and module.options.features is None:
        return attrs.evolve(module.options, features=source.features.get(name))
    if isinstance(module.options, Mapping):
        return Own(path=module.model, width=module.width, has_loss=not module.feeds, emission=module.rows_out)
    return module.options


def edge_shape(
    source: BuiltIn | Own, target: BuiltIn | Own, written: Projector | None = None
) -> tuple[int, Projector | None]:
    """Return the width of the rows that a target reads, and the projector that gives them that width, if there is one.

    It is the `written` one, or else a linear layer where one is needed.

    A custom module reads rows of any width. It emits rows of the width that it declares, or else of the width that
    the target reads.
    """
    width = source.hidden if isinstance(target, Own) else target.hidden
    differ = source.hidden is not None and source.hidden != width
    return width or 0, written or (Projector() if isinstance(source, Vit) or differ else None)


def has_loss(module: ModuleSpec) -> bool:
    """Whether a module has a loss: some built-in models do, and a custom module that feeds no other."""
    if isinstance(module.options, Mapping):
        return not module.feeds
    return module.options.has_loss


def stages_of(module: ModuleSpec) -> int:
    """Return the number of stages of a module: its pipeline ranks times the chunks of each."""
    return module.grid.pp * module.chunks


def layer_ranges(module: ModuleSpec, layers: int) -> tuple[range, ...]:
    """Return the layers of each stage, first stage first: as `split` says, or in equal parts."""
    stages = stages_of(module)
    counts = module.split or (layers // stages,) * stages
    starts = [sum(counts[:i]) for i in range(stages)]
    return tuple(range(start, start + n) for start, n in zip(starts, counts, strict=True))


def balanced(seconds: Sequence[float], parts: int) -> tuple[int, ...]:
    """Return how many layers each part has, so that the slowest part is as fast as possible; no part is empty.

    Of equally fast splits it is the one with fewest layers in the first parts, which have most microbatches in flight.

    >>> balanced([1, 1, 1, 1, 1, 3], 3)
    (2, 3, 1)
    """
    limits = _sums_of_spans(tuple(seconds))
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_cut(seconds, limits[middle], parts)) <= parts:
            high = middle
        else:
            low = middle + 1
    return _cut(seconds, limits[low], parts)


@functools.lru_cache(maxsize=64)
def _sums_of_spans(seconds: tuple[float, ...]) -> Sequence[float]:
    """Return what consecutive layers may take together, each sum once, ascending. Planning cuts into many numbers."""
    starts = tuple(itertools.accumulate(seconds, initial=0.0))
    return sorted({starts[j] - starts[i] for i in range(len(starts)) for j in range(i + 1, len(starts))})


def _cut(seconds: Sequence[float], limit: float, parts: int) -> tuple[int, ...]:
    """Fill parts from the back up to a limit; leave at least one layer for each part that is still to come."""
    counts: list[int] = []
    count, filled = 0, 0.0
    slack = limit * 1e-9
    for left in range(len(seconds), 0, -1):
        layer = seconds[left - 1]
        to_come = parts - len(counts) - 1
        if count and (filled + layer > limit + slack or left <= to_come):
            counts.append(count)
            count, filled = 0, 0.0
        count, filled = count + 1, filled + layer
    return (*reversed([*counts, count]),)


def trainable_names(module: ModuleSpec, names: tuple[str, ...]) -> frozenset[str]:
    """Return the parameters of a module that are trained.

    >>> vision = ModuleSpec(model="vit", options={}, trainable=("projector.*",))
    >>> sorted(trainable_names(vision, ("input.bias", "projector.language.bias")))
    ['projector.language.bias']

    With LoRA they are its own parameters, and those that `trainable` names.
    """
    if module.lora is not None:
        return frozenset(n for n in names if MARK in n or matches_any(n, module.trainable or ()))
    if module.trainable is not None:
        return frozenset(n for n in names if matches_any(n, module.trainable))
    if isinstance(module.frozen, bool):
        return frozenset() if module.frozen else frozenset(names)
    return frozenset(n for n in names if not matches_any(n, module.frozen))


def matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name matches any of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
