"""Layouts as jobs: a candidate of the walk written into the job file's terms, and said in a line."""

from collections.abc import Mapping

import attrs

from mimogrid.core.job.placement import place
from mimogrid.core.job.schedules import INTERLEAVED, ONE_F_ONE_B
from mimogrid.core.job.spec import BatchSpec, GridSpec, JobSpec, ModuleSpec
from mimogrid.core.plan.configs import PricedConfig
from mimogrid.core.plan.question import Question
from mimogrid.core.plan.walk import BESIDE, Candidate


def layout_of(question: Question, main: str, candidate: Candidate) -> JobSpec:
    """Return the job with the layout of a candidate; modules that it does not name lie at rank 0, on one rank."""
    options = {main: candidate.main} | {name: placed.priced for name, placed in candidate.others.items()}
    offsets = _offsets(question, candidate)
    count = candidate.main.config.microbatches
    modules = {
        name: _laid_out(module, options[name], offsets[name], count) if name in options else _alone(module)
        for name, module in question.spec.modules.items()
    }
    order = INTERLEAVED if candidate.main.config.chunks > 1 else ONE_F_ONE_B
    return attrs.evolve(
        question.spec,
        modules=modules,
        batch=BatchSpec(global_size=len(question.samples), microbatches=count),
        schedule=attrs.evolve(question.spec.schedule, name=order, costs=None),
        world_size=question.gpus,
    )


def _laid_out(module: ModuleSpec, priced: PricedConfig, offset: int, count: int) -> ModuleSpec:
    """Return a module with an option at an offset, in a job of so many microbatches; defaults are not written."""
    return attrs.evolve(
        module,
        grid=attrs.evolve(priced.config.grid, offset=offset),
        chunks=priced.config.chunks,
        split=None if len(set(priced.split)) == 1 else priced.split,
        microbatches=None if priced.config.microbatches == count else priced.config.microbatches,
    )


def _alone(module: ModuleSpec) -> ModuleSpec:
    return attrs.evolve(module, grid=GridSpec(offset=0), chunks=1, split=None, microbatches=None)


def _offsets(question: Question, candidate: Candidate) -> Mapping[str, int]:
    """Lay modules behind each other, those with most tp first, each beginning at a multiple of it if there is room."""
    beside = [(name, p.priced) for name, p in candidate.others.items() if p.place == BESIDE]
    beside.sort(key=lambda each: -each[1].config.shape.ranks)
    room = question.gpus - candidate.ranks
    offsets = {candidate.main.module: 0} | {n: 0 for n, p in candidate.others.items() if p.place != BESIDE}
    end = candidate.main.ranks
    for name, priced in beside:
        gap = -end % priced.config.shape.ranks
        gap = gap if gap <= room else 0
        offsets[name], room, end = end + gap, room - gap, end + gap + priced.ranks
    return offsets


def shown(spec: JobSpec) -> str:
    """Say a layout in a line: modules in file order with their first rank, microbatches, order.

    For example ``vision dp=8 @16, language tp=2 pp=4 dp=2 @0; 16 microbatches, 1f1b``.
    """
    grids = place(spec)
    parts = ", ".join(_grid_shown(spec, name, grids[name].offset) for name in spec.modules)
    return f"{parts}; {spec.batch.microbatches} microbatches, {spec.schedule.name}"


def _grid_shown(spec: JobSpec, name: str, offset: int) -> str:
    module, grid = spec.modules[name], spec.modules[name].grid
    sizes = [f"{axis}={size}" for axis in ("tp", "cp", "ep", "pp", "dp") if (size := getattr(grid, axis)) > 1]
    more = [f"chunks={module.chunks}"] * (module.chunks > 1) + ["uneven"] * (module.split is not None)
    more += [f"recompute={module.recompute}"] * (module.recompute != "none")
    own = [f"m={module.microbatches}"] * (module.microbatches is not None)
    return " ".join([name, *(sizes or ["tp=1"]), *more, *own, f"@{offset}"])
