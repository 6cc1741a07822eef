"""Evaluation: one layout, timed by simulation, with its memory.

Seconds are those of the samples as they are, spread evenly over dp ranks and microbatches. Bytes are counted as if
every sample were the largest. So dp ranks are alike, and a thousand GPUs are simulated as a few dozen rank classes
(`lockstep`).

Of a long step at first only so many microbatches are simulated as fill the pipelines twice; each further microbatch
adds the time of the busiest rank. A layout that the plan shows in the end is confirmed: all microbatches are simulated,
and for each module the rank that holds most is lowered, so that its messages count, too.
"""

import math
from collections.abc import Iterator

import attrs

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.schedules import AUTO, GPIPE
from mimogrid.core.job.spec import BatchSpec, JobSpec
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan.layouts import ILLEGAL, SLOWER, TOO_LARGE, Layout, Question, needs, shown
from mimogrid.core.pricing.footprint import ranks_by_stages
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.schedule.work import work_of
from mimogrid.core.simulate.lockstep import lockstep, lower_bound_s
from mimogrid.core.simulate.memory import bytes_in_flight, most_bytes, saved_bytes
from mimogrid.core.step.routes import Routes
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.topology import Topology


LOWERED = 4
"""How many simulated actions lowering one action counts as."""
WHOLE = frozenset({GPIPE, AUTO})
"""Orders that a short step says nothing of: GPipe holds all microbatches, and `auto` finds another order for fewer."""


@attrs.define(eq=False)
class Evaluator:
    """Evaluates layouts of a job around its `main` module; `effort` counts the actions that it has simulated."""

    question: Question
    main: str
    simulated: int = 0
    effort: int = 0
    _orders: dict[object, Order] = attrs.field(factory=dict[object, Order])
    """By everything that an order depends on."""

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
            return self._timed(spec, topology, _shortened(spec))
        except PlanError as error:
            return Layout(spec=spec, kind=TOO_LARGE, reason=f"does not fit: {error.problems[0].message}")

    def confirmed(self, layout: Layout) -> Layout:
        """Return a layout with its time for the whole step, and its memory, for which the short step is enough."""
        question, spec = self.question, layout.spec
        topology = question.topology(spec)
        peaks = self._peaks(_shortened(spec))
        most = {name: size for name, (_, size) in peaks.items()}
        largest = max(most, key=most.__getitem__)
        if most[largest] <= question.memory_bytes:
            return attrs.evolve(self._timed(spec, topology, spec), peak_bytes=most)
        reason = _too_much(topology, largest, *peaks[largest], question.memory_bytes)
        return attrs.evolve(layout, kind=TOO_LARGE, reason=reason, peak_bytes=most)

    def _timed(self, spec: JobSpec, topology: Topology, simulated: JobSpec) -> Layout:
        """Time a layout by the step of `simulated`; each microbatch beyond adds the time of the busiest rank."""
        question = self.question
        step = step_of(topology, question.samples)
        costs = on_machine(step, question.machine, spread=True)
        program = self._program(simulated)
        timed = lockstep(program, costs)
        self.simulated += 1
        self.effort += sum(len(computes) for computes in timed.computes)
        count, short = spec.batch.microbatches, simulated.batch.microbatches
        more = max(timed.busy_s, default=0.0) * (count - short) / short
        step_s = timed.step_s + more
        busy = math.fsum(s * len(ranks) for s, ranks in zip(timed.busy_s, timed.rank_classes, strict=True))
        work = dict(_work(topology, costs))
        whole = math.fsum(work.values())
        rates = 1 / (step_s * question.gpus) if step_s else 0.0
        return Layout(
            spec=spec,
            kind=SLOWER,
            reason="",
            step_s=step_s,
            tokens_per_s_per_gpu=_tokens_of(step) * rates,
            active=len(topology.ranks),
            bubble=1 - busy * count / short * rates,
            encoder_share=1 - work[self.main] / whole if whole else 0.0,
            lower_bound_s=lower_bound_s(program, costs, timed) + more,
        )

    def _program(self, spec: JobSpec) -> Program:
        """Return the program of a step with the largest samples."""
        topology = self.question.topology(spec)
        step = step_of(topology, self.question.largest[: spec.batch.global_size])
        return Program(self._order(topology), Routes(step))

    def _order(self, topology: Topology) -> Order:
        """Return the order of a layout. Layouts with equal stages that share ranks alike have the same order."""
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
            key = *key, shown(topology.spec), tuple(module.split for module in topology.spec.modules.values())
        if key not in self._orders:
            self._orders[key] = order_of(topology)
        return self._orders[key]

    def _peaks(self, spec: JobSpec) -> dict[str, tuple[int, int]]:
        """Return, per module, the rank with it that holds most, and how many bytes that is.

        Of ranks that host the same stages, the one that saves most of a microbatch counts. Of these, the one that holds
        most for microbatches in flight is lowered, and its messages are counted.
        """
        program = self._program(spec)
        topology = program.topology
        kept_most = {
            rank: bytes_in_flight(program, rank)
            for rank in (_fullest(program, ranks) for ranks in ranks_by_stages(topology).values())
        }
        peaks: dict[str, tuple[int, int]] = {}
        known: dict[int, int] = {}
        for name, module in topology.modules.items():
            hosts = [rank for rank in kept_most if rank in module.grid]
            rank = max(hosts, key=lambda rank: (kept_most[rank], -rank))
            if rank not in known:
                known[rank] = most_bytes(program, rank)
                self.effort += LOWERED * sum(
                    len(program.order.of(i.stage)) for i in topology.role(rank).stages
                )
            peaks[name] = rank, known[rank]
        return peaks


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
    return (
        count % few == 0
        and all((module.microbatches or count) * few % count == 0 for module in modules)
        and all(module.chunks == 1 or few % module.grid.pp == 0 for module in modules)
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


def _too_much(topology: Topology, module: str, rank: int, size_bytes: int, memory_bytes: float) -> str:
    """Return by how much the rank of a module that holds most holds too much, in words."""
    stage = f"{module}.{topology.modules[module].grid.position_along('pp', rank)}"
    return f"does not fit: {needs(stage, size_bytes, memory_bytes)}"


def _fullest(program: Program, ranks: tuple[int, ...]) -> int:
    """Return the rank, of some that host the same stages, that saves most of a microbatch."""
    step = program.routes.step
    stages = [info.stage for info in program.topology.role(ranks[0]).stages]
    modules = [program.topology.modules[stage.module] for stage in stages]

    def saved(rank: int) -> int:
        dp_ranks = (module.dp_rank_of(rank) for module in modules)
        return sum(
            saved_bytes(step, stage, dp_rank, 0) for stage, dp_rank in zip(stages, dp_ranks, strict=True)
        )

    return max(ranks, key=saved)
