"""Dashboard: what the interactive page shows, as JSON values: ranks, timelines, candidates, curves.

The page is one file that a browser opens without a network (`shell/cli/html.py`). Times are whole millionths of the
step, counted from the end of what came before, so that ten thousand actions take some hundred kilobytes. Rows are
those of `picture`: ranks that do the same at the same times share one.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mimogrid.core.draw import marks
from mimogrid.core.draw.picture import Picture, Row
from mimogrid.core.draw.rank_map import runs
from mimogrid.core.draw.ranks import rank_map_svg
from mimogrid.core.schedule.actions import Compute, Norm, Send, Tie, Update, WaitReduce
from mimogrid.core.simulate.memory import Level
from mimogrid.core.simulate.timeline import CAUSES, CAUSES_IN_WORDS
from mimogrid.core.topology.topology import Topology


Value = dict[str, Any]
PARTS = 1_000_000
"""Into so many parts a step is cut; a time is a number of them."""
ACTIONS, ROWS = 250_000, 2_000
"""The most events and idle times on a page, and the most rows. What exceeds them is left out, and the page says so."""
LEVELS = 300
"""The most levels of memory in a row; of several in one interval, the highest and the last stay."""
POINTS = 1_000
"""The most points of a curve."""


def world_of(topology: Topology) -> Value:
    """Return the modules with their colours, and the map of the ranks as SVG."""
    inks = marks.inks_of(topology.modules)
    modules = [{"name": name, "light": ink.light, "dark": ink.dark} for name, ink in inks.items()]
    return {"modules": modules, "map": rank_map_svg(topology), "ranks": topology.world_size}


def timeline_of(picture: Picture) -> Value:
    """Return a picture as rows of numbers."""
    names: dict[str, int] = {}
    step_s = max((row.timeline.step_s for row in picture.rows), default=0.0)
    folded: dict[int, list[int]] = collections.defaultdict(list)
    for rank, leader in picture.stands_for.items():
        folded[leader].append(rank)
    rows = [
        _row(row, names, step_s, folded.get(row.rank, [row.rank])) for row in _within_budget(picture.rows)
    ]
    note = picture.note
    if len(rows) < len(picture.rows):
        note = (
            f"the first {len(rows)} of {len(picture.rows)} rows; the page holds {ACTIONS:,} actions at most"
        )
    return {
        "title": picture.title,
        "note": note,
        "step": step_s,
        "parts": PARTS,
        "names": [*names],
        "causes": [CAUSES_IN_WORDS[cause] for cause in CAUSES],
        "rows": rows,
    }


def _within_budget(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have at most `ACTIONS` parts together: of every kind of stages the first ones."""
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    turns: dict[int, int] = {}
    for i, row in enumerate(rows):
        stages = tuple(str(info.stage) for info in row.stages)
        turns[i] = seen[stages]
        seen[stages] += 1
    chosen, spent = set[int](), 0
    for i in sorted(turns, key=lambda i: (turns[i], i)):
        spent += len(rows[i].events) + len(rows[i].idles)
        if chosen and spent > ACTIONS:
            break
        chosen.add(i)
    return [row for i, row in enumerate(rows) if i in chosen]


def _row(row: Row, names: dict[str, int], step_s: float, ranks: Sequence[int]) -> Value:
    """Return a row. What it does is begin, length, kind, microbatch; `names` numbers the kinds."""
    topology = row.timeline.program.topology
    numbers = {name: i for i, name in enumerate(topology.modules)}
    scale = PARTS / step_s if step_s else 0.0
    computes, others = _Deltas(scale), _Deltas(scale)
    for event in row.events:
        match event.action:
            case Compute(kind=kind, stage=stage, microbatch=microbatch):
                what = f"{numbers[stage.module]}|{kind.name}|{stage.chunk}|{stage}"
                computes.add(event.begin_s, event.end_s, names.setdefault(what, len(names)), microbatch)
            case WaitReduce() | Tie() | Norm() | Update() if event.end_s > event.begin_s:
                others.add(event.begin_s, event.end_s, names.setdefault(str(event.action), len(names)))
            case _:
                pass
    idles, critical = _Deltas(scale), _Deltas(scale)
    for idle in row.idles:
        idles.add(idle.begin_s, idle.end_s, CAUSES.index(idle.cause))
    for segment in row.outlined:
        if not isinstance(segment.action, Send):
            critical.add(segment.begin_s, segment.end_s)
    levels = row.levels
    return {
        "name": row.name,
        "source": row.source,
        "ranks": ", ".join(runs(ranks)),
        "modules": [numbers[name] for name in row.modules],
        "computes": computes.numbers,
        "others": others.numbers,
        "idles": idles.numbers,
        "critical": critical.numbers,
        "memory": _memory(levels, scale),
        "kept": levels[0].kept.bytes if levels else 0,
        "peak": max((level.bytes for level in levels), default=0),
    }


class _Deltas:
    """Intervals as whole numbers: each begin is counted from the end of the interval before."""

    def __init__(self, scale: float) -> None:
        self._scale, self._last = scale, 0
        self.numbers: list[int] = []

    def add(self, begin_s: float, end_s: float, *more: int) -> None:
        begin, end = round(begin_s * self._scale), round(end_s * self._scale)
        self.numbers += (begin - self._last, end - begin, *more)
        self._last = end


def _memory(levels: Sequence[Level], scale: float) -> list[int]:
    """Return when levels begin, counted from the one before, and their bytes."""
    numbers: list[int] = []
    last = 0
    width = PARTS / LEVELS
    for _, found in itertools.groupby(levels, key=lambda level: int(level.at_s * scale / width)):
        group = list(found)
        for level in dict.fromkeys((max(group, key=lambda each: each.bytes), group[-1])):
            at = max(round(level.at_s * scale), last)
            numbers += (at - last, level.bytes)
            last = at
    return numbers


def curve_of(name: str, points: Iterable[tuple[float, float]]) -> Value:
    """Return a curve; of many points, those of equal stretches that are lowest, highest and last.

    >>> curve_of("loss", [(1, 4.0), (2, float("nan")), (3, 3.5)])
    {'name': 'loss', 'x': [1, 3], 'y': [4.0, 3.5]}
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    size = max(1, math.ceil(3 * len(finite) / POINTS))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(finite), size):
        stretch = finite[start : start + size]
        kept += sorted({min(stretch, key=_height), max(stretch, key=_height), stretch[-1]})
    return {"name": name, "x": [x for x, _ in kept], "y": [y for _, y in kept]}


def _height(point: tuple[float, float]) -> float:
    return point[1]


def facts_of(pairs: Mapping[str, str]) -> list[list[str]]:
    """Return what the top of the page says, line by line."""
    return [[name, value] for name, value in pairs.items() if value]
