"""Neighbours: the layouts that differ from one in a single choice.

The choices of a module are its axes, its place, its chunks, its recomputation, and its number of microbatches; those of
the job are the number of microbatches and the order. Where microbatches have a limit of tokens, nothing chooses their
number. An axis changes by a prime factor, which another axis may take.
Layers are split anew by whoever prices a neighbour (`refinement`). Most neighbours of a good layout are worse, and some
are illegal.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from mimogrid.core.base.grid import Grid
from mimogrid.core.job.placement import place
from mimogrid.core.job.schedules import AUTO, INTERLEAVED, ONE_F_ONE_B, SCHEDULES
from mimogrid.core.job.spec import GridSpec, JobSpec, ModuleSpec
from mimogrid.core.plan.search_space import CHUNKS, divisors


AXES = ("tp", "cp", "pp", "dp")
EXPERT_AXES = ("ep", "expert_tp")


def neighbours(spec: JobSpec) -> Iterator[JobSpec]:
    """Yield the neighbours of a layout, each once, legal or not."""
    grids = place(spec)
    for name, module in spec.modules.items():
        others = [grid for other, grid in grids.items() if other != name]
        for changed in of_module(module, spec, grids[name].offset, others):
            yield attrs.evolve(spec, modules={**spec.modules, name: changed})
    for count in () if spec.batch.tokens_per_microbatch else _counts_beside(spec):
        yield attrs.evolve(spec, batch=attrs.evolve(spec.batch, microbatches=count))
    for order in SCHEDULES:
        if order not in {AUTO, spec.schedule.name, *_SAME.get(spec.schedule.name, ())}:
            yield attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, name=order, costs=None))


def _counts_beside(spec: JobSpec) -> Iterator[int]:
    """Yield the next smaller and the next larger number of microbatches."""
    yield from beside(spec.batch.microbatches, divisors(spec.batch.global_size))


_SAME = {ONE_F_ONE_B: (INTERLEAVED,), INTERLEAVED: (ONE_F_ONE_B,)}
"""Two names of one order."""


def of_module(module: ModuleSpec, spec: JobSpec, offset: int, others: Sequence[Grid]) -> Iterator[ModuleSpec]:
    """Yield a module of a job with one choice changed. It begins at rank `offset`, and `others` lie beside it."""
    at = attrs.evolve(module.grid, offset=offset)
    for grid in dict.fromkeys((*_resized(at, sparse=_is_sparse(module)), *_moved(at, others))):
        yield attrs.evolve(module, grid=grid, chunks=module.chunks if grid.pp > 1 else 1, split=None)
    if isinstance(module.options, Mapping):
        return
    for chunks in CHUNKS:
        if chunks != module.chunks and module.grid.pp > 1:
            yield attrs.evolve(module, chunks=chunks, split=None)
    for level in ("none", "full"):
        if level != module.recompute:
            yield attrs.evolve(module, recompute=level)
    if spec.batch.tokens_per_microbatch:
        return
    count = spec.batch.microbatches
    legal = [each for each in divisors(spec.batch.global_size) if max(each, count) % min(each, count) == 0]
    for own in beside(module.microbatches or count, legal):
        yield attrs.evolve(module, microbatches=None if own == count else own)


def _is_sparse(module: ModuleSpec) -> bool:
    return not isinstance(module.options, Mapping) and module.options.experts > 0


def _resized(grid: GridSpec, *, sparse: bool) -> Iterator[GridSpec]:
    """Yield a grid with an axis that is larger or smaller, or with a factor moved from one axis to another."""
    sizes = {axis: getattr(grid, axis) for axis in (*AXES, *EXPERT_AXES)}
    for axis in (*AXES, *(EXPERT_AXES if sparse else ())):
        yield _with(grid, {axis: 2 * sizes[axis]})
        if sizes[axis] > 1:
            yield _with(grid, {axis: sizes[axis] // least_factor(sizes[axis])})
    for axis in ("pp", "dp"):
        yield _with(grid, {axis: sizes[axis] + 1})
        if sizes[axis] > 1:
            yield _with(grid, {axis: sizes[axis] - 1})
    for less, more in itertools.permutations(AXES, 2):
        if sizes[less] > 1:
            factor = least_factor(sizes[less])
            yield _with(grid, {less: sizes[less] // factor, more: sizes[more] * factor})


def _with(grid: GridSpec, sizes: Mapping[str, Any]) -> GridSpec:
    changed = attrs.evolve(grid, **sizes)
    return attrs.evolve(changed, sequence_parallel=changed.tp > 1)


def _moved(grid: GridSpec, others: Iterable[Grid]) -> Iterator[GridSpec]:
    """Yield a grid that begins where another one, or a stage of it, begins or ends."""
    starts: set[int] = set()
    for other in others:
        each = other.size // other.extent("pp")
        starts.update(other.offset + stage * each for stage in range(other.extent("pp") + 1))
    for offset in sorted(starts - {grid.offset}):
        yield attrs.evolve(grid, offset=offset)


def beside(number: int, of: Sequence[int]) -> Iterator[int]:
    """Yield the next smaller and the next larger of some ascending numbers.

    >>> list(beside(6, divisors(12)))
    [4, 12]
    """
    smaller, larger = [each for each in of if each < number], [each for each in of if each > number]
    yield from (*smaller[-1:], *larger[:1])


def least_factor(number: int) -> int:
    """Return the least prime factor of a number above 1."""
    return next(factor for factor in range(2, number + 1) if number % factor == 0)
