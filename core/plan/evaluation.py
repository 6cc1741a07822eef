"""Evaluation: one layout, timed by simulation, with its memory.

Seconds are those of the samples as they are, spread evenly over dp ranks and microbatches. Bytes are counted as if
every sample were the largest. So dp ranks are alike, and a thousand GPUs are simulated as a few dozen rank classes
(`lockstep`).

Of a long step at first only so many microbatches are simulated as fill the pipelines twice; each further microbatch
adds the time of the busiest rank. Of many dp ranks only so many are simulated as make a whole pattern of messages
between modules; the others repeat it at the same times. A layout that the plan shows in the end is confirmed:
`simulate` times all microbatches, and the memory of its fullest ranks counts with their messages (`fullest`); a step of
more than `SIMULATED_MOST` actions keeps the numbers of the short one.

Where microbatches have a limit of tokens, the samples are cut for each layout as the job cuts them. That gives the
number of microbatches. Then the step is that of a job which counts as many, each of full cells (`even`). Its memory is
that of the most microbatches that a step may have.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.placement import size_of
from mimogrid.core.job.schedules import AUTO, GPIPE
from mimogrid.core.job.spec import BatchSpec, GridSpec, JobSpec
from mimogrid.core.job.tokens import lanes_of, tokens_per_cell
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan.layouts import ILLEGAL, SLOWER, TOO_LARGE, Layout, Question, needs, shown
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.pricing.even import even_costs
from mimogrid.core.pricing.flops import model_flops
from mimogrid.core.pricing.footprint import fullest_cell
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.cuts import cuts_of
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.schedule.work import work_of
from mimogrid.core.simulate.fullest import Fullest, bounds_of_fullest, fullest_ranks
from mimogrid.core.simulate.lockstep import lockstep, lower_bound_s
from mimogrid.core.simulate.simulation import rank_classes_of, simulate
from mimogrid.core.step.cells import samples_per_cell
from mimogrid.core.step.routes import Routes
from mimogrid.core.step.step import SampleSizes, Step, step_of
from mimogrid.core.topology.topology import Topology


SIMULATED_MOST = 100_000
"""Actions of all rank classes. A larger step would be simulated for more than some seconds."""
WHOLE_WORLD = 64
"""Ranks. Of smaller worlds all are simulated."""
LOOKED_AT, CONFIRMED_AT = 8, 64
"""Ranks that host the same stages of which the memory is looked at, and as many of a layout that is confirmed. Samples
are alike, so ranks differ by the rows that they exchange."""
LOWERED = 4
"""Ranks of a module that are lowered for the memory of a layout that is not confirmed."""
FOLDED_AT_MOST = 2_048
"""Ranks. Of more, whose dp ranks make no pattern, no rank classes are looked for."""
WHOLE = frozenset({GPIPE, AUTO})
"""Orders that a short step says nothing of: GPipe holds all microbatches, and `auto` finds another order for fewer."""


@attrs.define(eq=False)
class Evaluator:
    """Evaluates layouts of a job around its `main` module; `effort` counts the actions that it has simulated."""

    question: Question
    main: str
    simulated: int = 0
    effort: int = 0
    _orders: dict[object, Order] = attrs.field(factory=dict[object, Order], alias="orders")
    """By everything that an order depends on."""
    _sizes: tuple[SampleSizes, ...] = attrs.field(default=(), init=False)
    """What the samples are in every module: the same in every layout."""
    _largest: tuple[SampleSizes, ...] = attrs.field(default=(), init=False)
    """The same of the largest sample."""
    _full_cells: dict[int, SampleSizes] = attrs.field(factory=dict[int, SampleSizes], init=False)
    """What a cell of so many tokens has at most."""

    def evaluated(self, spec: JobSpec) -> Layout:
        """Return a layout with its time for a short step, or with the reason why it is illegal or does not fit."""
        question = self.question
        problems = problems_of(spec, question.facts)
        if problems:
            return Layout(spec=spec, kind=ILLEGAL, reason=f"illegal: {problems[0]}")
        topology = question.topology(spec)
        if topology.world_size > question.gpus:
            reason = f"needs {topology.world_size} GPUs of {question.gpus}"
            return Layout(spec=spec, kind=TOO_LARGE, reason=reason)
        try:
            if topology.tokens_per_cell and spec.schedule.memory_gb is not None:
                self._order(topology)  # that of the most microbatches fits, too
            return self._timed(self._even(spec), short=True)
        except PlanError as error:
            return Layout(spec=spec, kind=TOO_LARGE, reason=f"does not fit: {error.problems[0].message}")

    def whole(self, layout: Layout) -> Layout:
        """Return a layout that was timed by a short step as it is timed by its whole step."""
        timed = self._timed(self._even(layout.spec), short=False)
        return attrs.evolve(timed, peak_bytes=layout.peak_bytes, lockstep_s=layout.lockstep_s)

    @functools.cached_property
    def _useful_s(self) -> float:
        """Seconds that one GPU would need for the operations of the model alone."""
        step = step_of(self.question.topology(self.question.spec), self.question.samples)
        return sum(model_flops(step).values()) / self.question.machine.flops

    def perturbed(self, layout: Layout, question: Question) -> float:
        """Return how many times as long a layout takes for another question, by steps in lockstep."""
        other = Evaluator(question, self.main, orders=self._orders)
        seconds = other.evaluated(layout.spec).step_s
        self.effort += other.effort
        return seconds / layout.lockstep_s if layout.lockstep_s else 0.0

    def fitted(self, layout: Layout) -> Layout:
        """Return a layout, which is too large if its fullest rank holds too much in a short step.

        If that is so even without messages, these are left out of what it needs.
        """
        program, whole = self._short(layout)
        least, most = bounds_of_fullest(program, whole, each=LOOKED_AT)
        if most <= self.question.memory_bytes:
            return layout
        found = self._holding(layout, least, program.topology)
        return found if found.kind == TOO_LARGE else self._with_memory(layout, program, whole)

    def measured(self, layout: Layout) -> Layout:
        """Return a layout with the memory of a short step; it is too large if its fullest rank holds too much."""
        return self._with_memory(layout, *self._short(layout))

    def _short(self, layout: Layout) -> tuple[Program, Topology | None]:
        """Return the program of a short step, with the whole topology if it is that of some of the dp ranks."""
        topology = self.question.topology(layout.spec)
        short = _shortened(_fullest(layout.spec, topology))
        times = _times_narrower(short)
        return self._program(layout.spec, short, times), topology if times > 1 else None

    def _with_memory(
        self, layout: Layout, program: Program, whole: Topology | None, *, closely: bool = False
    ) -> Layout:
        each, lowered = (CONFIRMED_AT, None) if closely else (LOOKED_AT, LOWERED)
        fullest = fullest_ranks(program, whole, each=each, lowered=lowered)
        return self._holding(layout, fullest, program.topology)

    def _holding(self, layout: Layout, fullest: Mapping[str, Fullest], topology: Topology) -> Layout:
        """Return a layout whose fullest ranks hold so much, which may be too large."""
        most = {name: each.bytes for name, each in fullest.items()}
        largest, has = max(most, key=most.__getitem__), self.question.memory_bytes
        if most[largest] <= has:
            return attrs.evolve(layout, peak_bytes=most)
        stage = fullest[largest].stage(topology, largest)
        reason = f"does not fit: {needs(stage, most[largest], has)}"
        return attrs.evolve(layout, kind=TOO_LARGE, reason=reason, peak_bytes=most)

    def confirmed(self, layout: Layout) -> Layout:
        """Return a layout with its memory and as `simulate` times it: what a job promises that is written.

        A step that is too large for that keeps the numbers of the short one.
        """
        even = self._even(layout.spec)
        times = _times_narrower(even.timed)
        program = self._program(even.spec, even.timed, times)
        if _is_large(program):
            return layout
        classes = rank_classes_of(program, even.costs)
        if _actions(program, classes.members) > SIMULATED_MOST:
            return layout
        layout = self._with_memory_of_all(layout, program, even.timed, times)
        if layout.kind == TOO_LARGE:
            return layout
        timeline = simulate(program, even.costs, classes=classes)
        self.simulated += 1
        busy_s, bound_s = times * math.fsum(timeline.busy_s.values()), timeline.lower_bound_s
        return self._rated(layout, even.step, timeline.step_s, busy_s, bound_s)

    def _with_memory_of_all(self, layout: Layout, program: Program, timed: JobSpec, times: int) -> Layout:
        """Return a layout with the memory of the fullest step (`_fullest`); `program` is for `timed`.

        If that is too large, it keeps the memory of a short step.
        """
        whole = self.question.topology(layout.spec)
        most = _fullest(layout.spec, whole)
        if most != timed:
            program = self._program(layout.spec, most, times)
            if _is_large(program):
                return layout
        return self._with_memory(layout, program, whole if times > 1 else None, closely=True)

    def _rated(self, layout: Layout, step: Step, step_s: float, busy_s: float, bound_s: float) -> Layout:
        """Return a layout with the seconds of its step, those that all its ranks compute in it, and its lower bound."""
        gpus, active = self.question.gpus, len(step.topology.ranks)
        rate = 1 / (step_s * gpus) if step_s else 0.0
        return attrs.evolve(
            layout,
            step_s=step_s,
            tokens_per_s_per_gpu=_tokens_of(step) * rate,
            active=active,
            bubble=1 - busy_s / (step_s * active) if step_s else 0.0,
            mfu=self._useful_s * rate * self.question.machine.efficiency,
            exchange_s=(busy_s - self._useful_s) / gpus,
            lower_bound_s=bound_s,
        )

    def _timed(self, even: "_Even", *, short: bool) -> Layout:
        """Time a layout, by a short step if asked for; each microbatch beyond adds the time of the busiest rank."""
        simulated = _shortened(even.timed) if short else even.timed
        times = _times_narrower(simulated)
        program = self._program(even.spec, simulated, times)
        timed = lockstep(program, even.costs)
        self.simulated += 1
        self.effort += sum(len(computes) for computes in timed.computes)
        count, few = even.timed.batch.microbatches, simulated.batch.microbatches
        more = max(timed.busy_s, default=0.0) * (count - few) / few
        step_s = timed.step_s + more
        both = zip(timed.busy_s, timed.rank_classes, strict=True)
        busy = times * math.fsum(s * len(ranks) for s, ranks in both)
        work = dict(_work(even.step.topology, even.costs))
        whole = math.fsum(work.values())
        share = 1 - work[self.main] / whole if whole else 0.0
        layout = Layout(spec=even.spec, kind=SLOWER, reason="", encoder_share=share, lockstep_s=step_s)
        bound_s = lower_bound_s(program, even.costs, timed) + more
        return self._rated(layout, even.step, step_s, busy * count / few, bound_s)

    def with_padding(self, layout: Layout) -> Layout:
        """Return a layout with the part of its positions that rounds rows up."""
        step = self._step(self.question.topology(layout.spec))
        used = math.fsum(each for of in step.sizes for each in of.positions.values())
        computed = math.fsum(
            math.prod(step.shape(module.name, dp_rank, k))
            for module in step.topology.modules.values()
            for dp_rank in range(module.dp_size)
            for k in range(module.microbatches)
        )
        return attrs.evolve(layout, padding=1 - used / computed if computed else 0.0)

    def _even(self, spec: JobSpec) -> "_Even":
        """Return what of a layout is timed."""
        topology, machine = self.question.topology(spec), self.question.machine
        step = self._step(topology)
        costs = even_costs(step, machine)
        if topology.tokens_per_cell and topology.balances and spec.schedule.costs is None:
            # `simulate` assigns samples by the costs that it assumes. That may give another number of microbatches.
            schedule = attrs.evolve(spec.schedule, costs=costs)
            step = self._step(self.question.topology(attrs.evolve(spec, schedule=schedule)))
        return _Even(step, costs, spec, _counted(spec, step.topology.most_microbatches))

    def _step(self, topology: Topology) -> Step:
        """Return the step of the samples as they are, cut by tokens and assigned by cost as the job asks for."""
        if not self._sizes:
            sizes = step_of(topology, self.question.samples).sizes
            self._sizes = tuple(sizes)
        step = Step(topology, self.question.samples, (), self._sizes)
        if topology.tokens_per_cell:
            step = step.cut_by_tokens()
        return Balance(topology).assigned(step) if topology.balances else step

    def _program(self, spec: JobSpec, timed: JobSpec, times: int = 1) -> Program:
        """Return the program of an even step of a layout, as `timed` counts it, on so many times fewer dp ranks."""
        whole, schedule = self.question.topology, spec.schedule
        topology = whole(_narrowed(timed, times) if times > 1 else timed)
        # Only an order that depends on memory depends on how many dp ranks share it, and on a limit of tokens.
        by_memory = schedule.name == AUTO or schedule.memory_gb is not None
        limited = spec.batch.tokens_per_microbatch > 0
        of_order = topology
        if by_memory and limited:
            of_order = whole(spec).with_microbatches(timed.batch.microbatches)
        elif by_memory and times > 1:
            of_order = whole(timed)
        samples, sizes = self._full(spec, topology) if limited else self._as_large(topology)
        return Program(self._order(of_order), Routes(Step(topology, samples, (), sizes)))

    def _as_large(self, topology: Topology) -> tuple[tuple[Sample, ...], tuple[SampleSizes, ...]]:
        """Return the samples of a step, each as large as the largest, with their sizes."""
        count = topology.spec.batch.global_size
        if not self._largest:
            self._largest = step_of(topology, self.question.largest[:1]).sizes
        return self.question.largest[:1] * count, self._largest * count

    def _full(self, spec: JobSpec, topology: Topology) -> tuple[tuple[Sample, ...], tuple[SampleSizes, ...]]:
        """Return the samples of a step, each of which stands for a full cell of a layout, with their sizes."""
        cell, count = tokens_per_cell(spec), topology.spec.batch.global_size
        if cell not in self._full_cells:
            self._full_cells[cell] = fullest_cell(self._step(self.question.topology(spec)))
        return self.question.samples[:1] * count, (self._full_cells[cell],) * count

    def _order(self, topology: Topology) -> Order:
        """Return the order of a layout. Layouts with equal stages that share ranks alike have the same order.

        Only where its last backwards are cut differs between grids, with the buckets of gradients.
        """
        schedule = topology.spec.schedule
        work = work_of(topology, training=True, splits=True)
        counts = tuple(module.microbatches for module in topology.modules.values())
        key: tuple[object, ...] = (
            schedule.name,
            tuple(topology.stages),
            counts,
            work.backward,
            work.gradients,
            work.split,
            work.conflicts,
        )
        if schedule.name == AUTO or schedule.memory_gb is not None:
            splits = tuple(module.split for module in topology.spec.modules.values())
            key = *key, shown(topology.spec), splits, repr(schedule.costs)
        if key not in self._orders:
            self._orders[key] = order_of(topology)
            return self._orders[key]
        order = self._orders[key]
        cuts = cuts_of(topology, order.actions)
        if cuts == order.cuts:
            return order
        key = *key, tuple(cuts.items())
        if key not in self._orders:
            self._orders[key] = attrs.evolve(order, cuts=cuts)
        return self._orders[key]


@attrs.frozen(eq=False)
class _Even:
    """The even step of a layout: its samples as they are, with their mean costs, the layout, and as it is timed.

    `timed` counts its microbatches, whether the layout does or has a limit of tokens.
    """

    step: Step
    costs: Costs
    spec: JobSpec
    timed: JobSpec


def _counted(spec: JobSpec, count: int) -> JobSpec:
    """Return a layout as one of so many microbatches of full cells, if it has a limit of tokens."""
    if not spec.batch.tokens_per_microbatch:
        return spec
    return attrs.evolve(spec, batch=BatchSpec(global_size=count * lanes_of(spec), microbatches=count))


def _fullest(spec: JobSpec, topology: Topology) -> JobSpec:
    """Return a layout as one of which every step has the most that one of its own may have.

    Under a limit of tokens that are the most microbatches. Where samples are assigned by cost, every cell has as many
    as the fullest of an even cut.
    """
    if topology.tokens_per_cell or not topology.balances:
        return _counted(spec, topology.most_microbatches)
    cells = math.prod(topology.cell_grid)
    count = cells * samples_per_cell(spec.batch.global_size, cells)
    return attrs.evolve(spec, batch=attrs.evolve(spec.batch, global_size=count))


def _shortened(spec: JobSpec) -> JobSpec:
    """Return the job with fewer microbatches of the same size, enough to fill and drain its pipelines twice."""
    count, modules = spec.batch.microbatches, spec.modules.values()
    deep = 2 * sum(module.grid.pp for module in modules)
    fitting = (few for few in range(deep, count) if _divides(few, spec))
    few = count if spec.schedule.name in WHOLE else next(fitting, count)
    if few == count:
        return spec
    shorter = {
        name: attrs.evolve(m, microbatches=m.microbatches and m.microbatches * few // count)
        for name, m in spec.modules.items()
    }
    batch = BatchSpec(global_size=spec.batch.global_size * few // count, microbatches=few)
    return attrs.evolve(spec, modules=shorter, batch=batch)


def _divides(few: int, spec: JobSpec) -> bool:
    """Whether a step consists of repetitions of so many microbatches, for every module, and these fill its chunks."""
    count, modules = spec.batch.microbatches, spec.modules.values()
    each = [
        ((module.microbatches or count) * few, module.grid.pp if module.chunks > 1 else 1)
        for module in modules
    ]
    return count % few == 0 and all(own % (count * multiple) == 0 for own, multiple in each)


def _times_narrower(spec: JobSpec) -> int:
    """Return how many times fewer dp ranks of every module, with as many times fewer samples, take as long for a step.

    Then all dp ranks have as much to do as before, the same ones exchange messages, and where any are summed or
    gathered over, there are at least two.
    """
    modules = spec.modules.values()
    grids = [module.grid for module in modules]
    if max((grid.offset or 0) + size_of(grid) for grid in grids) <= WHOLE_WORLD:
        return 1
    samples = [
        spec.batch.global_size // (module.microbatches or spec.batch.microbatches) for module in modules
    ]
    common = math.gcd(*(grid.dp for grid in grids), *(grid.offset or 0 for grid in grids), *samples)
    widest = max(grid.tp * grid.cp for grid in grids)

    def keeps(grid: GridSpec, times: int) -> bool:
        """Whether dp ranks and copies of experts are left to share, and stages begin with whole dp ranks."""
        ranks, sharing = grid.tp * grid.cp * grid.dp, grid.expert_tp * grid.ep
        copies, left = divmod(ranks // times, sharing)
        alone = copies == 1 < ranks // sharing
        return grid.dp > times and not left and not alone and ranks // times % widest == 0

    fitting = (
        times
        for times in range(common, 1, -1)
        if common % times == 0 and all(keeps(grid, times) for grid in grids)
    )
    return next(fitting, 1)


def _narrowed(spec: JobSpec, times: int) -> JobSpec:
    """Return the job with so many times fewer dp ranks, and samples."""
    modules = {
        name: attrs.evolve(
            module,
            grid=attrs.evolve(
                module.grid, dp=module.grid.dp // times, offset=(module.grid.offset or 0) // times
            ),
        )
        for name, module in spec.modules.items()
    }
    batch = attrs.evolve(spec.batch, global_size=spec.batch.global_size // times)
    return attrs.evolve(spec, modules=modules, batch=batch, world_size=None)


def _is_large(program: Program) -> bool:
    """Whether a program is not simulated as a whole: it has too many actions even if it has the fewest classes."""
    firsts = (ranks[0] for ranks in program.topology.ranks_by_stages.values())
    return _actions(program, firsts) > SIMULATED_MOST or len(program.topology.ranks) > FOLDED_AT_MOST


def _actions(program: Program, ranks: Iterable[int]) -> int:
    """Return about how many actions some ranks have together: around a compute action, and around a collective."""
    computing, collectives = 6, 2
    return sum(
        collectives * len(program.collectives(rank))
        + computing * sum(len(program.order.of(info.stage)) for info in program.topology.role(rank).stages)
        for rank in ranks
    )


def _tokens_of(step: Step) -> int:
    """Return the positions in use of all language sequences of a step; without text, of all that have a loss."""
    names = step.topology.graph.texts or tuple(
        n for n, m in step.topology.modules.items() if m.model.has_loss
    )
    return sum(step.rows_start[name][-1] for name in names)


def _work(topology: Topology, costs: Costs) -> Iterator[tuple[str, float]]:
    """Yield the seconds that all ranks of each module compute in a step."""
    for name, module in topology.modules.items():
        stages = [costs.of(info.stage) for info in module.stages]
        ranks = module.grid.size // module.grid.extent("pp")
        each = math.fsum(stage.forward + stage.whole_backward for stage in stages)
        yield name, each * module.microbatches * ranks
