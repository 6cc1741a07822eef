"""The command ``simulate``: a step timed without running it, under one schedule, under all, or beside another job.

mimogrid simulate JOB                        the timeline, who idles and why, memory, the critical path
mimogrid simulate JOB --schedule all         a line per schedule, or why it cannot be
mimogrid simulate JOB --compare OTHER        two jobs side by side
mimogrid simulate JOB --ragged --jitter 0.1  real shares of the data, uneven machines; --draws 20 of them
"""

import argparse
import contextlib
import gc
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.base.units import in_bytes
from mimogrid.core.draw import perfetto
from mimogrid.core.draw.picture import picture
from mimogrid.core.draw.svg import svg
from mimogrid.core.draw.text import WIDTH, text
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.pricing import on_machine
from mimogrid.core.pricing.assumed import ASSUMED, assumed
from mimogrid.core.pricing.machine import machine_of
from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.layer_split import topology_of
from mimogrid.core.simulate import MANY, rank_classes_of, simulate
from mimogrid.core.simulate.breakdown import JITTER, RAGGED, idle_s, idle_s_by_rank, shares
from mimogrid.core.simulate.memory import Level, peaks
from mimogrid.core.simulate.rank_classes import RankClasses
from mimogrid.core.simulate.timeline import CAUSES_IN_WORDS, Timeline
from mimogrid.core.simulate.unevenness import DurationFactors
from mimogrid.shell.cli.output import print_json, terminal_width, write
from mimogrid.shell.job import costfile
from mimogrid.shell.job.jobs import Job, open_job


ALL = "all"
PLACES = 4
"""So many parts of the critical path are told one by one."""
TOLD = {**CAUSES_IN_WORDS, RAGGED: "ragged data", JITTER: "jitter"}
DRAWN = 200_000
"""Of a timeline with more actions than these, one rank of each class is told."""


@attrs.frozen(eq=False)
class Simulated:
    """One simulated step of a job, and all that is told of it."""

    job: Job
    told_costs: str
    duration_factors: DurationFactors
    timeline: Timeline
    idle_by_rank: Mapping[int, Mapping[str, float]]
    peaks: Mapping[int, Level]

    @property
    def name(self) -> str:
        """The job as people know it: its file with the folder."""
        return f"{self.job.path.parent.name}/{self.job.path.name}"

    @property
    def assumed(self) -> bool:
        """Whether nobody has given any costs."""
        return ASSUMED in self.told_costs

    @property
    def idle(self) -> dict[str, float]:
        """Seconds of idling by cause, summed over ranks."""
        return idle_s(self.timeline, self.idle_by_rank)

    @property
    def samples_per_s(self) -> float | None:
        """Samples a second, unless the step takes no time."""
        return self._per_s(len(self.duration_factors.step.samples))

    @property
    def tokens_per_s(self) -> float | None:
        """Positions in use of language sequences a second, as training counts them."""
        return self._per_s(self.duration_factors.step.tokens)

    @property
    def peak(self) -> tuple[int, Level]:
        """The rank that needs the most memory, and when."""
        return max(self.peaks.items(), key=lambda peak: peak[1].bytes)

    def _per_s(self, count: int) -> float | None:
        return count / self.timeline.step_s if self.timeline.step_s else None


def run(job: Job, given: argparse.Namespace) -> int:
    """Run the command."""
    _check(given)
    with without_collecting():
        if given.schedule == ALL:
            _tell_schedules(job, given)
        elif given.compare:
            _tell_jobs(job, given)
        else:
            _tell(job, given)
    return 0


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Let no garbage collector look through the values of a large plan: none of them refers to a later one."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def under(job: Job, **changes: Any) -> Job:
    """Return a job with changes of its schedule. Raises PlanError where they are not legal for it."""
    facts = job.topology.source
    spec = attrs.evolve(job.spec, schedule=attrs.evolve(job.spec.schedule, **changes))
    return attrs.evolve(job, topology=topology_of(spec, facts))


def _check(given: argparse.Namespace) -> None:
    """Raise PlanError for options that do not go together."""
    problems: list[Problem] = []
    if given.schedule not in {None, ALL, *SCHEDULES}:
        remedy = nearest(given.schedule, (*SCHEDULES, ALL))
        problems.append(Problem("--schedule", f"'{given.schedule}' is none.", remedy))
    for option, value, least in (
        ("--jitter", given.jitter, 0),
        ("--step", given.step, 0),
        ("--draws", given.draws, 1),
    ):
        if not least <= value < float("inf"):
            problems.append(Problem(option, f"is {value:g}.", f"Use {least} or more."))
    if given.draws > 1 and not (given.jitter or given.ragged):
        problems.append(
            Problem("--draws", "would all be the same.", "Add --jitter SIGMA, --ragged, or both.")
        )
    if given.draws > 1 and (given.schedule == ALL or given.compare):
        problems.append(
            Problem("--draws", "are of one job and one schedule.", "Leave out --compare and all.")
        )
    if given.compare and given.schedule == ALL:
        problems.append(
            Problem("--compare", "two jobs are compared under one schedule.", "Leave out --schedule all.")
        )
    if given.costs and given.gpu:
        problems.append(Problem("--gpu", "prices what --costs gives.", "Leave out one of them."))
    if len(given.costs) > (2 if given.compare else 1):
        problems.append(
            Problem("--costs", f"is given {len(given.costs)} times.", "Give it once for each job.")
        )
    if (given.svg or given.trace) and given.schedule == ALL:
        problems.append(Problem("--svg, --trace", "draw jobs under one schedule.", "Draw them one by one."))
    if given.trace and given.compare:
        problems.append(Problem("--trace", "is of one job.", "Write two traces, or draw both with --svg."))
    if problems:
        raise PlanError(problems)


# -- one job -----------------------------------------------------------------------------------------------


def _tell(job: Job, given: argparse.Namespace) -> None:
    planned = _planned(job, given)
    draws = [_simulated(planned, given, draw) for draw in range(given.draws)]
    found = draws[0]
    _draw({found.name: found}, given)
    if given.json:
        steps = {"draws": [one.timeline.step_s for one in draws]} if given.draws > 1 else {}
        print_json(_values(found) | steps)
        return
    timeline = found.timeline
    width = terminal_width(WIDTH)
    if _fits(timeline):
        print(text(timeline.events, width=width), end="\n\n")
    else:
        members = timeline.classes.members
        events = [event for rank in members for event in timeline.events_of(rank)]
        print(f"{_many(timeline)}; one rank of each class stands for the others.\n")
        print(text(events, width=width, members=members), end="\n\n")
    print(f"{_summary(timeline)}.")
    if given.draws > 1:
        seconds = sorted(one.timeline.step_s for one in draws)
        told = f"median {statistics.median(seconds):.6g} s, {seconds[0]:.6g} to {seconds[-1]:.6g} s"
        print(f"Of {given.draws} draws: {told}; what is told here is the first.")
    idle = ", ".join(f"{TOLD[cause]} {s:.4g} s" for cause, s in found.idle.items() if s)
    print(f"Idle, summed over ranks: {idle or 'none'}.")
    print(f"Critical path: {_path(timeline) or 'nothing takes time'}.")
    flying = ", ".join(f"{stage} {peak}" for stage, peak in timeline.peak_in_flight.items())
    print(f"Microbatches in flight at most: {flying}.")
    rank, peak = found.peak
    parts = ", ".join(f"{part} {in_bytes(size)}" for part, size in peak.parts.items() if size)
    when = f" at {peak.at_s:.6g} s in {peak.action}" if peak.action else ""
    print(f"Most memory: rank {rank}, {in_bytes(peak.bytes)}{when} ({parts}).")
    if found.tokens_per_s and not found.assumed:
        print(f"{found.tokens_per_s:.6g} tokens/s, {found.samples_per_s:.6g} samples/s.")
    print(f"Costs: {found.told_costs}.")


def _planned(
    job: Job, given: argparse.Namespace, *, schedule: str | None = None, which: int = 0
) -> "_Planned":
    """Plan a job under the schedule and with the costs that are asked for; one costs file serves all jobs.

    An order that goes by costs goes by these. Raises PlanError where anything is not legal.
    """
    changes: dict[str, Any] = {"name": name} if (name := schedule or given.schedule) else {}
    if given.costs:
        path = given.costs[min(which, len(given.costs) - 1)]
        costs = costfile.read(path, job.topology)
        return _Planned(under(job, **changes, costs=costs), costs, _from(costs, str(path)))
    if given.gpu:
        machine = machine_of(given.gpu, job.spec.precision, given.efficiency)
        costs = on_machine(job.step(given.step), machine)
        return _Planned(under(job, **changes, costs=costs), costs, f"assumed: {machine}")
    job = under(job, **changes)
    if job.spec.schedule.costs:
        costs = job.spec.schedule.costs
        return _Planned(job, costs, _from(costs, "schedule.costs of the job"))
    told = f"assumed, as no --costs is given: {ASSUMED}"
    return _Planned(job, assumed(job.topology), told)


def _from(costs: Costs, place: str) -> str:
    """Say where costs come from, and before that what they say of it themselves."""
    return f"{costs.origin}, from {place}" if costs.origin else f"from {place}"


@attrs.frozen(eq=False)
class _Planned:
    """A job with the costs of its stages and links, and where these are from."""

    job: Job
    costs: Costs
    told_costs: str


def _simulated(planned: _Planned, given: argparse.Namespace, draw: int = 0) -> Simulated:
    """Simulate a step: draw 0 as it is asked for, another one with the next seed and, if ragged, the next samples."""
    job, costs = planned.job, planned.costs
    step = job.step(given.step + draw * given.ragged)
    duration_factors = DurationFactors(step, ragged=given.ragged, jitter=given.jitter, seed=given.seed + draw)
    paced = duration_factors if given.ragged or given.jitter else None
    program = plan_step(step, job.order)
    classes = rank_classes_of(program, costs, paced)
    _tell_classes(classes)
    timeline = simulate(program, costs, duration_factors=paced, classes=classes)
    return Simulated(
        job,
        planned.told_costs,
        duration_factors,
        timeline,
        idle_s_by_rank(timeline, costs, duration_factors),
        peaks(timeline),
    )


def _tell_classes(classes: RankClasses) -> None:
    """Say beforehand what takes minutes: that many ranks are timed one by one."""
    count = len(classes.members)
    if count > MANY:
        print(
            f"Timing {len(classes.leader):,} ranks in {count:,} classes of ranks that live through the step alike; "
            "each class is walked, which takes minutes.",
            file=sys.stderr,
        )


def _values(found: Simulated) -> dict[str, Any]:
    """What `--json` says of a simulated step."""
    timeline = found.timeline
    return {
        "costs": found.told_costs,
        "schedule": found.job.spec.schedule.name,
        "step_time": timeline.step_s,
        "limit": timeline.lower_bound_s,
        "ratio_to_limit": timeline.ratio_to_bound,
        "bubble": timeline.bubble,
        "samples_per_s": found.samples_per_s,
        "tokens_per_s": found.tokens_per_s,
        "idle": found.idle,
        "idle_by_rank": found.idle_by_rank,
        "busy": timeline.busy_s,
        "peak_bytes": {rank: level.bytes for rank, level in found.peaks.items()},
        "peaks": {
            rank: {
                "bytes": level.bytes,
                "at": level.at_s,
                "action": str(level.action) if level.action else None,
                "parts": dict(level.parts),
            }
            for rank, level in found.peaks.items()
        },
        "peak_in_flight": {str(stage): peak for stage, peak in timeline.peak_in_flight.items()},
        "critical_path": [
            {
                "rank": segment.rank,
                "action": str(segment.action),
                "begin": segment.begin_s,
                "end": segment.end_s,
            }
            for segment in timeline.critical_path
        ],
        "critical_path_shares": shares(timeline),
        "classes": list(timeline.classes.members.values()),
    }


def _summary(timeline: Timeline) -> str:
    return (
        f"step {timeline.step_s:.6g} s, {timeline.ratio_to_bound:.3f} x the limit; "
        f"ranks compute nothing in {timeline.bubble:.1%} of it"
    )


def _path(timeline: Timeline) -> str:
    found = [(place, seconds / timeline.step_s) for place, seconds in shares(timeline).items() if seconds]
    told = [f"{place} {part:.1%}" for place, part in found[:PLACES]]
    rest = sum(part for _, part in found[PLACES:])
    return ", ".join(told + [f"others {rest:.1%}"] * (rest > 0))


# -- pictures ----------------------------------------------------------------------------------------------


def _fits(timeline: Timeline) -> bool:
    """Whether there are few enough actions to draw those of every rank."""
    return _actions(timeline) <= DRAWN


def _actions(timeline: Timeline) -> int:
    members = timeline.classes.members
    return sum(len(track.events) * len(members[rank]) for rank, track in timeline.rank_timelines.items())


def _many(timeline: Timeline) -> str:
    classes = timeline.classes
    return (
        f"{len(classes.leader):,} ranks in {len(classes.members):,} classes do {_actions(timeline):,} actions"
    )


def _draw(found: Mapping[str, Simulated], given: argparse.Namespace) -> None:
    """Write the pictures that are asked for; of a large world, one rank of each class."""
    if given.svg:
        pictures = (
            picture(one.timeline, f"{name}, {one.job.spec.schedule.name}: {_summary(one.timeline)}")
            for name, one in found.items()
        )
        write(given.svg, [svg(*pictures)])
    if given.trace:
        (one,) = found.values()
        ranks = None if _fits(one.timeline) else one.timeline.classes.members
        write(given.trace, perfetto.lines(one.timeline, ranks))


# -- several -----------------------------------------------------------------------------------------------


def _tell_schedules(job: Job, given: argparse.Namespace) -> None:
    """Tell of a job under every schedule, or why it cannot be under it."""
    found: dict[str, Simulated | tuple[Problem, ...]] = {}
    for name in SCHEDULES:
        try:
            found[name] = _simulated(_planned(job, given, schedule=name), given)
        except PlanError as error:
            found[name] = error.problems
    if given.json:
        values = {
            name: _values(one)
            if isinstance(one, Simulated)
            else {"problems": [attrs.asdict(problem) for problem in one]}
            for name, one in found.items()
        }
        print_json({"schedules": values})
        return
    legal = {name: one for name, one in found.items() if isinstance(one, Simulated)}
    _table("schedule", legal)
    for name, one in found.items():
        for problem in one if isinstance(one, tuple) else ():
            print(f"{name}: {problem.where}: {problem.message}")
    for told in dict.fromkeys(one.told_costs for one in legal.values()):
        print(f"Costs: {told}.")


def _tell_jobs(job: Job, given: argparse.Namespace) -> None:
    """Tell of two jobs side by side, and which is faster."""
    jobs = [job, open_job(given.compare)]
    found = [_simulated(_planned(one, given, which=i), given) for i, one in enumerate(jobs)]
    speeds = [one.samples_per_s for one in found]
    ratio = speeds[0] / speeds[1] if speeds[0] and speeds[1] else None
    names = [one.name for one in found]
    if names[0] == names[1]:
        names = [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]
    _draw(dict(zip(names, found, strict=True)), given)
    if given.json:
        values = [{"job": str(one.job.path), "ranks": _ranks(one), **_values(one)} for one in found]
        print_json({"jobs": values, "ratio": ratio})
        return
    _table("job", dict(zip(names, found, strict=True)))
    if ratio:
        first, second = names if ratio >= 1 else names[::-1]
        faster = max(ratio, 1 / ratio)
        each = faster * _ranks(found[names.index(second)]) / _ranks(found[names.index(first)])
        print(f"{first} trains {faster:.3f} x as many samples a second as {second}, {each:.3f} x per rank.")
    for told in dict.fromkeys(one.told_costs for one in found):
        print(f"Costs: {told}.")


def _ranks(found: Simulated) -> int:
    """How many ranks a job takes, those that idle included."""
    return found.job.topology.world_size


def _table(what: str, found: Mapping[str, Simulated]) -> None:
    heads = (
        what,
        "step s",
        "x limit",
        "bubble",
        "peak",
        "in flight",
        "samples/s",
        "per rank",
        "tokens/s",
        "per rank",
    )
    rows: list[tuple[str, ...]] = [heads]
    for name, one in found.items():
        timeline = one.timeline
        speeds = (one.samples_per_s, one.tokens_per_s)
        told = [f"{speed / count:.4g}" if speed else "-" for speed in speeds for count in (1, _ranks(one))]
        flying = max(timeline.peak_in_flight.values(), default=0)
        numbers = (f"{timeline.step_s:.6g}", f"{timeline.ratio_to_bound:.3f}", f"{timeline.bubble:.1%}")
        rows.append((name, *numbers, in_bytes(one.peak[1].bytes), str(flying), *told))
    wide = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, wide, strict=True))
        )
        print("  ".join((first, *others)))
