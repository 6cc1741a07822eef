"""Plan: the layouts of a job on so many GPUs, the fastest first, and why the others are not.

What is searched: for every module tp, cp, ep, pp with uneven splits, dp and chunks (`plan_options`); places beside
each other or shared (`plan_walk`); the number of microbatches, so their size; the order; more recomputation of the main
module where memory keeps out what would be faster. `plan_walk` gives layouts in order of their bounds, times that no
order beats. They are simulated one after another by crews of like ranks (`lockstep`), until the next bound is above the
best time: then nothing that was looked at is faster. A budget may end this earlier, and `gap` says by how much the
winner could be beaten at most. Other orders are tried on the best layouts.

Seconds are those of the samples as they are, spread evenly over lanes and microbatches; bytes are counted as if
every sample were the largest. So lanes are alike, and a thousand GPUs are simulated as a few dozen crews. At first so
many microbatches of a long step are simulated as fill the pipelines twice; the others go on at the pace of the busiest
rank. What is told in the end is confirmed: all microbatches are simulated, and of each module the rank that holds most
is lowered, so that its messages count, too. Memory is estimated for 1F1B along the walk.

GPUs that idle are paid for: the fastest layout of all is the one with most tokens per second and allocated GPU. The
same job gives the same plan everywhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.costs import Costs
from mimogrid.core.errors import PlanError
from mimogrid.core.flops import model_flops
from mimogrid.core.layout import place
from mimogrid.core.legality import RECOMPUTES, SCHEDULES, problems_of
from mimogrid.core.lockstep import crews_of, limit_s, lockstep
from mimogrid.core.memory import bytes_in_flight, most_bytes, saved_bytes
from mimogrid.core.plan_options import Illegal, Menu, Option, menu_of
from mimogrid.core.plan_walk import BESIDE, Candidate, Miss, Walk, walk
from mimogrid.core.pricing import Machine, on_machine
from mimogrid.core.routes import Routes
from mimogrid.core.samples import Sample
from mimogrid.core.schedule.lower import Program
from mimogrid.core.schedule.orders import Order, order_of
from mimogrid.core.schedule.tuning import AUTO, GB
from mimogrid.core.schedule.work import work_of
from mimogrid.core.spec import BatchSpec, GridSpec, JobSpec, SourceFacts
from mimogrid.core.steps import Step, step_of
from mimogrid.core.topology import Topology, assemble


BUDGET = 300_000
"""Actions that are simulated before no further layout is begun; ranks that live alike count once."""
REFINED = 3
"""Of the best layouts, on how many other orders are tried."""
LOWERED = 4
"""What lowering an action costs, in actions that are simulated."""
TOLD = 6
"""Layouts that fit and are told."""
ONE = frozenset({"1f1b", "interleaved"})
"""Two names of one order: what interleaves is that ranks have several chunks."""
WHOLE = frozenset({"gpipe", AUTO})
TUNED = 2
"""On how many of the best layouts `auto` is tried."""
TUNED_AT_MOST = 6_000
"""Actions of a step, of all stages: `auto` tries orders of a larger one for too long."""
SHOWN = 3
"""Layouts that are told of those that do not fit, and of those that are illegal."""

BEST, SLOWER, TOO_LARGE, ILLEGAL = "best", "slower", "too large", "illegal"


@attrs.frozen(kw_only=True)
class Layout:
    """A layout of a job and what it comes to; all numbers are 0 where it cannot run.

    Attributes:
        spec: the job with this layout.
        kind: the best, slower than that, too large for the memory, or illegal.
        reason: why it is not the best, or that it is, in words.
        step_s: seconds of a step.
        tokens_per_s_per_gpu: over all GPUs that are allocated.
        active: GPUs in a grid; the other ones idle.
        bubble: part of the time of all allocated GPUs in which nothing is computed.
        encoder_share: part of all computing that is not the main module's.
        peak_bytes: per module, what the rank that needs most of those with it needs in all.
        limit_s: a time that no order of these grids beats.
    """

    spec: JobSpec
    kind: str
    reason: str
    step_s: float = 0.0
    tokens_per_s_per_gpu: float = 0.0
    active: int = 0
    bubble: float = 0.0
    encoder_share: float = 0.0
    peak_bytes: Mapping[str, float] = attrs.field(factory=dict[str, float])
    limit_s: float = 0.0


@attrs.frozen(kw_only=True)
class Plan:
    """What a search found.

    Attributes:
        layouts: those that can run, the fastest first, the job's own among them; then the largest ones that would be
            fast and do not fit, then illegal ones.
        own: the job's own layout.
        main: the module that the others lie around.
        looked_at: options and layouts that were priced by their bounds.
        simulated: programs that were simulated.
        gap: the winner takes at most this part longer than any layout that was looked at.
        nearest_miss: where nothing fits, what comes closest, in words; else empty.
    """

    layouts: tuple[Layout, ...]
    own: Layout
    main: str
    looked_at: int
    simulated: int
    gap: float
    nearest_miss: str

    @property
    def best(self) -> Layout | None:
        """The winner, if anything fits."""
        return next((layout for layout in self.layouts if layout.kind == BEST), None)


@attrs.frozen(kw_only=True, eq=False)
class Question:
    """What is asked: a legal job with the samples of one step, on so many GPUs with so much memory each.

    The precision of the machine decides on seconds and bytes, whatever the job says.
    """

    spec: JobSpec
    facts: SourceFacts
    samples: tuple[Sample, ...]
    machine: Machine
    gpus: int
    memory_bytes: float

    def topology(self, spec: JobSpec) -> Topology:
        """Return the topology of a layout of the job, in the precision of the machine."""
        return assemble(attrs.evolve(spec, precision=self.machine.precision), self.facts)

    @property
    def largest(self) -> tuple[Sample, ...]:
        """As many samples, each with the most rows and the longest text of any: what memory must be there for."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.rows)
        rows = {name: max(sample.rows.get(name, 0) for sample in self.samples) for name in names}
        length = max(sample.length for sample in self.samples)
        room = self.facts.sequence - sum(rows.values()) if self.facts.sequence else length
        return (Sample(id=0, length=min(length, max(room, 1)), rows=rows),) * len(self.samples)


def plan(question: Question, *, budget: int = BUDGET) -> Plan:
    """Search for the fastest layout."""
    step = step_of(question.topology(question.spec), question.samples)
    work = model_flops(step)
    main = max(work, key=work.__getitem__)
    menus = _menus(question, step)
    walked = _walked(question, step, menus, main)
    found = _Judged(question, main)
    least = found.candidates(walked, budget)
    looked_at = walked.looked_at
    for other in _recomputing(question, main):
        best_s = min((found.layouts[i].step_s for i in found.confirm(1, 0)), default=math.inf)
        if any(miss.bound < best_s for miss in walked.misses):
            more_step = step_of(other.topology(other.spec), other.samples)
            more = _walked(other, more_step, _menus(other, more_step), main, below=best_s)
            least = min(least, found.candidates(more, budget, other))
            looked_at += more.looked_at
    found.confirm(REFINED, budget // 3)
    found.orders(budget // 2)
    found.confirm(TOLD, budget // 3)
    own = found.own(question.spec)
    ranked = found.told
    best = ranked[0] if ranked else None
    others = [*_too_large(walked, question, best), *(f for f in found.layouts if f.kind == TOO_LARGE)][:SHOWN]
    illegal = [*_illegal(menus, question), *(f for f in found.layouts if f.kind == ILLEGAL)][:SHOWN]
    told = [_told(layout, best, own) for layout in ranked]
    mine = next((layout for layout in told if layout.spec == own.spec), _mine(own))
    rest = [layout for layout in (*others, *illegal) if layout.spec != own.spec]
    return Plan(
        layouts=(*told, *([mine] if own.kind != SLOWER else []), *rest),
        own=mine,
        main=main,
        looked_at=looked_at,
        simulated=found.simulated,
        gap=max(best.step_s / least - 1, 0.0) if best and least < best.step_s else 0.0,
        nearest_miss="" if best else _nearest(walked, found.layouts, question),
    )


def _menus(question: Question, step: Step) -> dict[str, Menu]:
    return {
        name: menu_of(
            name,
            step=step,
            machine=question.machine,
            ranks=question.gpus,
            spec=question.spec,
            facts=question.facts,
        )
        for name in question.spec.modules
    }


def _walked(
    question: Question, step: Step, menus: Mapping[str, Menu], main: str, *, below: float = math.inf
) -> Walk:
    return walk(
        menus,
        step.topology.graph,
        main,
        ranks=question.gpus,
        cap=question.memory_bytes,
        samples=len(question.samples),
        below=below,
    )


def _recomputing(question: Question, main: str) -> Iterator[Question]:
    """Yield the question with more and more recomputed in the main module."""
    module = question.spec.modules[main]
    if isinstance(module.options, Mapping):
        return
    for level in RECOMPUTES[RECOMPUTES.index(module.recompute) + 1 :]:
        modules = {**question.spec.modules, main: attrs.evolve(module, recompute=level)}
        yield attrs.evolve(question, spec=attrs.evolve(question.spec, modules=modules))


# -- judging layouts by simulation -------------------------------------------------------------------------


@attrs.define(eq=False)
class _Judged:
    """Layouts that were looked at closely: at first for a short step, those that matter for the whole one."""

    question: Question
    main: str
    layouts: list[Layout] = attrs.field(factory=list[Layout])
    whole: set[int] = attrs.field(factory=set[int])
    simulated: int = 0
    effort: int = 0
    _orders: dict[object, Order] = attrs.field(factory=dict[object, Order])
    """By all that an order depends on."""

    def candidates(self, walked: Walk, budget: int, question: Question | None = None) -> float:
        """Simulate candidates while their bounds promise anything; return the least bound of what is left."""
        until = self.effort + budget
        best = min((layout.step_s for layout in self.layouts if layout.kind == SLOWER), default=math.inf)
        for candidate in walked.candidates:
            if candidate.bound >= best:
                return best
            if self.effort >= until:
                return min(candidate.bound, walked.passed)
            layout = self.layouts[self.judge(layout_of(question or self.question, self.main, candidate))]
            if layout.kind == SLOWER:
                best = min(best, layout.step_s)
        return walked.passed

    def orders(self, budget: int) -> None:
        """Try other orders on the best layouts, and on those that are small enough the one that `auto` finds."""
        until = self.effort + budget
        for i in self._ranked()[:REFINED]:
            layout = self.layouts[i]
            if layout.step_s <= layout.limit_s:
                continue
            for name in SCHEDULES:
                other = self._under(layout.spec, name)
                if other is not None and self.effort < until:
                    self.judge(other)
        for i in self._ranked()[:TUNED]:
            layout = self.layouts[i]
            actions = 2 * sum(
                len(m.stages) * m.microbatches for m in self.question.topology(layout.spec).modules.values()
            )
            if actions <= TUNED_AT_MOST and layout.step_s > layout.limit_s:
                self.judge(self._tuned(layout.spec))

    def _tuned(self, spec: JobSpec) -> JobSpec:
        """Return a layout under `auto`, whose order goes by costs and a cap on memory: so they stand in the job."""
        step = step_of(self.question.topology(spec), self.question.samples)
        schedule = attrs.evolve(
            spec.schedule,
            name=AUTO,
            memory_gb=self.question.memory_bytes / GB,
            costs=on_machine(step, self.question.machine, spread=True),
        )
        return attrs.evolve(spec, schedule=schedule)

    def _under(self, spec: JobSpec, name: str) -> JobSpec | None:
        """Return a layout under another order, unless that is illegal, or the same."""
        if name in ONE | {AUTO, spec.schedule.name}:
            return None
        other = attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, name=name))
        return None if problems_of(other, self.question.facts) else other

    def confirm(self, count: int, budget: int) -> list[int]:
        """Weigh so many of the best layouts, and time them for the whole step; the very best in any case.

        Return the numbers of those best ones that were confirmed.
        """
        until = self.effort + budget
        while True:
            ranked = self._ranked()[:count]
            i = next((i for i in ranked if i not in self.whole), None)
            if i is None or (self.effort >= until and ranked[0] in self.whole):
                return [i for i in ranked if i in self.whole]
            self.layouts[i] = self._confirmed(self.layouts[i])
            self.whole.add(i)

    @property
    def told(self) -> list[Layout]:
        """The layouts that were confirmed, the fastest first."""
        return [self.layouts[i] for i in self._ranked() if i in self.whole]

    def _ranked(self) -> list[int]:
        fits = (i for i, layout in enumerate(self.layouts) if layout.kind == SLOWER)
        return sorted(fits, key=lambda i: self.layouts[i].step_s)

    def own(self, spec: JobSpec) -> Layout:
        """Judge the job's own layout, and confirm it."""
        i = self.judge(spec)
        if self.layouts[i].kind == SLOWER and i not in self.whole:
            self.layouts[i] = self._confirmed(self.layouts[i])
            self.whole.add(i)
        return self.layouts[i]

    def judge(self, spec: JobSpec) -> int:
        """Time a layout for a short step, unless it has been; return its number."""
        for i, layout in enumerate(self.layouts):
            if layout.spec == spec:
                return i
        self.layouts.append(self._judged(spec))
        return len(self.layouts) - 1

    def _judged(self, spec: JobSpec) -> Layout:
        question = self.question
        problems = problems_of(spec, question.facts)
        if problems:
            return Layout(spec=spec, kind=ILLEGAL, reason=f"illegal: {problems[0]}")
        topology = question.topology(spec)
        if topology.world_size > question.gpus:
            reason = f"needs {topology.world_size} GPUs of {question.gpus}"
            return Layout(spec=spec, kind=TOO_LARGE, reason=reason)
        try:
            return self._timed(spec, topology, _short(spec))
        except PlanError as error:
            return Layout(spec=spec, kind=TOO_LARGE, reason=f"does not fit: {error.problems[0].message}")

    def _confirmed(self, layout: Layout) -> Layout:
        """Return a layout with its time for the whole step and its memory, which the short one shows."""
        question, spec = self.question, layout.spec
        topology = question.topology(spec)
        peaks = self._peaks(_short(spec))
        most = {name: size for name, (_, size) in peaks.items()}
        largest = max(most, key=most.__getitem__)
        if most[largest] <= question.memory_bytes:
            return attrs.evolve(self._timed(spec, topology, spec), peak_bytes=most)
        reason = _too_much(topology, largest, *peaks[largest], question.memory_bytes)
        return attrs.evolve(layout, kind=TOO_LARGE, reason=reason, peak_bytes=most)

    def _timed(self, spec: JobSpec, topology: Topology, played: JobSpec) -> Layout:
        """Time so many microbatches of a layout as are `played`; the others go on at the pace of the busiest rank."""
        question = self.question
        step = step_of(topology, question.samples)
        costs = on_machine(step, question.machine, spread=True)
        program = self._program(played)
        timed = lockstep(program, costs)
        self.simulated += 1
        self.effort += sum(len(beats) for beats in timed.beats)
        count, short = spec.batch.microbatches, played.batch.microbatches
        more = max(timed.busy_s, default=0.0) * (count - short) / short
        step_s = timed.step_s + more
        busy = math.fsum(s * len(ranks) for s, ranks in zip(timed.busy_s, timed.crews, strict=True))
        work = dict(_work(topology, costs))
        whole = math.fsum(work.values())
        rates = 1 / (step_s * question.gpus) if step_s else 0.0
        return Layout(
            spec=spec,
            kind=SLOWER,
            reason="",
            step_s=step_s,
            tokens_per_s_per_gpu=tokens_of(step) * rates,
            active=len(topology.ranks),
            bubble=1 - busy * count / short * rates,
            encoder_share=1 - work[self.main] / whole if whole else 0.0,
            limit_s=limit_s(program, costs, timed) + more,
        )

    def _program(self, played: JobSpec) -> Program:
        """Return the program of a step with the largest samples."""
        topology = self.question.topology(played)
        step = step_of(topology, self.question.largest[: played.batch.global_size])
        return Program(self._order(topology), Routes(step))

    def _order(self, topology: Topology) -> Order:
        """Return the order of a layout; it is the same for all with as many stages on as many ranks in common."""
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
            work.rivals,
        )
        if schedule.name == AUTO or schedule.memory_gb is not None:
            key = *key, shown(topology.spec), tuple(module.split for module in topology.spec.modules.values())
        if key not in self._orders:
            self._orders[key] = order_of(topology)
        return self._orders[key]

    def _peaks(self, played: JobSpec) -> dict[str, tuple[int, int]]:
        """Return, per module, the rank that holds most of those with it, and how many bytes that is.

        Of ranks that host the same stages the one with most samples counts; of several such the one that keeps most
        for microbatches in flight is lowered, and its messages are counted.
        """
        program = self._program(played)
        topology = program.topology
        kept_most = {
            rank: bytes_in_flight(program, rank)
            for rank in (_fullest(program, ranks) for ranks in crews_of(topology))
        }
        peaks: dict[str, tuple[int, int]] = {}
        known: dict[int, int] = {}
        for name, module in topology.modules.items():
            rank = max(
                (rank for rank in kept_most if rank in module.grid), key=lambda rank: (kept_most[rank], -rank)
            )
            if rank not in known:
                known[rank] = most_bytes(program, rank)
                self.effort += LOWERED * sum(len(program.order.of(i.stage)) for i in topology.stages_of(rank))
            peaks[name] = rank, known[rank]
        return peaks


def _short(spec: JobSpec) -> JobSpec:
    """Return the job with fewer microbatches of the same size, enough to fill its pipelines twice and drain them.

    GPipe holds all of them, and `auto` finds another order for fewer, so these are played whole.
    """
    count = spec.batch.microbatches
    modules = spec.modules.values()
    deep = 2 * sum(module.grid.pp for module in modules)
    own = [module.microbatches or count for module in modules]
    for few in range(deep, count):
        whole = count % few == 0 and all(m * few % count == 0 for m in own)
        if (
            spec.schedule.name not in WHOLE
            and whole
            and all(m.chunks == 1 or few % m.grid.pp == 0 for m in modules)
        ):
            shorter = {
                name: attrs.evolve(m, microbatches=m.microbatches and m.microbatches * few // count)
                for name, m in spec.modules.items()
            }
            batch = BatchSpec(global_size=spec.batch.global_size * few // count, microbatches=few)
            return attrs.evolve(spec, modules=shorter, batch=batch)
    return spec


def tokens_of(step: Step) -> int:
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


def _too_much(topology: Topology, module: str, rank: int, size_bytes: int, cap: float) -> str:
    stage = f"{module}.{topology.modules[module].grid.position_along('pp', rank)}"
    return f"does not fit: {needs(stage, size_bytes, cap)}"


def _fullest(program: Program, ranks: tuple[int, ...]) -> int:
    """Return the rank, of some that host the same stages, that keeps most of a microbatch."""
    step = program.routes.step
    stages = [info.stage for info in program.topology.stages_of(ranks[0])]
    modules = [program.topology.modules[stage.module] for stage in stages]

    def saved(rank: int) -> int:
        lanes = (module.lane_of(rank) for module in modules)
        return sum(saved_bytes(step, stage, lane, 0) for stage, lane in zip(stages, lanes, strict=True))

    return max(ranks, key=saved)


def needs(what: str, size_bytes: float, cap: float) -> str:
    """Say by how much something is too large.

    >>> needs("language.0", 93.1e9, 80e9)
    'language.0 needs 93.1 GB of 80.0 GB per GPU, short by 13.1 GB'
    """
    short = (size_bytes - cap) / 1e9
    return f"{what} needs {size_bytes / 1e9:.1f} GB of {cap / 1e9:.1f} GB per GPU, short by {short:.1f} GB"


# -- layouts as jobs ---------------------------------------------------------------------------------------


def layout_of(question: Question, main: str, candidate: Candidate) -> JobSpec:
    """Return the job with the layout of a candidate; modules that it does not name lie at rank 0, on one rank."""
    options = {main: candidate.main} | {name: p.option for name, p in candidate.others.items()}
    offsets = _offsets(question, candidate)
    count = candidate.main.microbatches
    modules = {
        name: attrs.evolve(
            module,
            grid=attrs.evolve(options[name].grid, offset=offsets[name])
            if name in options
            else GridSpec(offset=0),
            chunks=options[name].chunks if name in options else 1,
            split=_uneven(options.get(name)),
            microbatches=_own_count(options.get(name), count),
        )
        for name, module in question.spec.modules.items()
    }
    order = "interleaved" if candidate.main.chunks > 1 else "1f1b"
    return attrs.evolve(
        question.spec,
        modules=modules,
        batch=BatchSpec(global_size=len(question.samples), microbatches=count),
        schedule=attrs.evolve(question.spec.schedule, name=order, costs=None),
        world_size=question.gpus,
    )


def _uneven(option: Option | None) -> tuple[int, ...] | None:
    return None if option is None or len(set(option.split)) == 1 else option.split


def _own_count(option: Option | None, count: int) -> int | None:
    return None if option is None or option.microbatches == count else option.microbatches


def _offsets(question: Question, candidate: Candidate) -> Mapping[str, int]:
    """Lay modules behind each other, those with most tp first, each beginning at a multiple of it if there is room."""
    beside = [(name, p.option) for name, p in candidate.others.items() if p.place == BESIDE]
    beside.sort(key=lambda each: -each[1].shape.tp * each[1].shape.cp)
    room = question.gpus - candidate.ranks
    offsets = {candidate.main.module: 0} | {n: 0 for n, p in candidate.others.items() if p.place != BESIDE}
    end = candidate.main.ranks
    for name, option in beside:
        gap = -end % (option.shape.tp * option.shape.cp)
        gap = gap if gap <= room else 0
        offsets[name], room, end = end + gap, room - gap, end + gap + option.ranks
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


# -- reasons -----------------------------------------------------------------------------------------------


def _told(layout: Layout, best: Layout | None, own: Layout) -> Layout:
    """Say how a layout that fits stands to the best one."""
    assert best is not None
    reason = "the fastest" if layout is best else f"{layout.step_s / best.step_s:.2f} x slower"
    told = attrs.evolve(layout, kind=BEST if layout is best else SLOWER, reason=reason)
    return _mine(told) if layout.spec == own.spec else told


def _mine(layout: Layout) -> Layout:
    return attrs.evolve(layout, reason=f"the job's own layout: {layout.reason}")


def _too_large(walked: Walk, question: Question, best: Layout | None) -> Iterator[Layout]:
    """Yield layouts that would be faster than the best one if they fitted, each module once in a shape."""
    told: set[str] = set()
    for miss in walked.misses:
        if best is not None and miss.bound >= best.step_s:
            continue
        option = miss.candidate.main
        if (kind := f"{option.shape} {option.pp}") not in told:
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


def _nearest(walked: Walk, judged: Sequence[Layout], question: Question) -> str:
    """Say what comes closest where nothing fits."""
    if walked.misses:
        return _missing(min(walked.misses, key=lambda miss: miss.needs), question.memory_bytes)
    return judged[0].reason if judged else "no grid is legal on so few GPUs"


def _illegal(menus: Mapping[str, Menu], question: Question) -> Iterator[Layout]:
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
