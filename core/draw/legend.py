"""Legend: what the colours, patterns and lines mean that a page has."""

import collections
from collections.abc import Iterable, Iterator, Sequence

import attrs

from mimogrid.core.draw import marks
from mimogrid.core.draw.marks import BLACK, BOLD, GREY, MIDDLE, WHITE, Fill
from mimogrid.core.draw.page import LEGEND, MARGIN, Page
from mimogrid.core.draw.picture import Picture, Row
from mimogrid.core.draw.rows import CRITICAL, KEPT, PASSING, SHADES
from mimogrid.core.schedule.actions import Direction, Kind, Norm, Tie, Update, WaitCollective, WaitGather
from mimogrid.core.simulate.timeline import CAUSES_IN_WORDS


@attrs.frozen
class LegendEntry:
    """An explanation, with what it explains: filled boxes with letters in them, or an arrow."""

    words: str
    swatches: tuple[tuple[Fill, str], ...] = ()
    dash: str = ""
    bold: bool = False

    @property
    def width(self) -> float:
        """In pixels, with the gap behind it."""
        drawn = 20.0 * max(len(self.swatches), bool(self.dash))
        return drawn + marks.width_of(self.words, LEGEND * (1.08 if self.bold else 1)) + 14


def legend(pictures: Sequence[Picture], page: Page, stride: int) -> Iterator[LegendEntry]:
    """Yield entries for everything that is drawn. Microbatches with arrows are `stride` apart; 0 means no arrows."""
    rows = [row for picture in pictures if picture.window is None for row in picture.rows]
    yield from _modules(page, rows)
    yield from _other_time(rows)
    if any(row.timeline.critical_path for row in rows):
        yield LegendEntry("critical path", ((Fill(WHITE, BLACK, outline=CRITICAL), ""),))
    if stride:
        which = f" (microbatches {stride} apart)" if stride > 1 else ""
        yield LegendEntry(f"activations sent{which}", dash="none")
        if any(message.transfer.direction is Direction.BACKWARD for message in pictures[0].messages):
            yield LegendEntry("gradients sent", dash="3 2")
    if page.most_bytes:
        yield LegendEntry("weights, gradients, optimizer", ((Fill(KEPT, WHITE), ""),))
        yield LegendEntry("activations, buffers, temporaries (estimated)", ((Fill(PASSING, BLACK), ""),))


def _modules(page: Page, rows: Sequence[Row]) -> Iterator[LegendEntry]:
    """Yield the colours of modules and chunks for each kind of action, and the meaning of the letters."""
    kinds: dict[tuple[str, int], set[Kind]] = collections.defaultdict(set)
    for row in rows:
        for _, action in row.computes:
            kinds[action.stage.module, action.stage.chunk].add(action.kind)
    order = list(page.inks)
    for name, chunk in sorted(kinds, key=lambda each: (order.index(each[0]), each[1])):
        ink, found = page.inks[name], kinds[name, chunk]
        swatches = tuple(
            (ink.of(kind, chunk, page.chunks[name]), kind.value) for kind in marks.LETTERS if kind in found
        )
        yield LegendEntry(f"{name} chunk {chunk}" if page.chunks[name] > 1 else name, swatches, bold=True)
    seen = set[Kind]().union(*kinds.values())
    if letters := ", ".join(f"{kind.value} {words}" for kind, words in marks.LETTERS.items() if kind in seen):
        yield LegendEntry(letters)


def _other_time(rows: Sequence[Row]) -> Iterator[LegendEntry]:
    """Yield what ranks do beside computing, and why they idle."""
    actions = [event.action for row in rows for event in row.events if event.end_s > event.begin_s]
    if any(isinstance(action, WaitCollective | Tie | Norm | Update) for action in actions):
        gathers = any(isinstance(action, WaitGather) for action in actions)
        yield LegendEntry("gather, " * gathers + "reduce, agree, update", ((Fill(GREY, WHITE), ""),))
    causes = {idle.cause for row in rows for idle in row.idles}
    for cause, shade in SHADES.items():
        if cause in causes:
            yield LegendEntry(f"idle: {CAUSES_IN_WORDS[cause]}", ((Fill(shade, BLACK), ""),))


def wrapped(entries: Iterable[LegendEntry], width: float) -> list[list[LegendEntry]]:
    """Return entries line by line."""
    lines: list[list[LegendEntry]] = []
    used = 0.0
    for entry in entries:
        if not lines or used + entry.width > width:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += entry.width
    return lines


def legend_parts(entries: Iterable[LegendEntry], y: float) -> Iterator[str]:
    """Draw a line of entries whose top is at y."""
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
