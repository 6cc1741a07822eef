"""Layouts: one job laid out for worlds of several sizes, and the choice among them.

The tables of a job file lay its modules out once. Each `[[layouts]]` says what is different for another number of
ranks. It may only say what does not change the result (`changes`), so a run goes on from any checkpoint of the job
under any of its layouts. Which one a world takes is a function of its size: the largest that fits.

>>> [(layout.where, layout.ranks) for layout in layouts_of(JOB)]
[('', 4), ('layouts[0]', 2)]
>>> [chosen(JOB, ranks).ranks for ranks in (7, 4, 3, 2)]
[4, 4, 2, 2]
>>> chosen(JOB, 1) is None
True
"""

from collections import Counter
from collections.abc import Iterator

import attrs

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.job.placement import size_of
from mimogrid.core.job.spec import (
    BatchLayoutSpec,
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    LayoutSpec,
    ModuleLayoutSpec,
    ModuleSpec,
    OptimizerLayoutSpec,
    ScheduleLayoutSpec,
)


PLANNED = "plan"
"""The value of `layouts` by which the layout of a world is searched for when the world is there."""

JOB = JobSpec(
    modules={"language": ModuleSpec(model="gpt", options={}, grid=GridSpec(dp=2, pp=2))},
    data=DataSpec(source="synthetic"),
    batch=BatchSpec(global_size=8),
    layouts=(LayoutSpec(ranks=2, modules={"language": ModuleLayoutSpec(grid=GridSpec(dp=2))}),),
)
"""A job for examples."""


@attrs.frozen
class Layout:
    """A job under one of its layouts.

    Attributes:
        where: the place of the layout in the job file; "" for the tables of the modules themselves.
        ranks: it is for worlds of so many ranks or more.
        spec: the job with this layout in its own tables, and without others.
    """

    where: str
    ranks: int
    spec: JobSpec


def layouts_of(spec: JobSpec) -> tuple[Layout, ...]:
    """Return the layouts that a job file has: that of its tables, then those of `[[layouts]]` in their order."""
    alone = attrs.evolve(spec, layouts=(), world_size=None)
    own = Layout("", _needed(spec), alone)
    others = (
        Layout(f"layouts[{i}]", layout.ranks, laid_out(alone, layout))
        for i, layout in enumerate(_written(spec))
    )
    return own, *others


def chosen(spec: JobSpec, ranks: int | None) -> Layout | None:
    """Return the layout of a job for a world of so many ranks, the largest that fits; None if none does.

    Without a number of ranks it is the one for `world_size`, and without that the one of the tables.
    """
    size = spec.world_size if ranks is None else ranks
    layouts = layouts_of(spec)
    if size is None:
        return layouts[0]
    found = max((each for each in layouts if each.ranks <= size), key=lambda each: each.ranks, default=None)
    if found is None or ranks is not None:
        return found
    return attrs.evolve(found, spec=attrs.evolve(found.spec, world_size=spec.world_size))


def laid_out(spec: JobSpec, layout: LayoutSpec) -> JobSpec:
    """Return a job with a layout in place of its own. Measured costs of its own stages go with its own layout."""
    batch, optimizer, schedule = spec.batch, spec.optimizer, spec.schedule
    if layout.schedule.name is not None:
        schedule = attrs.evolve(schedule, name=layout.schedule.name)
    if layout.optimizer.sharded is not None:
        optimizer = attrs.evolve(optimizer, sharded=layout.optimizer.sharded)
    if layout.batch.microbatches is not None:
        batch = attrs.evolve(batch, microbatches=layout.batch.microbatches)
    modules = {
        name: _module(module, layout.modules[name]) if name in layout.modules else module
        for name, module in spec.modules.items()
    }
    return attrs.evolve(
        spec,
        modules=modules,
        batch=batch,
        optimizer=optimizer,
        schedule=attrs.evolve(schedule, costs=None),
    )


def _module(module: ModuleSpec, layout: ModuleLayoutSpec) -> ModuleSpec:
    """Return a module as a layout says it; only what it recomputes stays if the layout leaves it out."""
    return attrs.evolve(
        module,
        grid=layout.grid,
        chunks=layout.chunks,
        split=layout.split,
        microbatches=layout.microbatches,
        recompute=module.recompute if layout.recompute is None else layout.recompute,
    )


def layout_of(spec: JobSpec, ranks: int) -> LayoutSpec:
    """Return how a job is laid out: `laid_out` with this gives any job of the same kind the same layout."""
    return LayoutSpec(
        ranks=ranks,
        modules={
            name: ModuleLayoutSpec(
                grid=module.grid,
                chunks=module.chunks,
                split=module.split,
                microbatches=module.microbatches,
                recompute=module.recompute,
            )
            for name, module in spec.modules.items()
        },
        batch=BatchLayoutSpec(microbatches=spec.batch.microbatches),
        schedule=ScheduleLayoutSpec(name=spec.schedule.name),
        optimizer=OptimizerLayoutSpec(sharded=spec.optimizer.sharded),
    )


def layout_problems(spec: JobSpec) -> Iterator[Problem]:
    """Yield what is wrong with the list of layouts; each of them is a job, which is checked as such."""
    if isinstance(spec.layouts, str):
        if spec.layouts != PLANNED:
            yield Problem("layouts", f"is '{spec.layouts}'.", 'Use "plan", or tables [[layouts]].')
        elif spec.gpu.name is None:
            message = "are to be planned, and the job does not say for which GPUs."
            yield Problem("layouts", message, 'Name them: gpu.name = "h100" (`mimogrid plan --help`).')
        return
    for i, layout in enumerate(spec.layouts):
        for name in layout.modules:
            if name not in spec.modules:
                where = f"layouts[{i}].modules.{name}"
                yield Problem(where, f"there is no module '{name}'.", nearest(name, tuple(spec.modules)))
    sizes = [(layout.where or "the tables of the modules", layout.ranks) for layout in layouts_of(spec)]
    for size, count in Counter(ranks for _, ranks in sizes).items():
        if count > 1:
            first, *others = [where for where, ranks in sizes if ranks == size]
            message = f"is for {size} ranks, as {first}."
            yield from (Problem(f"{other}.ranks", message, "Leave one of the two out.") for other in others)


def too_small(spec: JobSpec, ranks: int) -> Problem:
    """Return what is wrong with a world for which a job has no layout."""
    sizes = sorted(layout.ranks for layout in layouts_of(spec))
    return Problem(
        "world_size",
        f"there are {ranks} ranks, and the smallest layout of the job is for {sizes[0]} "
        f"(all: {', '.join(map(str, sizes))}).",
        f"Start {sizes[0]} ranks or more, or add a layout for fewer: [[layouts]].",
    )


def _needed(spec: JobSpec) -> int:
    """Return how many ranks the tables of the modules need, also where they are not legal."""
    end = most = 0
    for module in spec.modules.values():
        end = (end if module.grid.offset is None else module.grid.offset) + size_of(module.grid)
        most = max(most, end)
    return most


def _written(spec: JobSpec) -> tuple[LayoutSpec, ...]:
    return () if isinstance(spec.layouts, str) else spec.layouts
