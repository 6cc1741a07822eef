"""Plan: the layouts of a job on so many GPUs, the fastest first, and why the others are not.

What is searched: for every module tp, cp, ep, pp with uneven splits, dp, chunks and recomputation (`search_space`);
places beside each other or shared (`candidates`); the number of microbatches, and with it their size; the order.
`candidates` gives layouts with lower bounds, the best by estimate first. They are simulated one after another
(`evaluation`), except where the bound is above the best time: then no layout that was looked at is faster. Budgets of
work, not of time, may end this earlier, and `gap` says by how much the winner could be beaten at most. The best layout
is then changed by single choices as long as that makes it faster (`refinement`), and other orders are tried on the best
layouts (`search`). Memory is estimated for 1F1B among the candidates. All layouts share the update among dp ranks
(`optimizer.sharded`): the same result in less memory. Where all that seem to fit do not, the search begins again with
less of it (`MEMORY`).

GPUs that idle count: the fastest layout is the one with most tokens per second and allocated GPU. The same job gives
the same plan everywhere.
"""

import math
from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.base.errors import PlanError
from mimogrid.core.plan.candidates import Candidates, Scope, candidates_of
from mimogrid.core.plan.conflicts import conflicts
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import (
    BEST,
    ILLEGAL,
    SLOWER,
    TOO_LARGE,
    Layout,
    Question,
    compared,
    illegal,
    marked_own,
    marked_unpinned,
    nearest_fit,
    shown,
    too_large,
)
from mimogrid.core.plan.progress import Watch, always, never
from mimogrid.core.plan.refinement import Refinement
from mimogrid.core.plan.search import Search
from mimogrid.core.plan.search_space import SearchSpace, search_space_of
from mimogrid.core.plan.sensitivity import changed_questions
from mimogrid.core.plan.standard import standard_layouts
from mimogrid.core.pricing.flops import model_flops
from mimogrid.core.step.step import Step, step_of


BUDGET = 300_000
"""Actions that are simulated before no further layout is begun; ranks of one class count once."""
MEMORY = (1.0, 0.95, 0.88, 0.78, 0.65)
"""Parts of the memory that candidates may fill by estimate, one after the other until one does fit: the estimate leaves
out messages, and orders that keep more in flight."""
COMPARED = 3
"""Of so many of the best layouts it is said how they do if what was assumed is not so."""
FITTING, CONFIRMED = 6, 2
"""Layouts that fit and are shown, and how many of these `simulate` has timed."""
SHOWN = 3
"""Layouts that are shown of those that do not fit, and of those that are illegal."""


@attrs.frozen
class Sensitivity:
    """What if: the seconds of the winner then, and the fastest then of the layouts behind it, with its seconds."""

    what: str
    winner_s: float
    fastest: Layout
    fastest_s: float


@attrs.frozen(kw_only=True)
class Plan:
    """What a search found.

    Attributes:
        layouts: those that can run, the fastest first, the job's own among them, which need not have what is pinned;
            then some that would be fast and do not fit, then some illegal ones.
        own: the job's own layout.
        main: the module that the others lie around.
        looked_at: configurations and layouts that were priced by their bounds.
        simulated: programs that were simulated.
        gap: the winner takes at most this part longer than any layout that was looked at.
        nearest_fit: where nothing fits, what lacks least, and which pins are in the way, in words; else empty.
        sensitivity: what the winner is worth if what was assumed is not so.
        stopped: whether the search ended early because it was told to.
    """

    layouts: tuple[Layout, ...]
    own: Layout
    main: str
    looked_at: int
    simulated: int
    gap: float
    nearest_fit: str
    sensitivity: tuple[Sensitivity, ...] = ()
    stopped: bool = False

    @property
    def fitting(self) -> tuple[Layout, ...]:
        """The layouts that fit, the fastest first."""
        return tuple(layout for layout in self.layouts if layout.kind in {BEST, SLOWER})

    @property
    def best(self) -> Layout | None:
        """The winner, if anything fits."""
        return next((layout for layout in self.layouts if layout.kind == BEST), None)


def plan(question: Question, *, budget: int = BUDGET, watch: Watch = always) -> Plan:
    """Search for the fastest layout.

    `budget` is how many actions are simulated before no further layout is begun. `watch` is told of the progress, and
    may end the search with what it has found so far (`progress`). Raises PlanError for pins that no layout has
    together.
    """
    shared = attrs.evolve(question.spec, optimizer=attrs.evolve(question.spec.optimizer, sharded=True))
    step = step_of(question.topology(shared), question.samples)
    work = model_flops(step)
    main = max(work, key=work.__getitem__)
    if problems := conflicts(question, main):
        raise PlanError(problems)
    question = attrs.evolve(question, pins=attrs.evolve(question.pins, main=main))
    spaces = _spaces(question, step)
    search = Search(Evaluator(question, main), watch)
    candidates, least = _walked(search, step, spaces, budget)
    search.refine(_refinement(search, step, spaces), budget // 4)
    search.orders(budget // 2)
    search.refine(_refinement(search, step, spaces), budget // 4)
    own, named = search.asked(question.spec), standard_layouts(question, spaces)
    standards = [search.asked(spec) for spec in named.values()]
    ranked = search.confirm(FITTING, 1 if search.stopped else CONFIRMED)
    best = ranked[0] if ranked else None
    others = [each for each in (own, *standards) if each.kind == SLOWER and each not in ranked]
    fitting = [compared(layout, best, own, named) for layout in (*ranked, *others)] if best else []
    fitting = [search.evaluator.with_padding(marked_unpinned(layout, question.pins)) for layout in fitting]
    lone = marked_unpinned(marked_own(own), question.pins)
    own = next((layout for layout in fitting if layout.spec == own.spec), lone)
    unfit = [
        attrs.evolve(each, reason=f"{name}: {each.reason}")
        for name, each in zip(named, standards, strict=True)
    ]
    cannot = _that_cannot_run(question, spaces, candidates, search)
    known = [layout.spec for layout in (own, *fitting)]
    return Plan(
        layouts=(
            *fitting,
            *([own] if own not in fitting else []),
            *(layout for layout in (*unfit, *cannot) if layout.spec not in known),
        ),
        own=own,
        main=main,
        looked_at=search.looked_at,
        simulated=search.evaluator.simulated,
        gap=max(best.step_s / least - 1, 0.0) if best and least < best.step_s else 0.0,
        nearest_fit="" if best else _nearest_fit(search, step, spaces, candidates),
        sensitivity=_sensitivity(search, ranked, step),
        stopped=search.stopped,
    )


def _walked(
    search: Search, step: Step, spaces: Mapping[str, SearchSpace], budget: int
) -> tuple[Candidates, float]:
    """Evaluate candidates until one fits; return the last ones, and the least bound of what was left out."""
    candidates, least = Candidates((), math.inf, (), 0), math.inf
    for part in MEMORY:
        candidates = _candidates(search, step, spaces, memory=part)
        search.looked_at += candidates.looked_at
        least = search.candidates(candidates, budget)
        if search.fit(1) or not candidates.candidates or search.stopped:
            break
    return candidates, least


def _sensitivity(search: Search, ranked: Sequence[Layout], step: Step) -> tuple[Sensitivity, ...]:
    """Return how the winner and the layouts behind it do if what was assumed is not so."""
    found: list[Sensitivity] = []
    if not ranked or search.stopped:
        return ()
    for what, question in changed_questions(search.evaluator.question, step).items():
        times = [layout.step_s * search.evaluator.perturbed(layout, question) for layout in ranked[:COMPARED]]
        best = min(range(len(times)), key=times.__getitem__)
        found.append(Sensitivity(what, times[0], ranked[best], times[best]))
    return tuple(found)


def _that_cannot_run(
    question: Question, spaces: Mapping[str, SearchSpace], candidates: Candidates, search: Search
) -> list[Layout]:
    """Return some layouts that would be fast and do not fit, then some illegal ones."""
    best = next(iter(search.confirm(1, 1)), None)
    found = {
        kind: [layout for layout in search.layouts if layout.kind == kind] for kind in (TOO_LARGE, ILLEGAL)
    }
    both = (
        [*too_large(candidates, question, best), *found[TOO_LARGE]],
        [*illegal(spaces, question), *found[ILLEGAL]],
    )
    pinned = [[layout for layout in each if not question.pins.broken_by(layout.spec)] for each in both]
    return [layout for each in pinned for layout in each[:SHOWN]]


def _nearest_fit(
    search: Search, step: Step, spaces: Mapping[str, SearchSpace], candidates: Candidates
) -> str:
    """Return what lacks least where nothing fits, and the pins without which something does, in words."""
    question, main = search.evaluator.question, search.evaluator.main
    pinned = [layout for layout in search.layouts if not question.pins.broken_by(layout.spec)]
    words, pins = nearest_fit(candidates, pinned, spaces, question), question.pins.chosen
    tries = [*((pin,) for pin in pins), *([pins] if len(pins) > 1 else [])]
    for left_out in tries if not search.stopped else ():
        freed = attrs.evolve(question, pins=question.pins.without(*left_out))
        if fits := _any_that_fits(freed, main, step):
            return f"{words}. Without {' '.join(f'--pin {pin}' for pin in left_out)} this fits: {shown(fits.spec)}"
    return words


def _any_that_fits(question: Question, main: str, step: Step) -> Layout | None:
    """Return the first layout that is found to fit, if one of the first candidates does."""
    search, spaces = Search(Evaluator(question, main), never), _spaces(question, step)
    for part in MEMORY:
        search.candidates(_candidates(search, step, spaces, memory=part), BUDGET)
        for i in search.fit(1):
            return search.layouts[i]
    return None


def _spaces(question: Question, step: Step) -> dict[str, SearchSpace]:
    """Return the search space of every module."""
    return {
        name: search_space_of(
            name,
            step=step,
            machine=question.machine,
            ranks=question.gpus,
            spec=step.topology.spec,
            facts=question.facts,
            pins=question.pins,
        )
        for name in question.spec.modules
    }


def _refinement(search: Search, step: Step, spaces: Mapping[str, SearchSpace]) -> Refinement:
    question = search.evaluator.question
    return Refinement(
        spaces=spaces,
        graph=step.topology.graph,
        ranks=question.gpus,
        memory_bytes=question.memory_bytes,
        pins=search.pins,
    )


def _candidates(
    search: Search, step: Step, spaces: Mapping[str, SearchSpace], *, memory: float
) -> Candidates:
    """Return the layouts with the least bounds that are estimated to fit in a part of the memory."""
    question = search.evaluator.question
    scope = Scope(
        spaces=spaces,
        graph=step.topology.graph,
        main=search.evaluator.main,
        ranks=question.gpus,
        memory_bytes=memory * question.memory_bytes,
        samples=len(question.samples),
        work=model_flops(step),
        pins=question.pins,
    )
    return candidates_of(scope, search.watch)
