"""Search: which layouts are looked at how closely, as far as a budget of simulated actions goes.

All that a walk promises are timed for a short step, in the order of their bounds. On the best of them other orders are
tried. What is told in the end is confirmed, timed for its whole step and weighed.
"""

import math

import attrs

from mimogrid.core.job.schedules import AUTO, INTERLEAVED, ONE_F_ONE_B, SCHEDULES
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.validation import problems_of
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import layout_of
from mimogrid.core.plan.question import SLOWER, Layout, Question
from mimogrid.core.plan.walk import Walk
from mimogrid.core.pricing import on_machine
from mimogrid.core.schedule.tuning import GB
from mimogrid.core.step.step import step_of


REFINED = 3
"""Of the best layouts, on how many other orders are tried."""
ONE = frozenset({ONE_F_ONE_B, INTERLEAVED})
"""Two names of one order: what interleaves is that ranks have several chunks."""
TUNED = 2
"""On how many of the best layouts `auto` is tried."""
TUNED_AT_MOST = 6_000
"""Actions of a step, of all stages: `auto` tries orders of a larger one for too long."""


@attrs.define(eq=False)
class Search:
    """Layouts that were looked at closely: at first for a short step, those that matter for the whole one.

    Budgets are in actions that are simulated (`Evaluator.effort`). `whole` has the numbers of the layouts that were
    confirmed.
    """

    evaluator: Evaluator
    layouts: list[Layout] = attrs.field(factory=list[Layout])
    whole: set[int] = attrs.field(factory=set[int])

    def candidates(self, walked: Walk, question: Question, budget: int) -> float:
        """Simulate candidates while their bounds promise anything; return the least bound of what is left."""
        until = self.evaluator.effort + budget
        best = min((layout.step_s for layout in self.layouts if layout.kind == SLOWER), default=math.inf)
        for candidate in walked.candidates:
            if candidate.bound >= best:
                return best
            if self.evaluator.effort >= until:
                return min(candidate.bound, walked.passed)
            layout = self.layouts[self.judge(layout_of(question, self.evaluator.main, candidate))]
            if layout.kind == SLOWER:
                best = min(best, layout.step_s)
        return walked.passed

    def orders(self, budget: int) -> None:
        """Try other orders on the best layouts, then on those that are small enough the one that `auto` finds."""
        until = self.evaluator.effort + budget
        for i in self._ranked()[:REFINED]:
            layout = self.layouts[i]
            if layout.step_s <= layout.lower_bound_s:
                continue
            for name in SCHEDULES:
                other = self._under(layout.spec, name)
                if other is not None and self.evaluator.effort < until:
                    self.judge(other)
        for i in self._ranked()[:TUNED]:
            layout = self.layouts[i]
            modules = self.evaluator.question.topology(layout.spec).modules.values()
            actions = 2 * sum(len(module.stages) * module.microbatches for module in modules)
            if actions <= TUNED_AT_MOST and layout.step_s > layout.lower_bound_s:
                self.judge(self._tuned(layout.spec))

    def _tuned(self, spec: JobSpec) -> JobSpec:
        """Return a layout under `auto`, whose order goes by costs and a cap on memory: so they stand in the job."""
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
        """Return a layout under another order, unless that is illegal, or the same."""
        if name in ONE | {AUTO, spec.schedule.name}:
            return None
        other = attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, name=name))
        return None if problems_of(other, self.evaluator.question.facts) else other

    def confirm(self, count: int, budget: int) -> list[int]:
        """Weigh so many of the best layouts, and time them for the whole step; the very best in any case.

        Return the numbers of those best ones that were confirmed.
        """
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
    def told(self) -> list[Layout]:
        """The layouts that were confirmed, the fastest first."""
        return [self.layouts[i] for i in self._ranked() if i in self.whole]

    def _ranked(self) -> list[int]:
        """Return the numbers of the layouts that fit, the fastest first."""
        fits = (i for i, layout in enumerate(self.layouts) if layout.kind == SLOWER)
        return sorted(fits, key=lambda i: self.layouts[i].step_s)

    def own(self, spec: JobSpec) -> Layout:
        """Judge the job's own layout, and confirm it."""
        i = self.judge(spec)
        if self.layouts[i].kind == SLOWER and i not in self.whole:
            self._confirm(i)
        return self.layouts[i]

    def judge(self, spec: JobSpec) -> int:
        """Time a layout for a short step, unless it has been; return its number."""
        for i, layout in enumerate(self.layouts):
            if layout.spec == spec:
                return i
        self.layouts.append(self.evaluator.tried(spec))
        return len(self.layouts) - 1
