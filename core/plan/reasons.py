"""Reasons: why a layout is not the best one, for those that were simulated and for those that never were."""

from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.job.spec import JobSpec
from mimogrid.core.plan.evaluation import needs
from mimogrid.core.plan.layouts import layout_of
from mimogrid.core.plan.menu import Illegal, Menu
from mimogrid.core.plan.question import BEST, ILLEGAL, SLOWER, TOO_LARGE, Layout, Question
from mimogrid.core.plan.walk import Miss, Walk


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
    for miss in walked.misses:
        if best is not None and miss.bound >= best.step_s:
            continue
        option = miss.candidate.main
        if (kind := f"{option.way.shape} {option.way.pp}") not in told:
            told.add(kind)
            yield Layout(
                spec=layout_of(question, option.module, miss.candidate),
                kind=TOO_LARGE,
                reason=f"does not fit: {_missing(miss, question.memory_bytes)}",
            )


def _missing(miss: Miss, cap: float) -> str:
    option = miss.candidate.main
    if miss.module != option.module and miss.module in miss.candidate.others:
        option = miss.candidate.others[miss.module].option
    stage = f"{miss.module}.{miss.pp}"
    return f"{needs(stage, miss.needs, cap)} with {option}"


def nearest_miss(walked: Walk, judged: Sequence[Layout], question: Question) -> str:
    """Say what comes closest where nothing fits."""
    if walked.misses:
        return _missing(min(walked.misses, key=lambda miss: miss.needs), question.memory_bytes)
    return judged[0].reason if judged else "no grid is legal on so few GPUs"


def illegal(menus: Mapping[str, Menu], question: Question) -> Iterator[Layout]:
    """Yield shapes that one would try first, powers of two of tp alone, and why they cannot be."""
    for menu in menus.values():
        for each in menu.illegal:
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
