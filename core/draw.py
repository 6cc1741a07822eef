"""Draw: timelines and layouts as pictures. Text for a terminal, SVG for a page, a trace for Perfetto.

A timeline is a sequence of `Event`, whoever made it: a simulated step and a measured one are drawn alike.
Rows are ranks; a cell is a compute action with the number of its microbatch. Without colour a forward is a
light cell, a backward a dark one, the gradient of inputs striped, that of weights an outline.

>>> from mimogrid.core.schedule.actions import parse
>>> lines = [(0, "a.0 F0", 0, 1), (0, "a.0 B0", 2, 4), (1, "b.0 F0", 1, 2)]
>>> print(text(Event(rank, parse(line), begin, end) for rank, line, begin, end in lines))
rank 0  a.0 | F0    B0───
rank 1  b.0 |    F0
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

import attrs

from mimogrid.core.schedule.actions import Action, Compute, Kind, Norm, Recv, Reduce, Send, Tie, Update, Wait
from mimogrid.core.schedule.lower import Program
from mimogrid.core.schedule.replay import postings
from mimogrid.core.timeline import (
    DRAIN,
    EDGE,
    SLOWER_MODULE,
    WARM_UP,
    Event,
    Flight,
    Idle,
    by_rank,
    idles,
    sent_as,
    span,
)
from mimogrid.core.topology import Module, StageInfo, Topology


# -- text --------------------------------------------------------------------------------------------------


def text(events: Iterable[Event], *, columns: int = 150) -> str:
    """Return a row per rank, to scale; neighbours that do the same share a row."""
    mine = by_rank(events)
    computes = [e for rank in mine for e in _computes(mine[rank])]
    begin, end = span(computes)
    scale = min(_text_scale(computes), columns / (end - begin) if end > begin else 1.0)
    rows = [(rank, _hosted(found), _text_row(_computes(found), begin, scale)) for rank, found in mine.items()]
    lines: list[tuple[str, str, str]] = []
    for (hosted, row), same in itertools.groupby(rows, key=lambda row: row[1:]):
        ranks = [rank for rank, *_ in same]
        lines += [(f"rank {run}", hosted, row) for run in _runs(ranks)]
    wide = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
    return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}} | {row}".rstrip() for a, b, row in lines)


def _text_scale(computes: Sequence[Event]) -> float:
    """Columns a second, so that the shortest action holds its name and a blank."""
    return max((_breadth(e) / (e.end_s - e.begin_s) for e in computes if e.end_s > e.begin_s), default=1.0)


def _breadth(event: Event) -> int:
    return len(_label(event.action)) + 1


def _label(action: Action) -> str:
    return f"{action.kind.value}{action.microbatch}" if isinstance(action, Compute) else ""


def _text_row(computes: Sequence[Event], begin: float, scale: float) -> str:
    row = ""
    for event in computes:
        start, stop = (round((t - begin) * scale) for t in (event.begin_s, event.end_s))
        room = stop - start
        label = _label(event.action)
        if room > len(label):
            cell = f"{label:─<{room - 1}} " if room > len(label) + 1 else f"{label} "
        else:
            cell = label[:1].ljust(room, "─")[:room]
        row = row.ljust(start)[:start] + cell
    return row.rstrip()


def _runs(ranks: Sequence[int]) -> Iterator[str]:
    """Write ascending numbers in short.

    >>> list(_runs([0, 1, 2, 4]))
    ['0-2', '4']
    """
    for _, run in itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        found = [rank for _, rank in run]
        yield str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _computes(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if isinstance(event.action, Compute)]


def _hosted(events: Iterable[Event]) -> str:
    """The stages that a rank computes, in order of their first action."""
    return " ".join(dict.fromkeys(str(e.action.stage) for e in events if isinstance(e.action, Compute)))


# -- SVG: the parts ----------------------------------------------------------------------------------------


@attrs.frozen
class _Ink:
    """The colours of a module: light under dark text, dark under white text."""

    light: str
    dark: str


INKS = (
    _Ink("#b3d4ee", "#0b5c96"),
    _Ink("#fad7a0", "#a85400"),
    _Ink("#a9dfca", "#00694e"),
    _Ink("#ecc6dd", "#8c3a6e"),
    _Ink("#efe6a0", "#6f6400"),
    _Ink("#d2cdea", "#4f4496"),
)
"""After Okabe and Ito; told apart with any colour vision, and each pair by lightness alone."""

BLACK, GREY, FAINT = "#1d2733", "#5b6875", "#dfe4e9"
SHADES = {WARM_UP: "#eef1f4", SLOWER_MODULE: "url(#slower)", EDGE: "url(#edge)", DRAIN: "#e0e5ea"}
TOLD = {
    WARM_UP: "warm-up",
    SLOWER_MODULE: "waits for a slower stage",
    EDGE: "waits for a message",
    DRAIN: "drain",
}
KINDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRADIENT: "input gradient",
    Kind.WEIGHT_GRADIENT: "weight gradient",
}
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
PATTERNS = (
    '<pattern id="slower" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<rect width="6" height="6" fill="#fbfbfb"/><circle cx="3" cy="3" r="1.1" fill="#9aa5b1"/></pattern>'
    '<pattern id="edge" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#fbfbfb"/><rect width="1.6" height="6" fill="#9aa5b1"/></pattern>'
    '<pattern id="stripes" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="2" height="5" fill="#ffffff" fill-opacity="0.35"/></pattern>'
)


def _width_of(words: str, size: float) -> float:
    """How wide a text is at most: fonts differ, so this errs on the wide side."""
    return len(words) * size * 0.6


def _document(width: float, height: float, parts: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="{FONT}">'
    )
    paper = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join((head, f"<defs>{PATTERNS}</defs>", paper, *parts, "</svg>\n"))


def _rect(x: float, y: float, width: float, height: float, fill: str, *, more: str = "") -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"{more}/>'


def _words(x: float, y: float, words: str, *, size: float, fill: str = BLACK, more: str = "") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" fill="{fill}"{more}>{escape(words)}</text>'


MIDDLE, BOLD, RIGHT = ' text-anchor="middle"', ' font-weight="bold"', ' text-anchor="end"'


# -- SVG: a timeline ---------------------------------------------------------------------------------------


WIDEST, NARROWEST, MARGIN = 1500.0, 640.0, 16.0
VISIBLE = 0.3
ROW_HEIGHTS = ((16, 28.0), (32, 22.0), (math.inf, 17.0))
"""How high a row is by how many there are at most."""


@attrs.frozen
class _Chart:
    """Where things are on a chart of a timeline."""

    left: float
    top: float
    row: float
    begin: float
    scale: float
    width: float

    def x(self, seconds: float) -> float:
        return self.left + (seconds - self.begin) * self.scale

    @property
    def cell(self) -> float:
        """Height of a cell."""
        return round(self.row * 0.68)

    @property
    def font(self) -> float:
        return min(11.0, self.cell * 0.72)


def svg(events: Sequence[Event], *, flights: Iterable[Flight] = (), title: str = "") -> str:
    """Return a timeline as SVG: a row per rank, coloured by module."""
    flights = tuple(flights)
    mine = by_rank(events)
    inks = _inks(dict.fromkeys(e.action.stage.module for e in events if isinstance(e.action, Compute)))
    names = {rank: _hosted(found) for rank, found in mine.items()}
    found_idle = idles(events, flights)
    legend = _legend(inks, events, {idle.cause for idle in found_idle})
    chart, lines = _chart(events, names, title, legend)
    parts = [_words(MARGIN, MARGIN + 14, title, size=14, more=BOLD)] if title else []
    for i, line in enumerate(lines):
        parts += _drawn_legend(line, MARGIN + (26 if title else 0) + 20 * i)
    bottom = chart.top + chart.row * len(mine)
    parts += _axis(chart, span(events), bottom)
    where = {rank: chart.top + chart.row * i for i, rank in enumerate(mine)}
    for idle in found_idle:
        parts.append(_shade(chart, idle, where[idle.rank]))
    for rank, found in mine.items():
        parts += _row(chart, rank, found, inks, where[rank])
    parts += _groups(chart, mine, inks, where)
    return _document(chart.left + chart.width + MARGIN, bottom + 34, parts)


def _inks(modules: Iterable[str]) -> dict[str, _Ink]:
    return {name: INKS[i % len(INKS)] for i, name in enumerate(modules)}


def _chart(
    events: Sequence[Event], names: Mapping[int, str], title: str, legend: list["LegendEntry"]
) -> tuple[_Chart, list[list["LegendEntry"]]]:
    """Return where things are, and the lines that the legend takes."""
    begin, end = span(events)
    ranks = len(names)
    row = next(height for most, height in ROW_HEIGHTS if ranks <= most)
    labels = (f"rank {rank}  {hosted}" for rank, hosted in names.items())
    left = MARGIN + 14 + max((_width_of(label, 11) for label in labels), default=0.0)
    computes = [e for e in events if isinstance(e.action, Compute) and e.end_s > e.begin_s]
    wanted = max(((7.0 * len(_label(e.action)) + 6) / (e.end_s - e.begin_s) for e in computes), default=1.0)
    long = max(end - begin, 1e-30)
    width = min(max(wanted * long, NARROWEST), WIDEST)
    lines = _wrapped(legend, left + width - MARGIN)
    top = MARGIN + (26 if title else 0) + 20 * len(lines) + 10
    return _Chart(left, top, row, begin, width / long, width), lines


def _shade(chart: _Chart, idle: Idle, y: float) -> str:
    x = chart.x(idle.begin_s)
    return _rect(x, y, chart.x(idle.end_s) - x, chart.cell, SHADES[idle.cause])


def _row(
    chart: _Chart, rank: int, events: Sequence[Event], inks: Mapping[str, _Ink], y: float
) -> Iterator[str]:
    middle = y + chart.cell / 2 + chart.font * 0.36
    yield _words(chart.left - 8, middle, f"rank {rank}  {_hosted(events)}", size=chart.font, more=RIGHT)
    for event in events:
        x, width = chart.x(event.begin_s), (event.end_s - event.begin_s) * chart.scale
        match event.action:
            case Compute() as action:
                tip = f"{action}: {event.begin_s - chart.begin:.6g} to {event.end_s - chart.begin:.6g} s"
                yield f"<g><title>{escape(tip)}</title>"
                yield from _cell(chart, action, inks[action.stage.module], (x, width), y)
                yield "</g>"
            case Wait() if width > VISIBLE:
                dash = ' stroke-dasharray="3 2"' if isinstance(event.action.transfer, Send) else ""
                lane, thin = y + chart.cell + chart.row * 0.11, chart.row * 0.06
                yield (
                    f'<path d="M{x:.2f} {lane:.2f}h{width:.2f}" '
                    f'stroke="{GREY}" stroke-width="{thin:.2f}"{dash}>'
                    f"<title>{escape(str(event.action))}</title></path>"
                )
            case Reduce() | Tie() | Norm() | Update() if width > VISIBLE:
                yield _rect(x, y, width, chart.cell, GREY)
            case _:
                pass


def _cell(chart: _Chart, action: Compute, ink: _Ink, extent: tuple[float, float], y: float) -> Iterator[str]:
    x, width = extent
    edge = ' stroke="#ffffff" stroke-width="0.8"' if width > 4 else ""  # noqa: PLR2004
    colour = "#ffffff"
    match action.kind:
        case Kind.FORWARD:
            colour = BLACK
            yield _rect(x, y, width, chart.cell, ink.light, more=edge)
        case Kind.BACKWARD:
            yield _rect(x, y, width, chart.cell, ink.dark, more=edge)
        case Kind.INPUT_GRADIENT:
            yield _rect(x, y, width, chart.cell, ink.dark, more=edge)
            yield _rect(x, y, width, chart.cell, "url(#stripes)")
        case Kind.WEIGHT_GRADIENT:
            colour = ink.dark
            outline = f' stroke="{ink.dark}" stroke-width="1.4"'
            yield _rect(x + 1, y + 1, max(width - 2, 0.5), chart.cell - 2, "#ffffff", more=outline)
    label = str(action.microbatch)
    if _width_of(label, chart.font) + 2 <= width:
        middle = y + chart.cell / 2 + chart.font * 0.36
        yield _words(x + width / 2, middle, label, size=chart.font, fill=colour, more=MIDDLE)


def _groups(
    chart: _Chart, mine: Mapping[int, Sequence[Event]], inks: Mapping[str, _Ink], where: Mapping[int, float]
) -> Iterator[str]:
    """A bar in the colours of its modules beside each row, and a line between groups."""
    before: tuple[str, ...] | None = None
    for rank, events in mine.items():
        modules = tuple(dict.fromkeys(e.action.stage.module for e in events if isinstance(e.action, Compute)))
        height = chart.cell / max(len(modules), 1)
        for i, name in enumerate(modules):
            yield _rect(chart.left - 5, where[rank] + i * height, 4, height, inks[name].dark)
        if before not in (None, modules):
            y = where[rank] - (chart.row - chart.cell) / 2 + 2
            line = f"M{MARGIN:g} {y:.2f}H{chart.left + chart.width:.2f}"
            yield f'<path d="{line}" stroke="{FAINT}" stroke-width="1.5"/>'
        before = modules


def _axis(chart: _Chart, whole: tuple[float, float], bottom: float) -> Iterator[str]:
    begin, end = whole
    step = _nice((end - begin) / (chart.width / 90)) if end > begin else 1.0
    count = math.floor((end - begin) / step + 1e-9)
    for i in range(count + 1):
        x = chart.x(begin + i * step)
        yield f'<path d="M{x:.2f} {chart.top - 4:.2f}V{bottom:.2f}" stroke="{FAINT}"/>'
        last = i == count
        label = f"{i * step:.6g}" + (" s" if last else "")
        yield _words(x, bottom + 15, label, size=10, fill=GREY, more=RIGHT if last and i else MIDDLE)


def _nice(rough: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten.

    >>> _nice(0.3), _nice(7)
    (0.5, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


LegendEntry = tuple[str, str, str]
"""Fill, additional attributes, words; without fill, a line."""


def _legend(inks: Mapping[str, _Ink], events: Sequence[Event], causes: set[str]) -> list[LegendEntry]:
    kinds = dict.fromkeys(e.action.kind for e in events if isinstance(e.action, Compute))
    entries: list[LegendEntry] = []
    for name, ink in inks.items():
        fills = {
            Kind.FORWARD: (ink.light, ""),
            Kind.BACKWARD: (ink.dark, ""),
            Kind.INPUT_GRADIENT: (ink.dark, "stripes"),
            Kind.WEIGHT_GRADIENT: ("#ffffff", f' stroke="{ink.dark}" stroke-width="1.4"'),
        }
        entries += [(*fills[kind], f"{name} {KINDS[kind]}") for kind in KINDS if kind in kinds]
    if any(isinstance(e.action, Wait) and e.end_s > e.begin_s for e in events):
        entries.append(("", "", "in a WAIT"))
    if any(isinstance(e.action, Reduce | Tie | Norm | Update) and e.end_s > e.begin_s for e in events):
        entries.append((GREY, "", "reduce, agree, update"))
    return entries + [(SHADES[cause], "", f"idle: {TOLD[cause]}") for cause in SHADES if cause in causes]


def _wrapped(entries: Iterable[LegendEntry], width: float) -> list[list[LegendEntry]]:
    lines: list[list[LegendEntry]] = [[]]
    used = 0.0
    for entry in entries:
        takes = 20 + _width_of(entry[2], 11) + 12
        if used + takes > width and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += takes
    return lines


def _drawn_legend(entries: Iterable[LegendEntry], y: float) -> Iterator[str]:
    x = MARGIN
    for fill, more, words in entries:
        if fill:
            yield _rect(x, y, 14, 12, fill, more="" if more == "stripes" else more)
            if more == "stripes":
                yield _rect(x, y, 14, 12, "url(#stripes)")
        else:
            yield f'<path d="M{x:g} {y + 6:g}h14" stroke="{GREY}" stroke-width="2"/>'
        yield _words(x + 20, y + 10, words, size=11)
        x += 20 + _width_of(words, 11) + 12


# -- SVG: a layout -----------------------------------------------------------------------------------------


PER_LINE = 16
CELL_WIDTH, CELL_HEIGHT, SMALLEST = 74.0, 40.0, 7.5


@attrs.frozen
class _Map:
    """What the cells of a map of ranks are drawn from."""

    topology: Topology
    inks: Mapping[str, _Ink]
    left: float

    def x(self, column: int) -> float:
        return self.left + column * CELL_WIDTH

    def rows(self, ranks: range) -> list[str]:
        """The modules that some of these ranks host, and `IDLE` if one hosts none."""
        modules = self.topology.modules
        hosting = [name for name in modules if any(rank in modules[name].grid for rank in ranks)]
        return hosting + [IDLE] * any(not self.topology.stages_of(rank) for rank in ranks)


def _fitting(words: str, size: float, *, bold: bool = False) -> float:
    """Return the size, up to `size`, at which a text fits into a cell."""
    return round(min(size, (CELL_WIDTH - 8) / _width_of(words, 1.2 if bold else 1)), 2)


IDLE = ""
"""Stands for the row of ranks without a module."""


def rank_map_svg(topology: Topology) -> str:
    """Return who is where: a row per module, a column per rank; in a cell the stage and position."""
    inks = _inks(topology.modules)
    told = [(_width_of(name, 13) + 8, _width_of(_role(m), 10.5)) for name, m in topology.modules.items()]
    drawn = _Map(topology, inks, 2 * MARGIN + max(max(pair) for pair in told))
    size = topology.world_size
    parts: list[str] = []
    top = MARGIN
    for start in range(0, size, PER_LINE):
        ranks = range(start, min(start + PER_LINE, size))
        parts += _map_line(drawn, ranks, top)
        top += 20 + (CELL_HEIGHT + 6) * len(drawn.rows(ranks)) + 14
    return _document(drawn.x(min(size, PER_LINE)) + MARGIN, top, parts)


def _role(module: Module) -> str:
    """A module's place in the whole, in a few words."""
    told = f"feeds {', '.join(edge.target for edge in module.outputs)}" if module.outputs else "has the loss"
    return told if any(info.trainable for info in module.stages) else f"{told}; frozen"


def _map_line(drawn: _Map, ranks: range, top: float) -> Iterator[str]:
    topology = drawn.topology
    yield _words(drawn.left - 12, top + 12, "rank", size=11, fill=GREY, more=RIGHT)
    for i, rank in enumerate(ranks):
        yield _words(drawn.x(i) + CELL_WIDTH / 2, top + 12, str(rank), size=11, fill=GREY, more=MIDDLE)
    y = top + 20
    for name in drawn.rows(ranks):
        module = topology.modules.get(name)
        ink = drawn.inks[name].dark if module else GREY
        yield _words(MARGIN, y + 17, name or "no module", size=13, fill=ink, more=BOLD)
        yield _words(MARGIN, y + 32, _role(module) if module else "idle", size=10.5, fill=GREY)
        line = drawn.x(len(ranks))
        yield f'<path d="M{drawn.left:g} {y + CELL_HEIGHT + 3:g}H{line:g}" stroke="{FAINT}"/>'
        for i, rank in enumerate(ranks):
            hosted = topology.stages_of(rank)
            if not hosted and not module:
                yield _rect(drawn.x(i) + 2, y, CELL_WIDTH - 4, CELL_HEIGHT, "url(#slower)", more=' rx="4"')
            for info in hosted:
                if info.stage.module == name:
                    yield from _map_cell(drawn, info, rank, drawn.x(i), y)
        y += CELL_HEIGHT + 6


def _map_cell(drawn: _Map, info: StageInfo, rank: int, x: float, y: float) -> Iterator[str]:
    """One rank's cell in a module: odd stages dark, so that the borders between stages are seen."""
    ink, grid = drawn.inks[info.stage.module], drawn.topology.modules[info.stage.module].grid
    fill, colour = (ink.dark, "#ffffff") if info.stage.pp % 2 else (ink.light, BLACK)
    position = grid.position(rank)
    told = " ".join(f"{axis}{i}" for axis, i in position.items() if axis != "pp" and grid.extent(axis) > 1)
    yield f"<g><title>{escape(f'rank {rank}: {info.stage}, {position}')}</title>"
    yield _rect(x + 2, y, CELL_WIDTH - 4, CELL_HEIGHT, fill, more=' rx="4"')
    middle = x + CELL_WIDTH / 2
    size = _fitting(str(info.stage), 11, bold=True)
    stage = str(info.stage) if size >= SMALLEST else f"pp{info.stage.pp}"
    size = max(size, SMALLEST)
    yield _words(middle, y + (17 if told else 24), stage, size=size, fill=colour, more=MIDDLE + BOLD)
    if told:
        yield _words(middle, y + 32, told, size=_fitting(told, 10.5), fill=colour, more=MIDDLE)
    yield "</g>"


# -- Perfetto ----------------------------------------------------------------------------------------------


COMPUTING, MOVING = 0, 1
"""The two tracks of a rank."""


def perfetto(
    events: Iterable[Event], *, names: Mapping[int, str], program: Program | None = None
) -> dict[str, Any]:
    """Return a timeline in the JSON format that Perfetto and Chrome open; `names` tells a rank's stages.

    With the program of the step, arrows lead from the action that made a message to the one that reads it.
    """
    events = tuple(events)
    begin, _ = span(events)
    found: list[dict[str, Any]] = []
    for rank in sorted({event.rank for event in events}):
        told = f"rank {rank}: {names[rank]}" if names.get(rank) else f"rank {rank}"
        found += [
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": told}},
            {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}},
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": COMPUTING, "args": {"name": "compute"}},
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": MOVING, "args": {"name": "transfers"}},
        ]
    found += [_slice(event, begin) for event in events]
    found += _arrows(events, begin, program) if program else ()
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def _slice(event: Event, begin: float) -> dict[str, Any]:
    action = event.action
    args: dict[str, Any] = {}
    match action:
        case Compute():
            category, name = KINDS[action.kind], str(action)
            args = {"stage": str(action.stage), "microbatch": action.microbatch}
        case Wait():
            category, name = "wait", str(action)
        case Send() | Recv():
            category, name = "post", str(action)
        case Reduce() | Tie() | Norm() | Update():
            category, name = "finish", str(action)
    moves = isinstance(action, Send | Recv | Wait)
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": event.rank,
        "tid": MOVING if moves else COMPUTING,
        "ts": (event.begin_s - begin) * 1e6,
        "dur": (event.end_s - event.begin_s) * 1e6,
        "args": args,
    }


def _arrows(events: Iterable[Event], begin: float, program: Program) -> Iterator[dict[str, Any]]:
    """Yield both ends of an arrow per message; each binds to a compute action just within its bounds."""
    made: dict[tuple[int, int, Send], Event] = {}
    read: dict[tuple[int, int, Send], Event] = {}
    for rank, mine in by_rank(events).items():
        before: Event | None = None
        waited: list[Recv] = []
        for event in mine:
            match event.action:
                case Compute(stage=stage):
                    before = event
                    for recv in [recv for recv in waited if recv.stage == stage]:
                        waited.remove(recv)
                        for peer in _peers(program, rank, recv):
                            read[peer, rank, sent_as(recv)] = event
                case Send() if before:
                    for peer in _peers(program, rank, event.action):
                        made[rank, peer, event.action] = before
                case Wait(transfer=Recv() as recv):
                    waited.append(recv)
                case _:
                    pass
    for number, key in enumerate(key for key in made if key in read):
        name = {"name": str(key[2]), "cat": "message", "id": number}
        start, stop = made[key], read[key]
        within = 0.01 * (start.end_s - start.begin_s), 0.01 * (stop.end_s - stop.begin_s)
        leaves, arrives = start.end_s - within[0] - begin, stop.begin_s + within[1] - begin
        yield {**name, "ph": "s", "pid": key[0], "tid": COMPUTING, "ts": leaves * 1e6}
        yield {**name, "ph": "f", "bp": "e", "pid": key[1], "tid": COMPUTING, "ts": arrives * 1e6}


def _peers(program: Program, rank: int, transfer: Send | Recv) -> tuple[int, ...]:
    return tuple(mine.other for mine, _ in postings(program, rank, transfer) if mine.other != rank)
