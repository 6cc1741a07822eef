"""Walk: the candidates of a question, evaluated in the order of their estimates until one fits."""

import math
from collections.abc import Mapping

from mimogrid.core.plan.candidates import Candidates, Scope, candidates_of
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import Layout, Question
from mimogrid.core.plan.progress import never
from mimogrid.core.plan.search import Search
from mimogrid.core.plan.search_space import SearchSpace, search_space_of
from mimogrid.core.pricing.flops import model_flops
from mimogrid.core.step.step import Step


BUDGET = 300_000
"""Actions that are simulated before no further layout is begun; ranks of one class count once."""
MEMORY = (1.0, 0.95, 0.88, 0.78, 0.65)
"""Parts of the memory that candidates may fill by estimate, one after the other until one does fit: the estimate leaves
out messages, and orders that keep more in flight."""


def spaces_of(question: Question, step: Step) -> dict[str, SearchSpace]:
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


def walked(
    search: Search, step: Step, spaces: Mapping[str, SearchSpace], budget: int = BUDGET
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


def any_that_fits(question: Question, main: str, step: Step) -> Layout | None:
    """Return the first layout that is found to fit, with its memory; None if no candidate does."""
    search, spaces = Search(Evaluator(question, main), never), spaces_of(question, step)
    for part in MEMORY:
        search.candidates(_candidates(search, step, spaces, memory=part), BUDGET)
        if fits := search.fit(1):
            return search.measure(fits[0])
    return None


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
