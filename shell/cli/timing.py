"""Timing: steps simulated as the options of `simulate` ask for: under one schedule, under all, or of two jobs."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.pricing.even import even_costs, even_step
from mimogrid.core.pricing.machine import machine_for
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.schedule.layer_split import topology_of
from mimogrid.core.simulate.breakdown import idle_s, idle_s_by_rank
from mimogrid.core.simulate.fullest import Fullest
from mimogrid.core.simulate.imbalance import Imbalance, imbalance
from mimogrid.core.simulate.memory import Level, peaks
from mimogrid.core.simulate.rank_classes import RankClasses
from mimogrid.core.simulate.simulation import MANY, rank_classes_of, simulate
from mimogrid.core.simulate.timeline import Timeline
from mimogrid.core.simulate.unevenness import DurationFactors
from mimogrid.core.step.step import Step
from mimogrid.shell.cli.arguments import SimulateArgs
from mimogrid.shell.cli.fit import memory_of
from mimogrid.shell.job import costfile
from mimogrid.shell.job.jobs import Job


@attrs.frozen(eq=False)
class PricedJob:
    """A job with the costs of its stages and links, and where these are from: nothing where none were given."""

    job: Job
    costs: Costs
    origin: str


@attrs.frozen(eq=False)
class SimulatedStep:
    """One simulated step of a job.

    Attributes:
        job: the job, under the schedule that was simulated.
        origin: where its costs are from; empty where none were given.
        step: the samples of the step. On the GPUs of the job without --ragged an even step is timed (`pricing.even`).
        timeline: what every rank does when.
        idle_by_rank: seconds of idling, by rank and cause.
        peaks: the peak of memory of every rank.
        imbalance: what its ragged samples cost in their order, and assigned by cost; None where that was not asked for.
    """

    job: Job
    origin: str
    step: Step
    timeline: Timeline
    idle_by_rank: Mapping[int, Mapping[str, float]]
    peaks: Mapping[int, Level]
    imbalance: Imbalance | None = None

    @property
    def name(self) -> str:
        """The file of the job, with its folder."""
        return f"{self.job.path.parent.name}/{self.job.path.name}"

    @property
    def ranks(self) -> int:
        """How many ranks the job takes, idle ones included."""
        return self.job.topology.world_size

    @functools.cached_property
    def memory(self) -> Mapping[str, Fullest]:
        """By module, the rank that holds most if every sample is as large as the largest."""
        return memory_of(self.step, self.job.orders)

    @property
    def idle(self) -> dict[str, float]:
        """Seconds of idling by cause, summed over ranks."""
        return idle_s(self.timeline, self.idle_by_rank)

    @property
    def samples_per_s(self) -> float | None:
        """Samples a second, unless the step takes no time."""
        return self._per_s(len(self.step.samples))

    @property
    def tokens_per_s(self) -> float | None:
        """Positions in use of language sequences a second, as training counts them."""
        return self._per_s(self.step.tokens)

    @property
    def peak(self) -> tuple[int, Level]:
        """The rank that needs the most memory, and when."""
        return max(self.peaks.items(), key=lambda peak: peak[1].bytes)

    def _per_s(self, count: int) -> float | None:
        return count / self.timeline.step_s if self.timeline.step_s else None


Tell = Callable[[float, float], None]
"""Is told how much is done, and of how much."""


def drawn(job: Job, args: SimulateArgs, tell: Tell = lambda *_: None) -> list[SimulatedStep]:
    """Simulate a job once for each of the `draws`."""
    priced = _priced(job, args, schedule=args.schedule)
    steps: list[SimulatedStep] = []
    for draw in range(args.draws):
        tell(draw, args.draws)
        steps.append(_simulated(priced, args, draw))
    return steps


def under_all_schedules(
    job: Job, args: SimulateArgs, tell: Tell = lambda *_: None
) -> dict[str, SimulatedStep | tuple[Problem, ...]]:
    """Simulate a job under every schedule; where one is not legal for it, return the problems instead."""
    found: dict[str, SimulatedStep | tuple[Problem, ...]] = {}
    for name in SCHEDULES:
        tell(len(found), len(SCHEDULES))
        try:
            found[name] = _simulated(_priced(job, args, schedule=name), args)
        except PlanError as error:
            found[name] = error.problems
    return found


def compared(job: Job, other: Job, args: SimulateArgs) -> dict[str, SimulatedStep]:
    """Simulate two jobs; return both by name. The second has the second costs file, if there are two."""
    pairs = enumerate((job, other))
    found = [_simulated(_priced(one, args, schedule=args.schedule, which=i), args) for i, one in pairs]
    first, second = (step.name for step in found)
    if first == second:
        first, second = f"{first} (first)", f"{second} (second)"
    return {first: found[0], second: found[1]}


def _priced(job: Job, args: SimulateArgs, *, schedule: str | None, which: int = 0) -> PricedJob:
    """Give a job its schedule and the costs that are asked for, by which it may also be ordered.

    `which` counts the jobs that are compared; a single costs file serves both. Raises PlanError where anything is not
    legal.
    """
    changes: dict[str, Any] = {"name": schedule} if schedule else {}
    if args.costs:
        path = args.costs[min(which, len(args.costs) - 1)]
        costs = costfile.read(path, job.topology)
        return PricedJob(_under(job, **changes, costs=costs), costs, _origin(costs, str(path)))
    machine = machine_for(job.spec)
    if machine is not None:
        step = job.step(args.step)
        costs = on_machine(step, machine) if args.ragged else even_costs(step, machine)
        if args.gpu or not job.spec.schedule.costs:
            changes["costs"] = costs
        return PricedJob(_under(job, **changes), costs, f"assumed: {machine}")
    job = _under(job, **changes)
    if job.spec.schedule.costs:
        costs = job.spec.schedule.costs
        return PricedJob(job, costs, _origin(costs, "schedule.costs of the job"))
    return PricedJob(job, assumed(job.topology), "")


def _under(job: Job, **changes: Any) -> Job:
    """Return a job with changes of its schedule. Raises PlanError where they are not legal for it."""
    facts = job.topology.source
    spec = attrs.evolve(job.spec, schedule=attrs.evolve(job.spec.schedule, **changes))
    return attrs.evolve(job, topology=topology_of(spec, facts))


def _origin(costs: Costs, place: str) -> str:
    """Say where costs are from: first what they say themselves."""
    return f"{costs.origin}, from {place}" if costs.origin else f"from {place}"


def _simulated(priced: PricedJob, args: SimulateArgs, draw: int = 0) -> SimulatedStep:
    """Simulate a step. Draw 0 is the step as asked for; each further one has the next seed and, if ragged, samples."""
    job, costs = priced.job, priced.costs
    step = job.step(args.step + draw * args.ragged)
    timed = even_step(step) if job.spec.gpu.name and not args.ragged else step
    factors = DurationFactors(timed, ragged=args.ragged, jitter=args.jitter, seed=args.seed + draw)
    uneven = factors if args.ragged or args.jitter else None
    program = job.program_of(timed)
    classes = rank_classes_of(program, costs, uneven)
    _announce(classes)
    timeline = simulate(program, costs, duration_factors=uneven, classes=classes)
    idle = idle_s_by_rank(timeline, costs, factors)
    few = draw == 0 and len(classes.members) <= MANY
    found = imbalance(step, job.orders, costs) if args.ragged and few else None
    return SimulatedStep(job, priced.origin, step, timeline, idle, peaks(timeline), found)


def _announce(classes: RankClasses) -> None:
    """Say beforehand what takes minutes: timing that many classes of ranks."""
    count = len(classes.members)
    if count > MANY:
        print(
            f"Timing {len(classes.leader):,} ranks in {count:,} classes with equal timelines. This takes minutes.",
            file=sys.stderr,
        )
