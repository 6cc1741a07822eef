"""The command ``report``: an interactive page of a run, from the files that it left. The run may still be going on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.units import in_bytes
from mimogrid.core.draw.dashboard import Value, curve_of, facts_of
from mimogrid.shell.cli.arguments import ReportArgs
from mimogrid.shell.cli.html import write_page
from mimogrid.shell.cli.output import print_json
from mimogrid.shell.run.folders import METRICS, RECORD, STEP, report_of


CURVES: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "time of a step in s": ("step_s",),
    "tokens/s": ("tokens_per_s",),
    "share of the time without computing": ("waiting", "waiting_for_data"),
    "gradient norm": ("gradient_norm",),
    "learning rate": ("learning_rate",),
}
"""By the title of a chart the keys of the metrics in it; the losses of modules join the first."""


def run(args: ReportArgs) -> int:
    """Write the page."""
    if not (args.folder / RECORD).is_file():
        remedy = "Name the folder of a run, such as runs/digits-1."
        raise PlanError([Problem(str(args.folder), f"holds no run: there is no {RECORD} in it.", remedy)])
    lines = list(_objects(args.folder / METRICS))
    step = next(_objects(args.folder / STEP), {})
    out = args.out or args.folder / "report.html"
    facts = _facts(lines, report_of(args.folder) or {})
    write_page(out, f"run {args.folder}", {"facts": facts, "charts": _charts(lines), **step})
    written = {"written": str(out), "steps": len(lines), "has_step": bool(step)}
    print_json(written) if args.json else print(f"Written: {out}.")
    return 0


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one on each line; a line that a run has not finished is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def _facts(lines: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[list[str]]:
    """Return what a run says of itself, in words: of the whole run if it has finished, else of the last steps."""
    known = report or (lines[-1] if lines else {})
    done = f"{lines[-1].get('step', 0) + 1:,}" if lines else "none"
    numbers: dict[str, tuple[str, str]] = {
        "time of a step": ("step_s", "{:.4g} s"),
        "samples/s": ("samples_per_s", "{:,.4g}"),
        "tokens/s": ("tokens_per_s", "{:,.4g}"),
        "tokens/s per allocated GPU": ("tokens_per_s_per_gpu", "{:,.4g}"),
        "MFU": ("mfu", "{:.1%}"),
        "waiting": ("waiting", "{:.1%}"),
        "accuracy": ("accuracy", "{:.2%}"),
    }
    found = {
        name: text.format(known[key]) for name, (key, text) in numbers.items() if _is_number(known.get(key))
    }
    peak = known.get("peak_bytes")
    most = max(peak.values(), default=0) if isinstance(peak, dict) else peak
    return facts_of(
        {
            "state": "finished" if report else "not finished",
            "steps done": done,
            **found,
            "peak memory of a rank": in_bytes(most) if most else "",
            "machine": str(report.get("machine", "")),
        }
    )


def _charts(lines: Sequence[Mapping[str, Any]]) -> list[Value]:
    """Return the charts of the metrics that there are."""
    modules = dict.fromkeys(name for line in lines for name in line.get("losses") or ())
    charts = []
    for title, keys in CURVES.items():
        curves = [curve_of(key, _points(lines, key)) for key in keys]
        if title == "loss" and len(modules) > 1:
            losses = [{"step": line.get("step"), **(line.get("losses") or {})} for line in lines]
            curves += [curve_of(name, _points(losses, name)) for name in modules]
        curves = [curve for curve in curves if curve["x"]]
        if curves:
            charts.append({"title": title, "across": "step", "curves": curves})
    return charts


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> Iterator[tuple[float, float]]:
    for line in lines:
        if _is_number(line.get(key)) and _is_number(line.get("step")):
            yield line["step"], float(line[key])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
