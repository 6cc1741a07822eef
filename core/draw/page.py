"""Page: where things are on a drawn page. All rows of all its pictures have one scale of time and one of memory.

All lengths are in pixels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.draw import marks
from mimogrid.core.draw.marks import Ink
from mimogrid.core.draw.picture import Picture, Row, zooms


WIDEST, NARROWEST, MARGIN = 1500.0, 640.0, 16.0
"""The longest and the shortest that a step is drawn; the margin around the page."""
LONGEST_NAME = 300.0
TITLE, HEADING, LEGEND, AXIS = 14.0, 11.5, 11.0, 10.0
"""Sizes of letters."""
SIZES = ((16, (20.0, 16.0, 8.0)), (40, (15.0, 11.0, 6.0)), (math.inf, (11.0, 7.0, 4.0)))
"""For up to so many rows: heights of a cell, of the memory under it, and of the gap to the next row."""
ZOOMED = 2
"""A step that is so many times too long for half of its numbers is shown on a larger scale, too."""
SMALL, VISIBLE = 3.0, 0.7
"""Cells below the first width have neither border nor tip; those below the second are merged with what follows."""


@attrs.frozen
class Page:
    """What is common to all rows of a page; lengths in pixels.

    Attributes:
        inks: per module, its colours.
        chunks: per module, on how many chunks a rank computes.
        left: where time begins; names stand to its left.
        long: the length of the longest step.
        step_s: the longest step, in seconds.
        begin_s: the second of the step at the left.
        most_bytes: the most that any rank holds.
        right: room behind the longest step, for the most that a rank holds.
        cell: height of an action.
        strip: height of the memory under it.
        gap: from there to the next row.
    """

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
    begin_s: float = 0.0

    @property
    def width(self) -> float:
        """From edge to edge."""
        return self.left + self.long + self.right

    @property
    def end(self) -> float:
        """Where the longest step ends."""
        return self.left + self.long

    @property
    def font(self) -> float:
        """The size of names and numbers."""
        return round(_font(self.cell), 1)

    @property
    def small(self) -> float:
        """The size of the text beside a strip of memory."""
        return _small(self.cell)

    @property
    def scale(self) -> float:
        """Pixels a second."""
        return self.long / self.step_s if self.step_s else 0.0

    def x(self, seconds: float) -> float:
        """Where a time of a step is."""
        return self.left + (seconds - self.begin_s) * self.scale

    def height(self, row: Row) -> float:
        """The height of a row, with its memory."""
        return self.cell + (1 + self.strip if row.has_memory else 0)


def page_of(pictures: Sequence[Picture]) -> Page:
    """Return a page with room for all pictures."""
    rows = [row for picture in pictures if picture.window is None for row in picture.rows]
    topologies = {id(row.timeline): row.timeline.program.topology for row in rows}.values()
    modules = {name: module for topology in topologies for name, module in topology.modules.items()}
    chunks: dict[str, int] = {}
    for topology in topologies:
        for name, module in topology.modules.items():
            chunks[name] = max(chunks.get(name, 1), module.stages[-1].stage.chunk + 1)
    cell, strip, gap = next(size for most, size in SIZES if len(rows) <= most)
    step_s = max((row.timeline.step_s for row in rows), default=0.0)
    font = _font(cell)
    names = (marks.width_of(name_of(row, font), font) for row in rows)
    headings = (sum(w for _, _, w in headed(row)) for row in rows)
    left = MARGIN + 16 + max((*names, *headings), default=0.0)
    long = min(max(_readable(rows, font) * step_s, NARROWEST), WIDEST)
    most = max((level.bytes for row in rows for level in row.levels), default=0)
    right = 10 + marks.width_of("9.99 MB", _small(cell)) + MARGIN
    return Page(marks.inks_of(modules), chunks, left, long, step_s, most, right, cell, strip, gap)


def zoomed(page: Page, picture: Picture) -> Page:
    """Return the page of a picture that shows a part of the step."""
    if picture.window is None:
        return page
    begin, end = picture.window
    return attrs.evolve(page, begin_s=begin, step_s=end - begin)


def pages_of(whole: Picture) -> tuple[Picture, ...]:
    """Return a picture, and its begin and end on a larger scale if it is too long for its numbers."""
    page, readable = page_of([whole]), _readable(whole.rows, _font(SIZES[0][1][0]), part=0.5)
    seconds = page.long / readable
    return (whole, *zooms(whole, seconds)) if ZOOMED * seconds < page.step_s else (whole,)


def _readable(rows: Sequence[Row], font: float, part: float = 1.0) -> float:
    """Return how many pixels a second has if the numbers of so large a part of the actions fit into their cells."""
    wanted = sorted(
        (marks.width_of(str(action.microbatch), font) + 5) / (event.end_s - event.begin_s)
        for row in rows
        for event, action in row.computes
        if event.end_s > event.begin_s
    )
    return wanted[math.ceil(part * len(wanted)) - 1] if wanted else 1.0


def _font(cell: float) -> float:
    return min(11.0, cell * 0.76)


def _small(cell: float) -> float:
    return 9.5 if cell > 11 else 7.5  # noqa: PLR2004


def name_of(row: Row, font: float) -> str:
    """Return the name of a row, cut to fit."""
    name = f"{row.name}  {row.source}" if row.source else row.name
    return marks.cut(name, font, LONGEST_NAME)


def headed(row: Row) -> Iterator[tuple[str, str, float]]:
    """Yield the modules of a row, the sizes of their grids, and the widths of these headings."""
    topology = row.timeline.program.topology
    for name in row.modules:
        axes = topology.modules[name].grid.axes
        sizes = ", ".join(f"{axis.name} {axis.size}" for axis in axes if axis.size > 1)
        width = marks.width_of(name, HEADING * 1.08) + 8
        yield name, sizes, width + (marks.width_of(sizes, AXIS) + 12 if sizes else 0)
