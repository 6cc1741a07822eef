"""Search: which layouts are evaluated, and how closely, within a budget of simulated actions.

The candidates are timed for a short step, in the order of their bounds. On the best of them other orders are tried. The
layouts that the plan shows are confirmed: timed for the whole step, with their memory.
"""

import math

import attrs

from mimogrid.core.job.schedules import AUTO, INTERLEAVED, ONE_F_ONE_B, SCHEDULES
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan.candidates import Candidates
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import SLOWER, Layout, Question, layout_of
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.schedule.tuning import GB
from mimogrid.core.step.step import step_of


REFINED = 3
"""On how many of the best layouts other orders are tried."""
ONE_ORDER = frozenset({ONE_F_ONE_B, INTERLEAVED})
"""Two names of one order, which interleaves where ranks have several chunks."""
TUNED = 2
"""On how many of the best layouts `auto` is tried."""
TUNED_AT_MOST = 6_000
"""Actions of a step, of all stages. On a larger step `auto` would take too long."""


@attrs.define(eq=False)
class Search:
    """The layouts that were evaluated so far. `whole` has the numbers of those that were confirmed.

    Budgets are numbers of simulated actions (`Evaluator.effort`).
    """

    evaluator: Evaluator
    layouts: list[Layout] = attrs.field(factory=list[Layout])
    whole: set[int] = attrs.field(factory=set[int])

    def candidates(self, found: Candidates, question: Question, budget: int) -> float:
        """Evaluate candidates while their bounds are below the best time; return the least bound of what is left."""
        until = self.evaluator.effort + budget
        best = min((layout.step_s for layout in self.layouts if layout.kind == SLOWER), default=math.inf)
        for candidate in found.candidates:
            if candidate.bound >= best:
                return best
            if self.evaluator.effort >= until:
                return min(candidate.bound, found.left_out_s)
            layout = self.layouts[self.evaluate(layout_of(question, self.evaluator.main, candidate))]
            if layout.kind == SLOWER:
                best = min(best, layout.step_s)
        return found.left_out_s

    def orders(self, budget: int) -> None:
        """Try other orders on the best layouts, and the one that `auto` finds on those that are small enough."""
        until = self.evaluator.effort + budget
        for i in self._ranked()[:REFINED]:
            layout = self.layouts[i]
            if layout.step_s <= layout.lower_bound_s:
                continue
            for name in SCHEDULES:
                other = self._under(layout.spec, name)
                if other is not None and self.evaluator.effort < until:
                    self.evaluate(other)
        for i in self._ranked()[:TUNED]:
            layout = self.layouts[i]
            modules = self.evaluator.question.topology(layout.spec).modules.values()
            actions = 2 * sum(len(module.stages) * module.microbatches for module in modules)
            if actions <= TUNED_AT_MOST and layout.step_s > layout.lower_bound_s:
                self.evaluate(self._tuned(layout.spec))

    def _tuned(self, spec: JobSpec) -> JobSpec:
        """Return a layout under `auto`, with the costs and the cap on memory that its order depends on."""
        question = self.evaluator.question
        step = step_of(question.topology(spec), question.samples)
        schedule = attrs.evolve(
            spec.schedule,
            name=AUTO,
            memory_gb=question.memory_bytes / GB,
            costs=on_machine(step, question.machine, spread=True),
        )
        return attrs.evolve(spec, schedule=schedule)

    def _under(self, spec: JobSpec, name: str) -> JobSpec | None:
        """Return a layout under another order; None if that is illegal, or the same."""
        if name in ONE_ORDER | {AUTO, spec.schedule.name}:
            return None
        other = attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, name=name))
        return None if problems_of(other, self.evaluator.question.facts) else other

    def confirm(self, count: int, budget: int) -> list[int]:
        """Confirm so many of the best layouts, the very best in any case; return the numbers of those confirmed."""
        until = self.evaluator.effort + budget
        while True:
            ranked = self._ranked()[:count]
            i = next((i for i in ranked if i not in self.whole), None)
            if i is None or (self.evaluator.effort >= until and ranked[0] in self.whole):
                return [i for i in ranked if i in self.whole]
            self._confirm(i)

    def _confirm(self, i: int) -> None:
        self.layouts[i] = self.evaluator.confirmed(self.layouts[i])
        self.whole.add(i)

    @property
    def confirmed(self) -> list[Layout]:
        """The layouts that were confirmed, the fastest first."""
        return [self.layouts[i] for i in self._ranked() if i in self.whole]

    def _ranked(self) -> list[int]:
        """Return the numbers of the layouts that fit, the fastest first."""
        fits = (i for i, layout in enumerate(self.layouts) if layout.kind == SLOWER)
        return sorted(fits, key=lambda i: self.layouts[i].step_s)

    def own(self, spec: JobSpec) -> Layout:
        """Evaluate the job's own layout, and confirm it."""
        i = self.evaluate(spec)
        if self.layouts[i].kind == SLOWER and i not in self.whole:
            self._confirm(i)
        return self.layouts[i]

    def evaluate(self, spec: JobSpec) -> int:
        """Evaluate a layout for a short step, unless that has been done; return its number."""
        for i, layout in enumerate(self.layouts):
            if layout.spec == spec:
                return i
        self.layouts.append(self.evaluator.evaluated(spec))
        return len(self.layouts) - 1
