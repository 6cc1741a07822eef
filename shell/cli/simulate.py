"""The command ``simulate``: what it prints and draws of steps that `timing` has simulated.

mimogrid simulate JOB                        the timeline, who idles and why, memory, the critical path
mimogrid simulate JOB --schedule all         a line per schedule, or why it is not legal
mimogrid simulate JOB --compare OTHER        two jobs side by side
mimogrid simulate JOB --ragged --jitter 0.1  uneven data and uneven machines; --draws 20 of them
"""

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.base.units import in_bytes
from mimogrid.core.draw import perfetto
from mimogrid.core.draw.dashboard import ROWS, facts_of, timeline_of, world_of
from mimogrid.core.draw.page import pages_of
from mimogrid.core.draw.picture import picture
from mimogrid.core.draw.svg import svg
from mimogrid.core.draw.text import WIDTH, text
from mimogrid.core.job.changes import changes
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.job.spec import BALANCES
from mimogrid.core.pricing.assumed import ASSUMED
from mimogrid.core.simulate.breakdown import JITTER, RAGGED, shares
from mimogrid.core.simulate.imbalance import Imbalance
from mimogrid.core.simulate.timeline import CAUSES_IN_WORDS, Timeline
from mimogrid.shell.cli.arguments import SimulateArgs
from mimogrid.shell.cli.fit import fit_lines, fit_values
from mimogrid.shell.cli.html import write_page
from mimogrid.shell.cli.opening import opened
from mimogrid.shell.cli.output import print_json, terminal_width, write
from mimogrid.shell.cli.timing import (
    SimulatedStep,
    compared,
    drawn,
    under_all_schedules,
)
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.job.planning import without_garbage_collection
from mimogrid.shell.world.waiting import waiting


ALL = "all"
CHANGED = 4
"""How many keys a title names in which two jobs differ."""
PLACES = 4
"""How many places on the critical path are printed one by one."""
CAUSES = {**CAUSES_IN_WORDS, RAGGED: "ragged data", JITTER: "jitter"}
JITTER_MOST, STEPS_MOST = 10, 10**12
"""A jitter of 10 varies times by factors of some thousands; larger numbers are taken for typing errors."""
DRAWN = 200_000
"""Of a timeline with more actions, only one rank of each class is printed and traced."""


def run(job: Job, args: SimulateArgs) -> int:
    """Run the command."""
    problems = list(_problems(args))
    if problems:
        raise PlanError(problems)
    with without_garbage_collection():
        simulating = functools.partial(waiting, "simulating", silent=args.json)
        if args.schedule == ALL:
            with simulating() as shown:
                schedules = under_all_schedules(job, args, shown.tell)
            _print_schedules(schedules, args)
        elif args.compare:
            other = opened(args.compare, args.assumed, run_code=not args.no_code, silent=args.json)
            with simulating():
                jobs = compared(job, other, args)
            _print_jobs(jobs, args)
        else:
            with simulating() as shown:
                steps = drawn(job, args, shown.tell)
            _print_job(steps, args)
    return 0


def _problems(args: SimulateArgs) -> Iterator[Problem]:
    """Yield what is wrong with the options, by themselves and together."""
    if args.schedule is not None and args.schedule not in {ALL, *SCHEDULES}:
        remedy = nearest(args.schedule, (*SCHEDULES, ALL))
        yield Problem("--schedule", f"'{args.schedule}' is no schedule.", remedy)
    numbers = (
        ("--jitter", args.jitter, 0, JITTER_MOST),
        ("--step", args.step, 0, STEPS_MOST),
        ("--draws", args.draws, 1, STEPS_MOST),
    )
    for option, value, least, most in numbers:
        if not least <= value <= most:
            yield Problem(option, f"is {value:g}.", f"Use {least} to {most:,}.")
    if args.draws > 1 and not (args.jitter or args.ragged):
        yield Problem("--draws", "would all be the same.", "Add --jitter SIGMA, --ragged, or both.")
    if args.draws > 1 and (args.schedule == ALL or args.compare):
        yield Problem("--draws", "need one job and one schedule.", "Leave out --compare and `all`.")
    if args.compare and args.schedule == ALL:
        yield Problem("--compare", "compares two jobs under one schedule.", "Leave out --schedule all.")
    if args.costs and args.gpu:
        yield Problem("--gpu", "estimates costs, and --costs gives them.", "Leave out one of the two.")
    if len(args.costs) > (2 if args.compare else 1):
        yield Problem("--costs", f"is given {len(args.costs)} times.", "Give it once for each job.")
    if (args.svg or args.html or args.trace) and args.schedule == ALL:
        yield Problem("--svg, --html, --trace", "show one schedule.", "Draw the schedules one by one.")
    if args.trace and args.compare:
        yield Problem("--trace", "shows one job.", "Write two traces, or draw both jobs with --svg.")


# -- one job -----------------------------------------------------------------------------------------------


def _print_job(steps: Sequence[SimulatedStep], args: SimulateArgs) -> None:
    """Draw and print a step; of several draws the first, and the spread of all."""
    found = steps[0]
    _draw({found.name: found}, args)
    if args.json:
        draws = {"draws": [one.timeline.step_s for one in steps]} if len(steps) > 1 else {}
        print_json(_values(found) | fit_values(found.job.spec, found.memory) | draws)
        return
    timeline = found.timeline
    print(*fit_lines(found.job.spec, found.memory), sep="\n", end="\n\n")
    _print_timeline(timeline)
    print(f"{_summary(timeline)}.")
    if len(steps) > 1:
        seconds = sorted(one.timeline.step_s for one in steps)
        spread = f"{statistics.median(seconds):.6g} s, from {seconds[0]:.6g} to {seconds[-1]:.6g} s"
        print(f"Median of {len(steps)} draws: {spread}. All other numbers are of the first draw.")
    idle = ", ".join(f"{CAUSES[cause]} {s:.4g} s" for cause, s in found.idle.items() if s)
    print(f"Idle, summed over ranks: {idle or 'none'}.")
    if found.imbalance:
        print(_balancing(found.imbalance))
    print(f"Critical path: {_path(timeline) or 'nothing takes time'}.")
    in_flight = ", ".join(f"{stage} {peak}" for stage, peak in timeline.peak_in_flight.items())
    print(f"Peak microbatches in flight: {in_flight}.")
    rank, peak = found.peak
    parts = ", ".join(f"{part} {in_bytes(size)}" for part, size in peak.parts.items() if size)
    when = f" at {peak.at_s:.6g} s in {peak.action}" if peak.action else ""
    print(f"Peak memory: rank {rank}, {in_bytes(peak.bytes)}{when} ({parts}).")
    if found.tokens_per_s and found.origin:
        print(f"{found.tokens_per_s:.6g} tokens/s, {found.samples_per_s:.6g} samples/s.")
    _print_costs(steps)


def _balancing(found: Imbalance) -> str:
    """Say what ragged data costs without and with `batch.balance`."""
    none, cost = ((found.idle_s[word], found.step_s[word]) for word in BALANCES)
    return (
        f"Ragged data in the order of samples: {none[0]:.4g} s idle, step {none[1]:.6g} s; assigned by cost "
        f'(batch.balance = "cost"): {cost[0]:.4g} s idle, step {cost[1]:.6g} s; '
        f"if all actions took their means: step {found.even_s:.6g} s."
    )


def _print_timeline(timeline: Timeline) -> None:
    """Print a row per rank, or in a large world a row per class of ranks."""
    width = terminal_width(WIDTH)
    classes = timeline.classes
    if _fits(timeline):
        print(text(timeline.events, width=width), end="\n\n")
        return
    world = f"{len(classes.leader):,} ranks in {len(classes.members):,} classes"
    print(f"{world} do {_actions(timeline):,} actions; one rank of each class stands for the others.\n")
    events = [event for rank in classes.members for event in timeline.events_of(rank)]
    print(text(events, width=width, members=classes.members), end="\n\n")


def _values(found: SimulatedStep) -> dict[str, Any]:
    """Return a simulated step for a script."""
    timeline = found.timeline
    return {
        "costs": found.origin or f"assumed: {ASSUMED}",
        "schedule": found.job.spec.schedule.name,
        "step_time": timeline.step_s,
        "limit": timeline.lower_bound_s,
        "ratio_to_limit": timeline.ratio_to_bound,
        "bubble": timeline.bubble,
        "samples_per_s": found.samples_per_s,
        "tokens_per_s": found.tokens_per_s,
        "idle": found.idle,
        "idle_by_rank": found.idle_by_rank,
        "imbalance": attrs.asdict(found.imbalance) if found.imbalance else None,
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
    bound = f"{timeline.ratio_to_bound:.3f} x the lower bound"
    return f"step {timeline.step_s:.6g} s, {bound}; bubble {_percent(timeline.bubble)}"


def _path(timeline: Timeline) -> str:
    """Return the largest shares of the critical path, by stage and edge."""
    found = [(place, seconds / timeline.step_s) for place, seconds in shares(timeline).items() if seconds]
    largest = [f"{place} {_percent(part)}" for place, part in found[:PLACES]]
    rest = sum(part for _, part in found[PLACES:])
    return ", ".join(largest + [f"others {_percent(rest)}"] * (rest > 0))


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _print_costs(steps: Sequence[SimulatedStep]) -> None:
    """Print where the costs are from, once for steps with the same ones."""
    for origin in dict.fromkeys(step.origin for step in steps):
        print(f"Costs: {origin}." if origin else f"No costs given: {ASSUMED}.")


# -- pictures ----------------------------------------------------------------------------------------------


def _fits(timeline: Timeline) -> bool:
    """Whether there are few enough actions to show those of every rank."""
    return _actions(timeline) <= DRAWN


def _actions(timeline: Timeline) -> int:
    members = timeline.classes.members
    return sum(len(track.events) * len(members[rank]) for rank, track in timeline.rank_timelines.items())


def _draw(steps: Mapping[str, SimulatedStep], args: SimulateArgs) -> None:
    """Write the pictures that are asked for; of a large world, one rank of each class."""
    if args.svg:
        pictures = (picture(step.timeline, _title(name, step, steps)) for name, step in steps.items())
        write(args.svg, [svg(*(page for whole in pictures for page in pages_of(whole)))])
    if args.html:
        write_page(args.html, " and ".join(steps), _page(steps))
    if args.trace:
        (step,) = steps.values()
        ranks = None if _fits(step.timeline) else step.timeline.classes.members
        write(args.trace, perfetto.lines(step.timeline, ranks))


def _page(steps: Mapping[str, SimulatedStep]) -> dict[str, Any]:
    """Return what an interactive page shows; the map of the ranks is that of the first job."""
    (first, *_) = steps.values()
    rank, peak = first.peak
    facts = {
        "step": _summary(first.timeline),
        "schedule": first.job.spec.schedule.name,
        "precision": first.job.spec.precision,
        "idle, summed over ranks": ", ".join(
            f"{CAUSES[cause]} {s:.4g} s" for cause, s in first.idle.items() if s
        ),
        "critical path": _path(first.timeline),
        "peak memory": f"rank {rank}, {in_bytes(peak.bytes)}",
        "costs": first.origin or f"none given: {ASSUMED}",
    }
    pictures = [picture(step.timeline, _title(name, step, steps), ROWS) for name, step in steps.items()]
    return {
        "facts": facts_of(facts),
        "world": world_of(first.job.topology),
        "timelines": [timeline_of(each) for each in pictures],
    }


def _title(name: str, step: SimulatedStep, steps: Mapping[str, SimulatedStep]) -> str:
    """Return the title of a picture; of two jobs with what the second changes."""
    first = next(iter(steps.values()))
    found = [str(change) for change in changes(first.job.spec, step.job.spec) if "costs" not in change.key]
    more = f" and {len(found) - CHANGED} more" if len(found) > CHANGED else ""
    differs = f" ({', '.join(found[:CHANGED])}{more})" if found else ""
    return f"{name}, {step.job.spec.schedule.name}: {_summary(step.timeline)}{differs}"


# -- several -----------------------------------------------------------------------------------------------


def _print_schedules(found: Mapping[str, SimulatedStep | tuple[Problem, ...]], args: SimulateArgs) -> None:
    """Print a job under every schedule, or why a schedule is not legal for it."""
    if args.json:
        values = {
            name: _values(step)
            if isinstance(step, SimulatedStep)
            else {"problems": [attrs.asdict(problem) for problem in step]}
            for name, step in found.items()
        }
        print_json({"schedules": values})
        return
    legal = {name: step for name, step in found.items() if isinstance(step, SimulatedStep)}
    _print_table("schedule", legal)
    for name, step in found.items():
        for problem in step if isinstance(step, tuple) else ():
            print(f"{name}: {problem.where}: {problem.message}")
    _print_costs([*legal.values()])


def _print_jobs(steps: Mapping[str, SimulatedStep], args: SimulateArgs) -> None:
    """Draw and print two jobs side by side, and which is faster."""
    speeds = [step.samples_per_s for step in steps.values()]
    ratio = speeds[0] / speeds[1] if speeds[0] and speeds[1] else None
    _draw(steps, args)
    if args.json:
        values = [{"job": str(s.job.path), "ranks": s.ranks, **_values(s)} for s in steps.values()]
        print_json({"jobs": values, "ratio": ratio})
        return
    _print_table("job", steps)
    if ratio:
        faster, slower = steps if ratio >= 1 else reversed([*steps])
        times = max(ratio, 1 / ratio)
        per_rank = times * steps[slower].ranks / steps[faster].ranks
        print(f"{faster} trains {times:.3f} x as many samples/s as {slower}, {per_rank:.3f} x per rank.")
    _print_costs([*steps.values()])


HEADS = ("step s", "x bound", "bubble", "peak", "in flight", "samples/s", "per rank", "tokens/s", "per rank")


def _print_table(what: str, steps: Mapping[str, SimulatedStep]) -> None:
    """Print a line per step."""
    rows = [(what, *HEADS), *((name, *_cells(step)) for name, step in steps.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join((name.ljust(widths[0]), *padded)))


def _cells(step: SimulatedStep) -> tuple[str, ...]:
    timeline = step.timeline
    speeds = (step.samples_per_s, step.tokens_per_s)
    return (
        f"{timeline.step_s:.6g}",
        f"{timeline.ratio_to_bound:.3f}",
        f"{timeline.bubble:.1%}",
        in_bytes(step.peak[1].bytes),
        str(max(timeline.peak_in_flight.values(), default=0)),
        *(f"{speed / count:.4g}" if speed else "-" for speed in speeds for count in (1, step.ranks)),
    )
