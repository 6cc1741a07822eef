"""Search: which layouts are evaluated, and how closely, within a budget of simulated actions.

The candidates are timed for a short step, in the order of their estimates. On the best of them that fit other orders
are tried. The best layouts are confirmed: `simulate` times their whole step.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.job.schedules import AUTO, INTERLEAVED, ONE_F_ONE_B, SCHEDULES
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan.candidates import Candidates
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import SLOWER, Layout, kind_of, layout_of
from mimogrid.core.plan.pins import JOB, Pins
from mimogrid.core.plan.progress import Progress, Watch, always
from mimogrid.core.plan.refinement import Refinement
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.pricing.even import even_costs
from mimogrid.core.schedule.tuning import GB
from mimogrid.core.step.step import step_of


REFINED = 3
"""On how many of the best layouts other orders are tried."""
ONE_ORDER = frozenset({ONE_F_ONE_B, INTERLEAVED})
"""Two names of one order, which interleaves where ranks have several chunks."""
NEIGHBOURS = 40
"""Layouts that are evaluated beside the best ones."""
PROMISING = 0.995
"""A neighbour of a layout is better if it takes at most this part of its time."""
CONFIRMED_MOST = 6
"""How many layouts are confirmed at most, if one of them fits."""
TUNED = 1
"""On how many of the best layouts `auto` is tried."""
TUNED_AT_MOST = 6_000
"""Actions of a step, of all stages. On a larger step `auto` would take too long."""


@attrs.define(eq=False)
class Search:
    """The layouts that were evaluated so far.

    `fitting` has the numbers of those whose memory was looked at, `whole` of those whose whole step was timed, and
    `confirmed` of those that `simulate` has timed.
    `looked_at` counts what was priced; the search has `stopped` once `watch` has said so.

    Layouts without what `pins` say are not ranked.

    Budgets are numbers of simulated actions (`Evaluator.effort`).
    """

    evaluator: Evaluator
    watch: Watch = always
    looked_at: int = 0
    stopped: bool = False
    layouts: list[Layout] = attrs.field(factory=list[Layout])
    fitting: set[int] = attrs.field(factory=set[int])
    whole: set[int] = attrs.field(factory=set[int])
    confirmed: set[int] = attrs.field(factory=set[int])
    pins: Pins = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.pins = self.evaluator.question.pins.on_the_way

    def candidates(self, found: Candidates, budget: int) -> float:
        """Evaluate candidates whose bounds are below the best time; return the least bound of what is left.

        The best time is that of a layout that fits: one that does not says nothing of those behind it. Whether it fits
        is asked only where that ends the search, because its answer may cost more than the time of a layout.
        """
        until, question = self.evaluator.effort + budget, self.evaluator.question
        bounds = [candidate.bound for candidate in reversed(found.candidates)]
        to_come = [*itertools.accumulate(bounds, min)][::-1]
        for candidate, least in zip(found.candidates, to_come, strict=True):
            if candidate.bound >= self._best_s() and candidate.bound >= self._fitting_s():
                continue
            goes_on = self._goes_on(least) or not self.fit(1)
            if self.evaluator.effort >= until or not goes_on:
                return min(least, found.left_out_s)
            self.evaluate(layout_of(question, self.evaluator.main, candidate))
        return found.left_out_s

    def _best_s(self) -> float:
        """Return the seconds of the best layout, whether its memory is known to be enough or not yet."""
        return min((layout.step_s for layout in self.layouts if layout.kind == SLOWER), default=math.inf)

    def _fitting_s(self) -> float:
        """Return the seconds of the best layout whose memory is known to be enough."""
        return min((self.layouts[i].step_s for i in self.fit(1)), default=math.inf)

    def _goes_on(self, bound_s: float) -> bool:
        """Tell the progress; return whether to go on."""
        progress = Progress(
            bound_s=bound_s,
            best_s=self._best_s(),
            looked_at=self.looked_at,
            simulated=self.evaluator.simulated,
        )
        self.stopped = self.stopped or not self.watch(progress)
        return not self.stopped

    def refine(self, refinement: Refinement, budget: int) -> None:
        """Change the best layout that fits by one choice, as long as that makes it clearly faster."""
        until, most = self.evaluator.effort + budget, len(self.layouts) + NEIGHBOURS
        while not self.stopped and self._improved(refinement, until, most):
            pass

    def _improved(self, refinement: Refinement, until: int, most: int) -> bool:
        """Whether a neighbour of the best layout that fits is found to be clearly faster, and to fit."""
        for best in self.fit(1):
            layout = self._whole(best)
            enough_s = PROMISING * layout.step_s
            for spec in refinement.promising(layout.spec, enough_s):
                spent = self.evaluator.effort >= until or len(self.layouts) >= most
                if spent or not self._goes_on(0.0):
                    return False
                if problems_of(spec, self.evaluator.question.facts):
                    continue
                i = self.evaluate(spec)
                faster = self.layouts[i].kind == SLOWER and self.layouts[i].step_s < enough_s
                if faster and self._fits(i) and self._whole(i).step_s < enough_s:
                    return True
        return False

    def _whole(self, i: int) -> Layout:
        """Return a layout as its whole step is timed: a short one flatters layouts whose pipelines fill slowly."""
        if i not in self.whole:
            self.layouts[i] = self.evaluator.whole(self.layouts[i])
            self.whole.add(i)
        return self.layouts[i]

    def orders(self, budget: int) -> None:
        """Try other orders on the best layouts."""
        until = self.evaluator.effort + budget
        for i in self._distinct(REFINED):
            layout = self.layouts[i]
            for name in self._allowed if layout.step_s > layout.lower_bound_s else ():
                other = self._under(layout.spec, name)
                if other is not None and self.evaluator.effort < until and self._goes_on(0.0):
                    self.evaluate(other)

    def tune(self) -> None:
        """Try the order that `auto` finds on the best layouts that are small enough.

        Where `auto` is pinned, it is tried on layouts of any size. Then layouts with all pins are ranked.
        """
        pinned = self._allowed == (AUTO,)
        for i in self._distinct(REFINED if pinned else TUNED) if AUTO in self._allowed else ():
            layout = self.layouts[i]
            modules = self.evaluator.question.topology(layout.spec).modules.values()
            actions = 2 * sum(len(module.stages) * module.microbatches for module in modules)
            slower = layout.step_s > layout.lower_bound_s
            if pinned or (actions <= TUNED_AT_MOST and slower and self._goes_on(0.0)):
                for costs in self._costs(layout.spec):
                    self.evaluate(self._tuned(layout.spec, costs))
        self.pins = self.evaluator.question.pins

    @property
    def _allowed(self) -> Sequence[str]:
        """The orders that layouts may have."""
        return self.evaluator.question.pins.among(JOB, "schedule", SCHEDULES)

    def _costs(self, spec: JobSpec) -> Iterator[Costs]:
        """Yield the costs by which `auto` looks for an order: the true ones, and a unit for each layer.

        Its search is greedy, so neither finds the better order always.
        """
        question = self.evaluator.question
        step = step_of(question.topology(spec), question.samples)
        yield even_costs(step, question.machine)
        yield assumed(step.topology)

    def _tuned(self, spec: JobSpec, costs: Costs) -> JobSpec:
        """Return a layout under `auto`, with the costs and the cap on memory that its order depends on."""
        memory_gb = self.evaluator.question.memory_bytes / GB
        schedule = attrs.evolve(spec.schedule, name=AUTO, memory_gb=memory_gb, costs=costs)
        return attrs.evolve(spec, schedule=schedule)

    def _under(self, spec: JobSpec, name: str) -> JobSpec | None:
        """Return a layout under another order; None if that is illegal, or the same."""
        if name in ONE_ORDER | {AUTO, spec.schedule.name}:
            return None
        other = attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, name=name))
        return None if problems_of(other, self.evaluator.question.facts) else other

    def fit(self, count: int) -> list[int]:
        """Return the numbers of so many of the best layouts whose memory is known to be enough."""
        while True:
            ranked = self._ranked()[:count]
            unknown = next((i for i in ranked if i not in self.fitting), None)
            if unknown is None:
                return ranked
            self._fits(unknown)

    def _fits(self, i: int) -> bool:
        """Whether the memory of a layout is enough."""
        if i not in self.fitting:
            self.layouts[i] = self.evaluator.fitted(self.layouts[i])
            self.fitting.add(i)
        return self.layouts[i].kind == SLOWER

    def measure(self, i: int) -> Layout:
        """Return a layout with its memory if that is enough, or else with the reason."""
        if self._fits(i) and not self.layouts[i].peak_bytes:
            self.layouts[i] = self.evaluator.measured(self.layouts[i])
        return self.layouts[i]

    def confirm(self, shown: int, confirmed: int) -> list[Layout]:
        """Return so many of the best layouts of different kinds (`kind_of`), the fastest first.

        The first `confirmed` of them are as `simulate` times them, the others as in lockstep, which is no less. After
        `CONFIRMED_MOST` it is the best of those that were confirmed, if any fits: others that seem faster are left out.
        """
        while True:
            ranked = self._distinct(shown)
            i = next((i for i in ranked[:confirmed] if i not in self.confirmed), None)
            if i is None:
                return [self.measure(i) for i in ranked]
            best = self._best_confirmed() if len(self.confirmed) >= CONFIRMED_MOST else None
            if best is not None:
                slower = (i for i in ranked if self.layouts[i].step_s >= self.layouts[best].step_s)
                return [self.measure(i) for i in dict.fromkeys((best, *slower))]
            self.layouts[i] = self.evaluator.confirmed(self.layouts[i])
            self.confirmed.add(i)

    def _best_confirmed(self) -> int | None:
        """Return the number of the best layout that is confirmed; None if none of them fits."""
        fits = [i for i in self.confirmed if self.layouts[i].kind == SLOWER]
        return min(fits, key=lambda i: (self.layouts[i].step_s, i), default=None)

    def _distinct(self, count: int) -> list[int]:
        """Return the numbers of so many of the best layouts of different kinds whose memory is enough."""
        while True:
            firsts: dict[object, int] = {}
            for i in self._ranked():
                firsts.setdefault(kind_of(self.layouts[i].spec, self.evaluator.main), i)
            ranked = [*firsts.values()][:count]
            if all([self._fits(i) for i in ranked]):  # noqa: C419 -- each is asked, whatever the others are
                return ranked

    def _ranked(self) -> list[int]:
        """Return the numbers of the layouts that may fit, the fastest first."""
        runs = (i for i, layout in enumerate(self.layouts) if layout.kind == SLOWER)
        fits = (i for i in runs if not self.pins.broken_by(self.layouts[i].spec))
        return sorted(fits, key=lambda i: self.layouts[i].step_s)

    def asked(self, spec: JobSpec) -> Layout:
        """Evaluate a layout that was asked for, with its memory."""
        i = self.evaluate(spec)
        return self.measure(i) if self.layouts[i].kind == SLOWER else self.layouts[i]

    def evaluate(self, spec: JobSpec) -> int:
        """Evaluate a layout for a short step, unless that has been done; return its number."""
        for i, layout in enumerate(self.layouts):
            if layout.spec == spec:
                return i
        self.layouts.append(self.evaluator.evaluated(spec))
        return len(self.layouts) - 1
