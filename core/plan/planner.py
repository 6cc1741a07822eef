"""Plan: the layouts of a job on so many GPUs, the fastest first, and why the others are not.

What is searched: for every module tp, cp, ep, pp with uneven splits, dp and chunks (`search_space`); places beside each
other or shared (`candidates`); the number of microbatches, and with it their size; the order; more recomputation of the
main module where memory excludes faster layouts. `candidates` gives layouts in order of their lower bounds. They are
simulated one after another (`evaluation`), until the next bound is above the best time: then no layout that was looked
at is faster. A budget may end this earlier, and `gap` says by how much the winner could be beaten at most. Other orders
are tried on the best layouts (`search`). Memory is estimated for 1F1B among the candidates.

GPUs that idle count: the fastest layout is the one with most tokens per second and allocated GPU. The same job gives
the same plan everywhere.
"""

import math
from collections.abc import Mapping

import attrs

from mimogrid.core.job.validation.problems import RECOMPUTES
from mimogrid.core.plan.candidates import Candidates, Scope, candidates_of
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import (
    BEST,
    ILLEGAL,
    TOO_LARGE,
    Layout,
    Question,
    compared,
    illegal,
    marked_own,
    nearest_fit,
    too_large,
)
from mimogrid.core.plan.search import REFINED, Search
from mimogrid.core.plan.search_space import SearchSpace, search_space_of
from mimogrid.core.pricing.flops import model_flops
from mimogrid.core.step.step import Step, step_of


BUDGET = 300_000
"""Actions that are simulated before no further layout is begun; ranks of one class count once."""
CONFIRMED = 6
"""Layouts that fit and are shown."""
SHOWN = 3
"""Layouts that are shown of those that do not fit, and of those that are illegal."""


@attrs.frozen(kw_only=True)
class Plan:
    """What a search found.

    Attributes:
        layouts: those that can run, the fastest first, the job's own among them; then some that would be fast and do
            not fit, then some illegal ones.
        own: the job's own layout.
        main: the module that the others lie around.
        looked_at: configurations and layouts that were priced by their bounds.
        simulated: programs that were simulated.
        gap: the winner takes at most this part longer than any layout that was looked at.
        nearest_fit: where nothing fits, what lacks least, in words; else empty.
    """

    layouts: tuple[Layout, ...]
    own: Layout
    main: str
    looked_at: int
    simulated: int
    gap: float
    nearest_fit: str

    @property
    def best(self) -> Layout | None:
        """The winner, if anything fits."""
        return next((layout for layout in self.layouts if layout.kind == BEST), None)


def plan(question: Question, *, budget: int = BUDGET) -> Plan:
    """Search for the fastest layout; `budget` is how many actions are simulated before no further layout is begun."""
    step = step_of(question.topology(question.spec), question.samples)
    work = model_flops(step)
    main = max(work, key=work.__getitem__)
    spaces = _spaces(question, step)
    candidates = _candidates(question, step, spaces, main)
    search = Search(Evaluator(question, main))
    least = search.candidates(candidates, question, budget)
    least_recomputing, looked_at = _recomputing(search, candidates, budget)
    least = min(least, least_recomputing)
    search.confirm(REFINED, budget // 3)
    search.orders(budget // 2)
    search.confirm(CONFIRMED, budget // 3)
    own = search.own(question.spec)
    ranked = search.confirmed
    best = ranked[0] if ranked else None
    fitting = [compared(layout, best, own) for layout in ranked] if best else []
    own = next((layout for layout in fitting if layout.spec == own.spec), marked_own(own))
    others = _that_cannot_run(question, spaces, candidates, search)
    return Plan(
        layouts=(
            *fitting,
            *([own] if own not in fitting else []),
            *(layout for layout in others if layout.spec != own.spec),
        ),
        own=own,
        main=main,
        looked_at=candidates.looked_at + looked_at,
        simulated=search.evaluator.simulated,
        gap=max(best.step_s / least - 1, 0.0) if best and least < best.step_s else 0.0,
        nearest_fit="" if best else nearest_fit(candidates, search.layouts, question),
    )


def _that_cannot_run(
    question: Question, spaces: Mapping[str, SearchSpace], candidates: Candidates, search: Search
) -> list[Layout]:
    """Return some layouts that would be fast and do not fit, then some illegal ones."""
    best = next(iter(search.confirmed), None)
    found = {
        kind: [layout for layout in search.layouts if layout.kind == kind] for kind in (TOO_LARGE, ILLEGAL)
    }
    return [
        *[*too_large(candidates, question, best), *found[TOO_LARGE]][:SHOWN],
        *[*illegal(spaces, question), *found[ILLEGAL]][:SHOWN],
    ]


def _spaces(question: Question, step: Step) -> dict[str, SearchSpace]:
    """Return the search space of every module."""
    return {
        name: search_space_of(
            name,
            step=step,
            machine=question.machine,
            ranks=question.gpus,
            spec=question.spec,
            facts=question.facts,
        )
        for name in question.spec.modules
    }


def _candidates(
    question: Question, step: Step, spaces: Mapping[str, SearchSpace], main: str, *, below_s: float = math.inf
) -> Candidates:
    """Return the layouts whose lower bounds are below some seconds."""
    return candidates_of(
        Scope(
            spaces=spaces,
            graph=step.topology.graph,
            main=main,
            ranks=question.gpus,
            memory_bytes=question.memory_bytes,
            samples=len(question.samples),
            below_s=below_s,
        )
    )


def _recomputing(search: Search, candidates: Candidates, budget: int) -> tuple[float, int]:
    """Search with more and more of the main module recomputed, while faster layouts may fit because of it.

    Return the least bound of what is left, and how many configurations and layouts were looked at.
    """
    question, main = search.evaluator.question, search.evaluator.main
    module = question.spec.modules[main]
    least, looked_at = math.inf, 0
    if isinstance(module.options, Mapping):
        return least, looked_at
    for level in RECOMPUTES[RECOMPUTES.index(module.recompute) + 1 :]:
        best_s = min((search.layouts[i].step_s for i in search.confirm(1, 0)), default=math.inf)
        if any(layout.candidate.bound < best_s for layout in candidates.out_of_memory):
            modules = {**question.spec.modules, main: attrs.evolve(module, recompute=level)}
            other = attrs.evolve(question, spec=attrs.evolve(question.spec, modules=modules))
            step = step_of(other.topology(other.spec), other.samples)
            more = _candidates(other, step, _spaces(other, step), main, below_s=best_s)
            least = min(least, search.candidates(more, other, budget))
            looked_at += more.looked_at
    return least, looked_at
