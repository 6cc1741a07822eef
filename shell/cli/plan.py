"""Planning: the command `plan`: a search printed as a table or as JSON, and the best layout as a job file."""

from collections.abc import Callable
from typing import Any, TypeVar

import attrs
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.units import in_bytes
from mimogrid.core.draw.dashboard import facts_of
from mimogrid.core.plan.layouts import BEST, SLOWER, Layout, Question, shown
from mimogrid.core.plan.pins import parse
from mimogrid.core.plan.planner import Plan, Sensitivity, plan
from mimogrid.core.pricing.accelerators import ACCELERATORS
from mimogrid.core.pricing.machine import Machine, machine_for
from mimogrid.core.pricing.on_machine import measured_on
from mimogrid.shell.cli.arguments import PlanArgs
from mimogrid.shell.cli.fit import fit_lines
from mimogrid.shell.cli.html import write_page
from mimogrid.shell.cli.output import print_json, terminal, write
from mimogrid.shell.cli.watcher import Watcher
from mimogrid.shell.job import costfile, jobfile
from mimogrid.shell.job.jobs import Job


T = TypeVar("T")


def run(job: Job, args: PlanArgs) -> int:
    """Search, print what was found, write the best layout. Returns 1 where nothing fits."""
    question = _question(job, args)
    with Watcher(args.time_limit, silent=args.json) as watcher:
        found = plan(question, watch=watcher)
    best = found.best
    if best is not None and args.out:
        write(args.out, job_text(job, best, question))
    if args.html:
        write_page(args.html, f"{job.path.name} on {question.gpus:,} GPUs", _page(found, question))
    if args.json:
        print_json(_values(found, question, args))
    else:
        _print(found, question, args)
    return 0 if best is not None else 1


def job_text(job: Job, layout: Layout, question: Question) -> str:
    """Return a layout as the text of a job file; a comment says where it is from."""
    name = job.path.name
    what = f"{question.gpus} x {question.machine.accelerator.name}, {question.machine.precision}"
    return f"# A layout for {name}, found by `mimogrid plan` for {what}.\n{jobfile.dump(layout.spec)}"


def _question(job: Job, args: PlanArgs) -> Question:
    """Return what is searched for. Raises PlanError with everything that is wrong with the arguments."""
    problems: list[Problem] = []
    if args.gpus < 1:
        problems.append(Problem("--gpus", f"is {args.gpus}.", "Use 1 or more."))
    machine = _found(lambda: _machine(job), problems)
    step = _found(lambda: job.step(0), problems)
    pins = _found(lambda: parse(args.pins, tuple(job.spec.modules)), problems)
    if problems or machine is None or step is None or pins is None:
        raise PlanError(problems)
    spec = job.spec
    if args.costs:
        measured = measured_on(machine, step, costfile.read(args.costs, job.topology)).measured
        spec = attrs.evolve(spec, gpu=attrs.evolve(spec.gpu, times=dict(measured)))
    samples = job.step_in_order(0).samples
    return Question(spec=spec, facts=job.topology.source, samples=samples, gpus=args.gpus, pins=pins)


def _machine(job: Job) -> Machine:
    """Return the GPUs that a job assumes. Raises PlanError if it does not say which."""
    machine = machine_for(job.spec)
    if machine is None:
        remedy = f"Use --gpu NAME, or gpu.name in the job: {', '.join(ACCELERATORS)}."
        raise PlanError([Problem("--gpu", "is missing, and the job names no kind of GPU.", remedy)])
    return machine


def _found(find: Callable[[], T], problems: list[Problem]) -> T | None:
    """Return what is found, or note the problems."""
    try:
        return find()
    except PlanError as error:
        problems += error.problems
        return None


# -- as a table --------------------------------------------------------------------------------------------


def _print(found: Plan, question: Question, args: PlanArgs) -> None:
    console = Console(file=terminal(), width=120)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("step", "tokens/s/GPU", "MFU", "bubble", "padding", "others", "peak GB", "layout"):
        table.add_column(title, justify="left" if title == "layout" else "right", overflow="fold")
    for layout in found.layouts:
        table.add_row(*_cells(layout), f"{escape(shown(layout.spec))}\n[bold]{escape(layout.reason)}[/bold]")
    print(*fit_lines(question.spec, {}), sep="\n")
    console.print(table)
    print(
        "@: the first rank of a module; m: its own microbatches; uneven: stages of different numbers of layers."
    )
    print(
        f"'others' is the share of compute outside module '{found.main}'. Idle GPUs of the {question.gpus} count."
    )
    print(f"Estimated costs: {question.machine}.")
    if question.machine.measured:
        factors = ", ".join(f"{name} {factor:,.4g}" for name, factor in question.machine.measured)
        print(
            f"Times of modules are scaled to {args.costs or 'gpu.times of the job'}, by these factors: {factors}."
        )
    for line in found.sensitivity:
        print(_what_if(line, found))
    looked = f"{found.looked_at:,} layouts examined, {found.simulated} simulated"
    if found.best is None:
        print(f"{looked}. Nothing fits. The closest one: {found.nearest_fit}.")
        return
    bound = f" by more than {found.gap:.1%}" if found.gap else ""
    stopped = "The search was stopped. " if found.stopped else ""
    print(f"{looked}. {stopped}Under the same schedule, none is faster than the best{bound}.")
    if args.out:
        print(f"Written: {args.out}.")
    else:
        print("Use --out FILE to write the best layout as a job file.")


def _cells(layout: Layout) -> tuple[str, ...]:
    peaks = _peaks(layout)
    if layout.kind not in {BEST, SLOWER}:
        return ("",) * 6 + (peaks,)
    return (
        f"{layout.step_s:.4g} s",
        f"{layout.tokens_per_s_per_gpu:,.0f}",
        f"{layout.mfu:.1%}",
        f"{layout.bubble:.1%}",
        f"{layout.padding:.1%}",
        f"{layout.encoder_share:.1%}",
        peaks,
    )


def _peaks(layout: Layout) -> str:
    """Return the memory by module in GB; one number where all modules have the same."""
    each = {name: f"{size / 1e9:.1f}" for name, size in layout.peak_bytes.items()}
    alike = set(each.values())
    return " ".join(alike if len(alike) == 1 else (f"{name} {size}" for name, size in each.items()))


def _what_if(line: Sensitivity, found: Plan) -> str:
    assert found.best is not None
    winner = f"With {line.what}: {line.winner_s:.4g} s ({line.winner_s / found.best.step_s - 1:+.1%})"
    if line.fastest_s >= line.winner_s:
        return f"{winner}, still the fastest of those shown."
    return f"{winner}; then {shown(line.fastest.spec)} is faster: {line.fastest_s:.4g} s."


# -- as a page ---------------------------------------------------------------------------------------------


LARGE = 1000
"""From here on a number is written without decimals."""
COLUMNS = (
    "step s",
    "tokens/s/GPU",
    "MFU %",
    "bubble %",
    "padding %",
    "others %",
    "peak GB",
    "GPUs",
    "layout",
)


def _page(found: Plan, question: Question) -> dict[str, Any]:
    """Return what an interactive page shows: the layouts as a table, and a chart of time and memory."""
    lines = [*map(_line, found.layouts)]
    facts = {
        "GPUs": f"{question.gpus:,} x {question.machine.accelerator.name}",
        "precision": question.spec.precision,
        "memory of a GPU": in_bytes(question.memory_bytes),
        "search": f"{found.looked_at:,} layouts examined, {found.simulated} simulated",
        "nothing fits; the closest": found.nearest_fit if found.best is None else "",
        "sensitivity": " ".join(_what_if(line, found) for line in found.sensitivity),
        "costs": str(question.machine),
    }
    return {
        "facts": facts_of(facts),
        "candidates": {
            "columns": [{"name": name, "text": name == COLUMNS[-1]} for name in COLUMNS],
            "rows": lines,
            "x": COLUMNS.index("step s"),
            "y": COLUMNS.index("peak GB"),
            "note": "A click on a head sorts. 'others' is the share of compute outside module "
            f"'{found.main}'. Idle GPUs count.",
        },
    }


def _line(layout: Layout) -> dict[str, Any]:
    """Return a layout as a row of the table: numbers to sort by, and their texts."""
    peak = max(layout.peak_bytes.values(), default=0) / 1e9
    numbers: list[float | None] = [None] * (len(COLUMNS) - 3)
    if layout.kind in {BEST, SLOWER}:
        shares = (layout.mfu, layout.bubble, layout.padding, layout.encoder_share)
        numbers = [layout.step_s, layout.tokens_per_s_per_gpu, *(100 * share for share in shares)]
    values = [*numbers, peak or None, layout.active]
    cells = [
        "-" if value is None else f"{value:,.0f}" if value >= LARGE else f"{value:.4g}" for value in values
    ]
    return {
        "values": [*values, shown(layout.spec)],
        "cells": [*cells, shown(layout.spec)],
        "reason": layout.reason,
        "best": layout.kind == BEST,
    }


# -- as JSON -----------------------------------------------------------------------------------------------


def _values(found: Plan, question: Question, args: PlanArgs) -> dict[str, Any]:
    return {
        "costs": f"assumed: {question.machine}",
        "measured": dict(question.machine.measured),
        "gpus": question.gpus,
        "gpu": question.machine.accelerator.name,
        "precision": question.spec.precision,
        "memory_bytes": question.memory_bytes,
        "looked_at": found.looked_at,
        "simulated": found.simulated,
        "stopped": found.stopped,
        "gap": found.gap,
        "nearest_miss": found.nearest_fit or None,
        "out": str(args.out) if args.out and found.best else None,
        "sensitivity": [
            {
                "what": each.what,
                "winner": each.winner_s,
                "fastest": each.fastest_s,
                "layout": shown(each.fastest.spec),
            }
            for each in found.sensitivity
        ],
        "layouts": [_layout_values(layout, found) for layout in found.layouts],
    }


def _layout_values(layout: Layout, found: Plan) -> dict[str, Any]:
    runs = layout.step_s > 0
    return {
        "job": jobfile.dump(layout.spec),
        "layout": shown(layout.spec),
        "kind": layout.kind,
        "own": layout.spec == found.own.spec,
        "reason": layout.reason,
        "step_time": layout.step_s if runs else None,
        "limit": layout.lower_bound_s if runs else None,
        "tokens_per_s_per_gpu": layout.tokens_per_s_per_gpu if runs else None,
        "active_gpus": layout.active if runs else None,
        "mfu": layout.mfu if runs else None,
        "bubble": layout.bubble if runs else None,
        "padding": layout.padding if runs else None,
        "encoder_share": layout.encoder_share if runs else None,
        "peak_bytes": max(layout.peak_bytes.values()) if runs else None,
        "peak_bytes_by_module": dict(layout.peak_bytes),
    }
