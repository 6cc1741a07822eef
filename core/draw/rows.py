"""Rows: what a rank computes, why it idles, and under it what it holds in memory.

    rank 0  vision.0     | 0 | 1 | 2 |            |   0   | 3 |   1   |           cells to scale
                         ▂▃▄▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▄▄▄▄▅▅▅▅▄▄▄▄▄▄▄▄▄▄▄   4.42 MB  bytes, and the most of them

Cells that are too small to be seen are merged.
"""

import collections
import itertools
import math
from collections.abc import Iterator, Sequence

from mimogrid.core.base.units import in_bytes
from mimogrid.core.draw import marks
from mimogrid.core.draw.marks import BLACK, GREY, MIDDLE, RIGHT, WHITE, Fill
from mimogrid.core.draw.page import SMALL, VISIBLE, Page, name_of
from mimogrid.core.draw.picture import Row
from mimogrid.core.schedule.actions import Compute, Norm, Send, Tie, Update, WaitCollective
from mimogrid.core.simulate.memory import Level
from mimogrid.core.simulate.timeline import DRAIN, EDGE, SLOWER_MODULE, WARM_UP


SHADES = {WARM_UP: "#f3f5f8", SLOWER_MODULE: "dots", EDGE: "slants", DRAIN: "lines"}
"""The shades of idle time, which differ without colour, too."""
KEPT, PASSING = "#b4bec8", "#66727f"
"""Colours of memory: of bytes that are there all the time, and of those that come and go."""
CRITICAL = "#111111"


def row_parts(page: Page, row: Row, y: float) -> Iterator[str]:
    """Draw a row whose top is at y. The critical path lies above all rows (`critical_parts`)."""
    base = y + page.cell / 2 + page.font * 0.36
    yield marks.words(page.left - 10, base, name_of(row, page.font), size=page.font, more=RIGHT)
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
        if isinstance(event.action, WaitCollective | Tie | Norm | Update) and width >= VISIBLE:
            low = page.cell * 0.4
            box = marks.rect(page.x(event.begin_s), y + (page.cell - low) / 2, width, low, GREY)
            yield from marks.with_tip(str(event.action), [box])
    if row.has_memory:
        yield from _strip(page, row, y + page.cell + 1)


def _cells(page: Page, row: Row, y: float) -> Iterator[str]:
    """Draw wide actions as cells with numbers and tips, and narrow ones as one shape per colour."""
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


def _cell(page: Page, action: Compute, fill: Fill, extent: tuple[float, float], y: float) -> Iterator[str]:
    x, width = extent
    border = f' stroke="{WHITE}" stroke-width="0.8"'
    yield from marks.filled(x, y, width, page.cell, fill, more=border)
    label = str(action.microbatch)
    if marks.width_of(label, page.font) + 2 <= width:
        base, wide = y + page.cell / 2 + page.font * 0.36, marks.width_of(label, page.font) + 1
        if fill.pattern:  # a light plate keeps a number readable on stripes, whatever draws the page
            plate = page.font * 0.98
            yield marks.rect(x + (width - wide) / 2, y + (page.cell - plate) / 2, wide, plate, WHITE)
        ink = BLACK if fill.pattern else fill.text
        yield marks.words(x + width / 2, base, label, size=page.font, fill=ink, more=MIDDLE)


def _strip(page: Page, row: Row, y: float) -> Iterator[str]:
    """Draw bytes over time on the scale of the page, those that are always there below, and the peak beside it."""
    levels, end = row.levels, page.x(row.extent[1])
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
    purposes = ", ".join(f"{part} {in_bytes(size)}" for part, size in peak.parts.items() if size)
    tip = f"at most {in_bytes(peak.bytes)}, at {peak.at_s:.6g} s: {purposes}"
    yield from marks.with_tip(
        tip,
        (
            f'<path d="{shape}" fill="{PASSING}"/>',
            marks.rect(page.left, bottom - always, end - page.left, always, KEPT),
        ),
    )
    x, top = page.x(peak.at_s), bottom - peak.bytes * high
    yield f'<circle cx="{x:.1f}" cy="{top:.1f}" r="1.7" fill="{BLACK}"/>'
    yield marks.words(page.end + 8, bottom, in_bytes(peak.bytes), size=page.small, fill=GREY)


def _steps(page: Page, levels: Sequence[Level]) -> Iterator[tuple[float, int]]:
    """Yield where a level begins, and its bytes. Of several within a pixel, the highest and then the last."""
    for at, found in itertools.groupby(levels, key=lambda level: round(page.x(level.at_s))):
        sizes = [level.bytes for level in found]
        yield at, max(sizes)
        if max(sizes) != sizes[-1]:
            yield at + 0.5, sizes[-1]


def critical_parts(page: Page, row: Row, y: float) -> Iterator[str]:
    """Draw a line around the segments of the critical path."""
    for segment in row.outlined:
        width = (segment.end_s - segment.begin_s) * page.scale
        if isinstance(segment.action, Send) or width < VISIBLE:
            continue
        x = page.x(segment.begin_s)
        if width < SMALL:
            yield marks.line(
                f"M{x:.1f} {y - 1:g}h{width:.1f}M{x:.1f} {y + page.cell + 0.5:g}h{width:.1f}", stroke=CRITICAL
            )
            continue
        around = f' fill-opacity="0" stroke="{CRITICAL}" stroke-width="1.5"'
        yield marks.rect(x + 0.3, y - 0.4, width - 0.6, page.cell + 0.8, WHITE, more=around)
