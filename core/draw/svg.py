"""SVG: timelines as a page. A row is a rank: what it computes, why it idles, and under it what it holds in memory.

        vision   dp 2
    rank 0  vision.0     | 0 | 1 | 2 |            |   0   | 3 |   1   |           cells to scale
                         ▂▃▄▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▄▄▄▄▅▅▅▅▄▄▄▄▄▄▄▄▄▄▄   4.42 MB  bytes, and the most of them

Several pictures stand one above the other on one scale of time and one of memory. What is too small to be told apart is
merged, and of too many messages some are drawn, so a page has a bounded size for any world.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.draw import marks
from mimogrid.core.draw.marks import BLACK, BOLD, GREY, MIDDLE, RIGHT, WHITE, Fill, Ink
from mimogrid.core.draw.picture import Picture, Row
from mimogrid.core.memory import Level
from mimogrid.core.schedule.actions import Compute, Direction, Kind, Norm, Send, Tie, Update, WaitReduce
from mimogrid.core.timeline import DRAIN, EDGE, SLOWER_MODULE, WARM_UP, Flight


SHADES = {WARM_UP: "#f3f5f8", SLOWER_MODULE: "dots", EDGE: "slants", DRAIN: "lines"}
"""How idle time is shaded: differently without colour, too."""
TOLD = {
    WARM_UP: "warm-up",
    SLOWER_MODULE: "waits for a slower stage",
    EDGE: "waits for a message",
    DRAIN: "drain",
}
KEPT, PASSING = "#b4bec8", "#66727f"
CRITICAL = "#111111"
WIDEST, NARROWEST, MARGIN = 1500.0, 640.0, 16.0
LONGEST_NAME = 300.0
TITLE, HEADING, LEGEND, AXIS = 14.0, 11.5, 11.0, 10.0
SIZES = ((16, (20.0, 16.0, 8.0)), (40, (15.0, 11.0, 6.0)), (math.inf, (11.0, 7.0, 4.0)))
"""Heights of a cell, of the memory under it and of the gap to the next row, by how many rows there are at most."""
SMALL, VISIBLE = 3.0, 0.7
"""A narrower cell has neither border nor tip; and what is narrower yet is merged with what follows."""
MOST_ARROWS = 160


def svg(*pictures: Picture) -> str:
    """Return a page with pictures one above the other."""
    page = _page(pictures)
    parts: list[str] = []
    y = MARGIN
    for number, picture in enumerate(pictures):
        for told in marks.wrapped(picture.title, TITLE, page.width - 2 * MARGIN):
            parts.append(marks.words(MARGIN, y + TITLE, told, size=TITLE, more=BOLD))
            y += TITLE + 6
        if picture.note:
            parts.append(marks.words(MARGIN, y + LEGEND, picture.note, size=LEGEND, fill=GREY))
            y += LEGEND + 8
        arrows, stride = _thinned(picture.flights)
        if not number:
            lines = _wrapped(_legend(pictures, page, stride if arrows else 0), page.width - 2 * MARGIN)
            for line in lines:
                parts += _drawn_legend(line, y + 4)
                y += 19
            y += 6 if lines else 0
        drawn, y = _picture(page, picture, arrows, y)
        parts += drawn
    return marks.document(page.width, y + MARGIN - 6, parts)


# -- where things are --------------------------------------------------------------------------------------


@attrs.frozen
class _Page:
    """What is common to all rows of a page; lengths in pixels."""

    inks: Mapping[str, Ink]
    chunks: Mapping[str, int]
    left: float
    long: float
    step_s: float
    most_bytes: int
    right: float
    cell: float
    strip: float
    gap: float

    @property
    def width(self) -> float:
        return self.left + self.long + self.right

    @property
    def end(self) -> float:
        """Where the longest step ends."""
        return self.left + self.long

    @property
    def font(self) -> float:
        return round(min(11.0, self.cell * 0.76), 1)

    @property
    def scale(self) -> float:
        """Pixels a second."""
        return self.long / self.step_s if self.step_s else 0.0

    def x(self, seconds: float) -> float:
        return self.left + seconds * self.scale

    def height(self, row: Row) -> float:
        return self.cell + (1 + self.strip if row.remembers else 0)


def _page(pictures: Sequence[Picture]) -> _Page:
    rows = [row for picture in pictures for row in picture.rows]
    topologies = {id(row.timeline): row.timeline.program.topology for row in rows}.values()
    modules = {name: module for topology in topologies for name, module in topology.modules.items()}
    chunks = {
        name: max(
            topology.modules[name].stages[-1].stage.chunk + 1
            for topology in topologies
            if name in topology.modules
        )
        for name in modules
    }
    cell, strip, gap = next(size for most, size in SIZES if len(rows) <= most)
    step_s = max((row.timeline.step_s for row in rows), default=0.0)
    font = min(11.0, cell * 0.76)
    names = (marks.width_of(_name(row, font), font) for row in rows)
    headings = (sum(w for _, _, w in _headed(row)) for row in rows)
    left = MARGIN + 16 + max((*names, *headings), default=0.0)
    wanted = max(
        (
            (marks.width_of(str(action.microbatch), font) + 5) / (event.end_s - event.begin_s)
            for row in rows
            for event, action in row.computes
            if event.end_s > event.begin_s
        ),
        default=1.0,
    )
    long = min(max(wanted * step_s, NARROWEST), WIDEST)
    most = max((level.bytes for row in rows for level in row.levels), default=0)
    right = 10 + marks.width_of("9.99 MB", _small(cell)) + MARGIN
    return _Page(marks.inks_of(modules), chunks, left, long, step_s, most, right, cell, strip, gap)


def _small(cell: float) -> float:
    """The size of what is told beside a strip."""
    return 9.5 if cell > 11 else 7.5  # noqa: PLR2004


def _name(row: Row, font: float) -> str:
    told = f"{row.name}  {row.told}" if row.told else row.name
    return marks.cut(told, font, LONGEST_NAME)


# -- one picture -------------------------------------------------------------------------------------------


def _picture(page: _Page, picture: Picture, arrows: Sequence[Flight], top: float) -> tuple[list[str], float]:
    """Return the parts of a picture that begins at `top`, and where it ends."""
    y = top
    headings: list[str] = []
    where: dict[int, float] = {}
    placed: list[tuple[Row, float]] = []
    for modules, rows in picture.groups:
        headings += _heading(page, modules, rows[0], y)
        y += HEADING + 9
        for row, following in itertools.zip_longest(rows, rows[1:]):
            where.setdefault(row.rank, y)
            placed.append((row, y))
            pairs = following is not None and following.rank == row.rank
            y += page.height(row) + (2 if pairs else page.gap)
        y += 3
    parts = list(_axis(page, picture, top + 4, y))
    for row, at in placed:
        parts += _row(page, row, at)
    parts += headings
    for row, at in placed:
        parts += _critical(page, row, at)
    parts += _arrows(page, picture, arrows, where)
    return parts, y + 26


def _heading(page: _Page, modules: tuple[str, ...], row: Row, y: float) -> Iterator[str]:
    """Each module with the sizes of its grid."""
    x, base = MARGIN, y + HEADING
    for name, (_, sizes, width) in zip(modules, _headed(row), strict=True):
        yield marks.words(x, base, name, size=HEADING, fill=page.inks[name].dark, more=BOLD)
        after = x + marks.width_of(name, HEADING * 1.08) + 8
        if sizes:
            yield marks.words(after, base, sizes, size=AXIS, fill=GREY)
        x += width
    yield marks.line(f"M{max(x, page.left):.2f} {y + HEADING * 0.62:.2f}H{page.end:.2f}")


def _headed(row: Row) -> Iterator[tuple[str, str, float]]:
    """Yield the modules of a row, the sizes of their grids, and how wide a heading that makes."""
    topology = row.timeline.program.topology
    for name in row.modules:
        axes = topology.modules[name].grid.axes
        sizes = ", ".join(f"{axis.name} {axis.size}" for axis in axes if axis.size > 1)
        width = marks.width_of(name, HEADING * 1.08) + 8
        yield name, sizes, width + (marks.width_of(sizes, AXIS) + 12 if sizes else 0)


def _axis(page: _Page, picture: Picture, top: float, bottom: float) -> Iterator[str]:
    if not page.step_s:
        return
    step = _nice(page.step_s / (page.long / 90))
    count = math.floor(page.step_s / step + 1e-9)
    for i in range(count + 1):
        x = page.x(i * step)
        yield marks.line(f"M{x:.2f} {top:.2f}V{bottom:.2f}")
        last = i == count
        told = f"{i * step:.6g}" + (" s" if last else "")
        yield marks.words(x, bottom + 13, told, size=AXIS, fill=GREY, more=RIGHT if last and i else MIDDLE)
    for end in {row.timeline.step_s for row in picture.rows}:
        dash = ' stroke-dasharray="4 3"'
        yield marks.line(f"M{page.x(end):.2f} {top:.2f}V{bottom:.2f}", stroke=GREY, more=dash)


def _nice(rough: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten.

    >>> _nice(0.3), _nice(7)
    (0.5, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


# -- a row -------------------------------------------------------------------------------------------------


def _row(page: _Page, row: Row, y: float) -> Iterator[str]:
    base = y + page.cell / 2 + page.font * 0.36
    yield marks.words(page.left - 10, base, _name(row, page.font), size=page.font, more=RIGHT)
    height = page.cell / max(len(row.modules), 1)
    for i, name in enumerate(row.modules):
        yield marks.rect(page.left - 6, y + i * height, 4, height, page.inks[name].dark)
    for idle in row.idles:
        width = (idle.end_s - idle.begin_s) * page.scale
        if width >= VISIBLE:
            yield marks.rect(page.x(idle.begin_s), y, width, page.cell, SHADES[idle.cause])
    yield from _cells(page, row, y)
    for event in row.events:
        width = (event.end_s - event.begin_s) * page.scale
        if isinstance(event.action, WaitReduce | Tie | Norm | Update) and width >= VISIBLE:
            thin = page.cell * 0.4
            box = marks.rect(page.x(event.begin_s), y + (page.cell - thin) / 2, width, thin, GREY)
            yield from marks.with_tip(str(event.action), [box])
    if row.remembers:
        yield from _strip(page, row, y + page.cell + 1)


def _cells(page: _Page, row: Row, y: float) -> Iterator[str]:
    """Wide actions as cells with numbers and tips; narrow ones as one shape per colour."""
    narrow: dict[str, list[str]] = collections.defaultdict(list)
    until = -math.inf
    for event, action in row.computes:
        x, width = page.x(event.begin_s), (event.end_s - event.begin_s) * page.scale
        fill = page.inks[action.stage.module].of(
            action.kind, action.stage.chunk, page.chunks[action.stage.module]
        )
        if width >= SMALL:
            tip = f"{action}: {event.begin_s:.6g} to {event.end_s:.6g} s"
            yield from marks.with_tip(tip, _cell(page, action, fill, (x, width), y))
        elif x + width >= until + VISIBLE:
            begin = max(x, until) if x - until < VISIBLE else x
            narrow[fill.outline or fill.colour].append(f"M{begin:.1f} {y:g}h{x + width - begin:.1f}")
            until = x + width
    for colour, lines in narrow.items():
        middle = page.cell / 2
        path = "".join(lines)
        more = f' transform="translate(0 {middle:g})"'
        yield marks.line(path, stroke=colour, width=page.cell, more=more)


def _cell(page: _Page, action: Compute, fill: Fill, extent: tuple[float, float], y: float) -> Iterator[str]:
    x, width = extent
    border = f' stroke="{WHITE}" stroke-width="0.8"'
    yield from marks.filled(x, y, width, page.cell, fill, more=border)
    label = str(action.microbatch)
    if marks.width_of(label, page.font) + 2 <= width:
        # A halo in the colour of the cell keeps a number readable on stripes.
        halo = f' stroke="{fill.colour}" stroke-width="3" paint-order="stroke"' if fill.pattern else ""
        base = y + page.cell / 2 + page.font * 0.36
        yield marks.words(x + width / 2, base, label, size=page.font, fill=fill.text, more=MIDDLE + halo)


def _strip(page: _Page, row: Row, y: float) -> Iterator[str]:
    """Bytes over time on the scale of the page, what is kept all the time below, and the most of them beside it."""
    levels, end = row.levels, page.x(row.timeline.step_s)
    if not page.most_bytes or not levels:
        return
    peak = max(levels, key=lambda level: level.bytes)
    high = page.strip / page.most_bytes
    bottom = y + page.strip
    always = levels[0].kept.bytes * high
    parts: list[str] = []
    for begin, size in _steps(page, levels):
        parts.append(f"H{begin:.1f}V{bottom - size * high:.2f}")
    shape = f"M{page.left:.1f} {bottom:.2f}{''.join(parts)}H{end:.1f}V{bottom:.2f}z"
    told = ", ".join(f"{part} {marks.in_bytes(size)}" for part, size in peak.parts.items() if size)
    tip = f"at most {marks.in_bytes(peak.bytes)}, at {peak.at_s:.6g} s: {told}"
    yield from marks.with_tip(
        tip,
        (
            f'<path d="{shape}" fill="{PASSING}"/>',
            marks.rect(page.left, bottom - always, end - page.left, always, KEPT),
        ),
    )
    x, top = page.x(peak.at_s), bottom - peak.bytes * high
    yield f'<circle cx="{x:.1f}" cy="{top:.1f}" r="1.7" fill="{BLACK}"/>'
    told = marks.in_bytes(peak.bytes)
    yield marks.words(page.end + 8, bottom, told, size=_small(page.cell), fill=GREY)


def _steps(page: _Page, levels: Sequence[Level]) -> Iterator[tuple[float, int]]:
    """Yield where a level begins and how high it is; of those within a pixel the highest, then the last."""
    for at, found in itertools.groupby(levels, key=lambda level: round(page.x(level.at_s))):
        sizes = [level.bytes for level in found]
        yield at, max(sizes)
        if max(sizes) != sizes[-1]:
            yield at + 0.5, sizes[-1]


def _critical(page: _Page, row: Row, y: float) -> Iterator[str]:
    """A line around what the step waited for."""
    for leg in row.critical:
        width = (leg.end_s - leg.begin_s) * page.scale
        if isinstance(leg.action, Send) or width < VISIBLE:
            continue
        x = page.x(leg.begin_s)
        if width < SMALL:
            yield marks.line(
                f"M{x:.1f} {y - 1:g}h{width:.1f}M{x:.1f} {y + page.cell + 0.5:g}h{width:.1f}", stroke=CRITICAL
            )
            continue
        around = f' fill-opacity="0" stroke="{CRITICAL}" stroke-width="1.5"'
        yield marks.rect(x + 0.3, y - 0.4, width - 0.6, page.cell + 0.8, WHITE, more=around)


# -- messages ----------------------------------------------------------------------------------------------


def _thinned(flights: Iterable[Flight]) -> tuple[list[Flight], int]:
    """Return few enough messages to be seen, and of how many microbatches one is shown.

    First, all; then one of each transfer; then those of every second microbatch, of every fourth, ...
    """
    found = list(flights)
    if len(found) <= MOST_ARROWS:
        return found, 1
    found = list({flight.transfer: flight for flight in reversed(found)}.values())[::-1]
    stride = 1
    last = max(flight.transfer.microbatch for flight in found)
    while len(found) > MOST_ARROWS and stride <= last:
        stride *= 2
        found = [flight for flight in found if flight.transfer.microbatch % stride == 0]
    return found[:MOST_ARROWS], stride


def _arrows(
    page: _Page, picture: Picture, flights: Sequence[Flight], where: Mapping[int, float]
) -> Iterator[str]:
    critical = {
        (leg.action, leg.end_s)
        for row in picture.rows[:1]
        for leg in row.timeline.critical_path
        if isinstance(leg.action, Send)
    }
    for flight in flights:
        down = where[flight.rank_target] > where[flight.rank_source]
        begin = where[flight.rank_source] + (page.cell if down else 0)
        end = where[flight.rank_target] + (0 if down else page.cell)
        bold = (flight.transfer, flight.end_s) in critical
        dash = "" if flight.transfer.direction is Direction.FORWARD else ' stroke-dasharray="3 2"'
        more = f' marker-end="url(#tip)" stroke-opacity="{0.9 if bold else 0.5}"{dash}'
        path = f"M{page.x(flight.begin_s):.1f} {begin:.1f}L{page.x(flight.end_s):.1f} {end:.1f}"
        drawn = marks.line(path, stroke=BLACK, width=1.6 if bold else 0.8, more=more)
        ranks = f"rank {flight.rank_source} to {flight.rank_target}"
        yield from marks.with_tip(f"{flight.transfer}, {ranks}", [drawn])


# -- the legend --------------------------------------------------------------------------------------------


@attrs.frozen
class _Entry:
    """Words with what they explain: filled boxes with letters in them, or an arrow."""

    words: str
    swatches: tuple[tuple[Fill, str], ...] = ()
    dash: str = ""
    bold: bool = False

    @property
    def width(self) -> float:
        drawn = 20.0 * max(len(self.swatches), bool(self.dash))
        return drawn + marks.width_of(self.words, LEGEND * (1.08 if self.bold else 1)) + 14


def _legend(pictures: Sequence[Picture], page: _Page, stride: int) -> Iterator[_Entry]:
    rows = [row for picture in pictures for row in picture.rows]
    kinds: dict[tuple[str, int], set[Kind]] = collections.defaultdict(set)
    for row in rows:
        for _, action in row.computes:
            kinds[action.stage.module, action.stage.chunk].add(action.kind)
    for (name, chunk), found in sorted(
        kinds.items(), key=lambda item: (list(page.inks).index(item[0][0]), item[0][1])
    ):
        ink = page.inks[name]
        swatches = tuple(
            (ink.of(kind, chunk, page.chunks[name]), kind.value) for kind in marks.LETTERS if kind in found
        )
        yield _Entry(f"{name} chunk {chunk}" if page.chunks[name] > 1 else name, swatches, bold=True)
    seen = set[Kind]().union(*kinds.values())
    told = ", ".join(f"{kind.value} {words}" for kind, words in marks.LETTERS.items() if kind in seen)
    if told:
        yield _Entry(told)
    if any(
        isinstance(e.action, WaitReduce | Tie | Norm | Update) and e.end_s > e.begin_s
        for row in rows
        for e in row.events
    ):
        yield _Entry("reduce, agree, update", ((Fill(GREY, WHITE), ""),))
    causes = {idle.cause for row in rows for idle in row.idles}
    for cause, shade in SHADES.items():
        if cause in causes:
            yield _Entry(f"idle: {TOLD[cause]}", ((Fill(shade, BLACK), ""),))
    if any(row.timeline.critical_path for row in rows):
        yield _Entry("critical path", ((Fill(WHITE, BLACK, outline=CRITICAL), ""),))
    if stride:
        which = f" (microbatches {stride} apart)" if stride > 1 else ""
        yield _Entry(f"activations sent{which}", dash="none")
        if any(flight.transfer.direction is Direction.BACKWARD for flight in pictures[0].flights):
            yield _Entry("gradients sent", dash="3 2")
    if page.most_bytes:
        yield _Entry("weights, gradients, optimizer", ((Fill(KEPT, WHITE), ""),))
        yield _Entry("activations, buffers (estimated)", ((Fill(PASSING, BLACK), ""),))


def _wrapped(entries: Iterable[_Entry], width: float) -> list[list[_Entry]]:
    lines: list[list[_Entry]] = []
    used = 0.0
    for entry in entries:
        if not lines or used + entry.width > width:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += entry.width
    return lines


def _drawn_legend(entries: Iterable[_Entry], y: float) -> Iterator[str]:
    x = MARGIN
    for entry in entries:
        at = x
        for fill, letter in entry.swatches:
            yield from marks.filled(at, y, 16, 13, fill)
            if letter:
                yield marks.words(at + 8, y + 10.2, letter, size=9.5, fill=fill.text, more=MIDDLE)
            at += 20
        if entry.dash:
            more = f' stroke-dasharray="{entry.dash}" marker-end="url(#tip)"'
            yield marks.line(f"M{at:g} {y + 6.5:g}h15", stroke=BLACK, width=0.8, more=more)
            at += 20
        yield marks.words(at, y + 10.5, entry.words, size=LEGEND, more=BOLD if entry.bold else "")
        x += entry.width
