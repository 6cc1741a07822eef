"""Reasons: why a layout is not the best one, for those that were simulated and for those that never were."""

from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.job.spec import JobSpec
from mimogrid.core.plan.evaluation import needs
from mimogrid.core.plan.layouts import layout_of
from mimogrid.core.plan.question import BEST, ILLEGAL, SLOWER, TOO_LARGE, Layout, Question
from mimogrid.core.plan.search_space import Illegal, SearchSpace
from mimogrid.core.plan.walk import OutOfMemory, Walk


def compared(layout: Layout, best: Layout | None, own: Layout) -> Layout:
    """Say how a layout that fits stands to the best one."""
    assert best is not None
    reason = "the fastest" if layout is best else f"{layout.step_s / best.step_s:.2f} x slower"
    told = attrs.evolve(layout, kind=BEST if layout is best else SLOWER, reason=reason)
    return marked_own(told) if layout.spec == own.spec else told


def marked_own(layout: Layout) -> Layout:
    """Say of a layout that it is the job's own."""
    return attrs.evolve(layout, reason=f"the job's own layout: {layout.reason}")


def too_large(walked: Walk, question: Question, best: Layout | None) -> Iterator[Layout]:
    """Yield layouts that would be faster than the best one if they fitted, each module once in a shape."""
    told: set[str] = set()
    for too_large in walked.out_of_memory:
        if best is not None and too_large.bound >= best.step_s:
            continue
        priced = too_large.candidate.main
        if (kind := f"{priced.config.shape} {priced.config.pp}") not in told:
            told.add(kind)
            yield Layout(
                spec=layout_of(question, priced.module, too_large.candidate),
                kind=TOO_LARGE,
                reason=f"does not fit: {_lacking(too_large, question.memory_bytes)}",
            )


def _lacking(too_large: OutOfMemory, cap: float) -> str:
    priced = too_large.candidate.main
    if too_large.module != priced.module and too_large.module in too_large.candidate.others:
        priced = too_large.candidate.others[too_large.module].priced
    stage = f"{too_large.module}.{too_large.pp}"
    return f"{needs(stage, too_large.needs, cap)} with {priced}"


def nearest_fit(walked: Walk, judged: Sequence[Layout], question: Question) -> str:
    """Say what comes closest where nothing fits."""
    if walked.out_of_memory:
        return _lacking(
            min(walked.out_of_memory, key=lambda too_large: too_large.needs), question.memory_bytes
        )
    return judged[0].reason if judged else "no grid is legal on so few GPUs"


def illegal(spaces: Mapping[str, SearchSpace], question: Question) -> Iterator[Layout]:
    """Yield shapes that one would try first, powers of two of tp alone, and why they cannot be."""
    for space in spaces.values():
        for each in space.illegal:
            if each.shape.cp == each.shape.ep == 1 and each.shape.tp & (each.shape.tp - 1) == 0:
                yield Layout(
                    spec=_with_shape(question.spec, each),
                    kind=ILLEGAL,
                    reason=f"illegal: {each.problem.message}",
                )


def _with_shape(spec: JobSpec, illegal: Illegal) -> JobSpec:
    module = spec.modules[illegal.module]
    grid = attrs.evolve(module.grid, tp=illegal.shape.tp)
    return attrs.evolve(spec, modules={**spec.modules, illegal.module: attrs.evolve(module, grid=grid)})
