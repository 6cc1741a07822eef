"""Watch: a run in the terminal. It is drawn again twice a second; Ctrl-C leaves, and the run goes on."""

import contextlib
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.text import printable
from mimogrid.core.base.units import in_bytes
from mimogrid.shell.cli.arguments import WatchArgs
from mimogrid.shell.cli.output import print_json, terminal, terminal_width
from mimogrid.shell.run.folders import RECORD
from mimogrid.shell.run.progress import in_seconds, progress_text
from mimogrid.shell.run.watching import RankState, RunState, RunWatch, seconds_since


DRAWN_EVERY_S, LOOKS_EVERY_S = 0.5, 0.02
RANKS_SHOWN, BAR = 32, 20
LEVELS = "▁▂▃▄▅▆▇█"
SPARKS = 60


def run(args: WatchArgs) -> int:
    """Show a run until the user leaves, or it ends."""
    if not (args.folder / RECORD).is_file():
        remedy = "Name the folder of a run, such as runs/digits-1."
        raise PlanError([Problem(str(args.folder), f"holds no run: there is no {RECORD} in it.", remedy)])
    watcher = RunWatch(args.folder)
    if args.json:
        print_json(_values(watcher.state()))
        return 0
    console = Console(file=terminal(), highlight=False, width=terminal_width(120))
    if args.once or not console.is_terminal:
        _look_for(watcher, DRAWN_EVERY_S)
        console.print(view(watcher.state()))
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            _look_for(watcher, DRAWN_EVERY_S)
            state = watcher.state()
            live.update(view(state), refresh=True)
            if state.state != "training":
                break
    return 0


def _look_for(watcher: RunWatch, seconds: float) -> None:
    """Look again and again for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watcher.look()
        time.sleep(LOOKS_EVERY_S)


def view(state: RunState) -> RenderableType:
    """Return what is drawn of a run."""
    lines = [*_head(state), *([] if state.ranks else [_without_ranks(state)])]
    return Group(*(Text(printable(line)) for line in lines), *([_table(state.ranks)] if state.ranks else []))


def _without_ranks(state: RunState) -> str:
    """Return what stands in place of the ranks: what may be done with a run that has none."""
    match state.state:
        case "finished":
            return (
                f"its ranks have ended; a page of the run: mimogrid report {shlex.quote(str(state.folder))}"
            )
        case "not running":
            return f"no rank runs; to go on: mimogrid train JOB --resume {shlex.quote(str(state.folder))}"
        case _:
            return "no rank has a heartbeat here yet"


def _head(state: RunState) -> Iterator[str]:
    total = "?" if state.steps is None else f"{state.steps}"
    yield f"{state.folder}: {state.state}, {state.done}/{total} steps {_bar(state)}"
    last = state.last
    if not last:
        return
    left = ""
    if state.state == "training" and state.steps and last.get("step_s"):
        left = f"  {last['step_s'] * (state.steps - state.done):,.0f} s left"
    yield progress_text(last) + left
    losses = [line["loss"] for line in state.metrics if isinstance(line.get("loss"), float)]
    yield f"loss of the last {len(losses[-SPARKS:])} steps  {_sparks(losses[-SPARKS:])}"
    for straggler in last.get("stragglers", ()):
        yield f"straggler: rank {straggler['rank']} ({straggler['cause']})"


def _bar(state: RunState) -> str:
    if not state.steps:
        return ""
    full = BAR * min(state.done, state.steps) // state.steps
    return f"[{'#' * full}{'.' * (BAR - full)}]"


def _sparks(values: Sequence[float]) -> str:
    """Return numbers as a line of bars.

    >>> _sparks([1.0, 2.0, 8.0])
    '▁▂█'
    """
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((value - low) * scale)] if value in finite else "?" for value in values)


def _table(ranks: Sequence[RankState]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rank", "host", "step", "does", "for", "computing", "idle", "memory"):
        table.add_column(column, no_wrap=True)
    for rank in ranks[:RANKS_SHOWN]:
        table.add_row(*(Text(printable(cell)) for cell in _cells(rank)))
    rest = len(ranks) - RANKS_SHOWN
    return Group(table, Text(f"... and {rest} more ranks: --json has them")) if rest > 0 else table


def _cells(rank: RankState) -> tuple[str, ...]:
    record, computing = rank.record, rank.computing or 0.0
    memory = "?" if rank.memory_bytes is None else in_bytes(rank.memory_bytes)
    doing = f"{record.doing} (waits for others)" if record.waits else record.doing
    return (
        *(str(record.rank), record.host, str(record.step), doing, in_seconds(seconds_since(record))),
        *(f"{computing:.0%}", f"{1 - computing:.0%}", memory),
    )


def _values(state: RunState) -> dict[str, Any]:
    """Return a run for a script."""
    return {
        "folder": str(state.folder),
        "state": state.state,
        "done": state.done,
        "steps": state.steps,
        "last": state.last,
        "ranks": [
            {**attrs.asdict(rank.record), "computing": rank.computing, "memory_bytes": rank.memory_bytes}
            for rank in state.ranks
        ],
    }
