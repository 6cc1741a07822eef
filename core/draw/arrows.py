"""Arrows: messages between rows, and a selection of them where there are too many."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mimogrid.core.draw import marks
from mimogrid.core.draw.marks import BLACK
from mimogrid.core.draw.page import Page
from mimogrid.core.draw.picture import Picture
from mimogrid.core.schedule.actions import Direction, Send
from mimogrid.core.simulate.timeline import MessageInterval


MOST_ARROWS = 160
"""The most messages that are drawn."""


def selected(messages: Iterable[MessageInterval]) -> tuple[list[MessageInterval], int]:
    """Return at most `MOST_ARROWS` messages, and the stride between the microbatches that they are of.

    All of them, if they are few. Else one of each transfer; else those of every second microbatch, of every fourth, ...
    """
    found = list(messages)
    if len(found) <= MOST_ARROWS:
        return found, 1
    found = list({message.transfer: message for message in reversed(found)}.values())[::-1]
    stride = 1
    last = max(message.transfer.microbatch for message in found)
    while len(found) > MOST_ARROWS and stride <= last:
        stride *= 2
        found = [message for message in found if message.transfer.microbatch % stride == 0]
    return found[:MOST_ARROWS], stride


def arrow_parts(
    page: Page, picture: Picture, messages: Sequence[MessageInterval], where: Mapping[int, float]
) -> Iterator[str]:
    """Draw messages between rows; `where` has the top of each rank's row. Those on the critical path are bold."""
    critical = {
        (segment.action, segment.end_s)
        for row in picture.rows[:1]
        for segment in row.timeline.critical_path
        if isinstance(segment.action, Send)
    }
    for message in messages:
        down = where[message.rank_target] > where[message.rank_source]
        begin = where[message.rank_source] + (page.cell if down else 0)
        end = where[message.rank_target] + (0 if down else page.cell)
        bold = (message.transfer, message.end_s) in critical
        dash = "" if message.transfer.direction is Direction.FORWARD else ' stroke-dasharray="3 2"'
        more = f' marker-end="url(#tip)" stroke-opacity="{0.9 if bold else 0.5}"{dash}'
        path = f"M{page.x(message.begin_s):.1f} {begin:.1f}L{page.x(message.end_s):.1f} {end:.1f}"
        drawn = marks.line(path, stroke=BLACK, width=1.6 if bold else 0.8, more=more)
        ranks = f"rank {message.rank_source} to {message.rank_target}"
        yield from marks.with_tip(f"{message.transfer}, {ranks}", [drawn])
