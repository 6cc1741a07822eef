"""SVG: timelines as a page. A row is a rank: what it computes, why it idles, and under it what it holds in memory.

        vision   dp 2
    rank 0  vision.0     | 0 | 1 | 2 |            |   0   | 3 |   1   |           cells to scale
                         ▂▃▄▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▄▄▄▄▅▅▅▅▄▄▄▄▄▄▄▄▄▄▄   4.42 MB  bytes, and the most of them

Several pictures stand one above the other, with one scale of time and one of memory. Cells that are too small to be
seen are merged, and of too many messages some are drawn. So a page has a bounded size for any world.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from mimogrid.core.draw import marks
from mimogrid.core.draw.arrows import arrow_parts, selected
from mimogrid.core.draw.legend import legend, legend_parts, wrapped
from mimogrid.core.draw.marks import BOLD, GREY, MIDDLE, RIGHT
from mimogrid.core.draw.page import AXIS, HEADING, LEGEND, MARGIN, TITLE, Page, headed, page_of, zoomed
from mimogrid.core.draw.picture import Picture, Row
from mimogrid.core.draw.rows import critical_parts, row_parts
from mimogrid.core.simulate.timeline import MessageInterval


def svg(*pictures: Picture) -> str:
    """Return a page with pictures one above the other."""
    page = page_of(pictures)
    parts: list[str] = []
    y = MARGIN
    for number, picture in enumerate(pictures):
        arrows, stride = selected(picture.messages)
        y = _title(page, picture, y, parts)
        if not number:
            y = _legend(page, pictures, stride if arrows else 0, y, parts)
        y = _picture(zoomed(page, picture), picture, arrows, y, parts)
    return marks.document(page.width, y + MARGIN - 6, parts)


# Each of these adds the parts that begin at `top`, and returns where they end.


def _title(page: Page, picture: Picture, top: float, parts: list[str]) -> float:
    y = top
    for line in marks.wrapped(picture.title, TITLE, page.width - 2 * MARGIN):
        parts.append(marks.words(MARGIN, y + TITLE, line, size=TITLE, more=BOLD))
        y += TITLE + 6
    if picture.note:
        parts.append(marks.words(MARGIN, y + LEGEND, picture.note, size=LEGEND, fill=GREY))
        y += LEGEND + 8
    return y


def _legend(page: Page, pictures: Sequence[Picture], stride: int, top: float, parts: list[str]) -> float:
    y = top
    lines = wrapped(legend(pictures, page, stride), page.width - 2 * MARGIN)
    for line in lines:
        parts += legend_parts(line, y + 4)
        y += 19
    return y + (6 if lines else 0)


def _picture(
    page: Page, picture: Picture, arrows: Sequence[MessageInterval], top: float, parts: list[str]
) -> float:
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
    parts += _axis(page, picture, top + 4, y)
    for row, at in placed:
        parts += row_parts(page, row, at)
    parts += headings
    for row, at in placed:
        parts += critical_parts(page, row, at)
    parts += arrow_parts(page, picture, arrows, where)
    return y + 26


def _heading(page: Page, modules: tuple[str, ...], row: Row, y: float) -> Iterator[str]:
    """Draw the name of each module with the sizes of its grid."""
    x, base = MARGIN, y + HEADING
    for name, (_, sizes, width) in zip(modules, headed(row), strict=True):
        yield marks.words(x, base, name, size=HEADING, fill=page.inks[name].dark, more=BOLD)
        after = x + marks.width_of(name, HEADING * 1.08) + 8
        if sizes:
            yield marks.words(after, base, sizes, size=AXIS, fill=GREY)
        x += width
    yield marks.line(f"M{max(x, page.left):.2f} {y + HEADING * 0.62:.2f}H{page.end:.2f}")


def _axis(page: Page, picture: Picture, top: float, bottom: float) -> Iterator[str]:
    """Draw a line for every round number of seconds, and a dashed one where a step ends."""
    if not page.step_s:
        return
    step = _nice(page.step_s / (page.long / 90))
    first, count = math.ceil(page.begin_s / step), math.floor((page.begin_s + page.step_s) / step + 1e-9)
    for i in range(first, count + 1):
        x = page.x(i * step)
        yield marks.line(f"M{x:.2f} {top:.2f}V{bottom:.2f}")
        last = i == count
        seconds = f"{i * step:.6g}" + (" s" if last else "")
        yield marks.words(
            x, bottom + 13, seconds, size=AXIS, fill=GREY, more=RIGHT if last and i > first else MIDDLE
        )
    for end in {row.timeline.step_s for row in picture.rows if row.extent[1] >= row.timeline.step_s}:
        dash = ' stroke-dasharray="4 3"'
        yield marks.line(f"M{page.x(end):.2f} {top:.2f}V{bottom:.2f}", stroke=GREY, more=dash)


def _nice(rough: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten.

    >>> _nice(0.3), _nice(7)
    (0.5, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
