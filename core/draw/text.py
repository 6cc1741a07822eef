"""Text: a timeline for a terminal. A row is a rank; a cell is a compute action with its microbatch.

>>> from mimogrid.core.schedule.actions import parse
>>> lines = [(0, "a.0 F0", 0, 1), (0, "a.0 B0", 2, 4), (1, "b.0 F0", 1, 2)]
>>> print(text(Event(rank, parse(line), begin, end) for rank, line, begin, end in lines))
rank 0  a.0 | F0    B0───
rank 1  b.0 |    F0
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from mimogrid.core.draw.rank_map import runs
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.simulate.timeline import Event, by_rank, span


WIDTH = 172
"""Columns, where the width of the terminal is not known."""
NARROWEST = 20
"""Columns that the cells have at least, however narrow the terminal is."""
LONGEST = 24
"""Characters of a list of ranks."""
CUT = "(narrowed to {} columns: some numbers are left out)"

Cell = tuple[Compute, float, float]
"""A compute action, its begin and its end."""


def text(
    events: Iterable[Event], *, width: int = WIDTH, members: Mapping[int, Sequence[int]] | None = None
) -> str:
    """Return a row per rank, to scale, in at most `width` columns; neighbours that do the same share a row.

    `members` has the ranks that a rank stands for. Where numbers are left out, the last line says so.
    """
    mine = {rank: _cells(found) for rank, found in by_rank(events).items()}
    cells = [cell for found in mine.values() for cell in found]
    whole = span([Event(0, *cell) for cell in cells])
    long = whole[1] - whole[0]
    rows = [list(ranks) for _, ranks in itertools.groupby(mine, key=mine.__getitem__)]
    stand = [[r for rank in ranks for r in (members or {}).get(rank, (rank,))] for ranks in rows]
    heads = [
        (f"rank {_shortened(found)}", _hosted(mine[ranks[0]]))
        for ranks, found in zip(rows, stand, strict=True)
    ]
    wide = [max((len(head[i]) for head in heads), default=0) for i in (0, 1)]
    room = max(width - sum(wide) - len("   | "), NARROWEST)
    scale = min(_scale(cells), room / long) if long else 1.0
    lines = [
        f"{a:<{wide[0]}}  {b:<{wide[1]}} | {_row(mine[ranks[0]], whole[0], scale)}".rstrip()
        for (a, b), ranks in zip(heads, rows, strict=True)
    ]
    cut = any(_width(cell, whole[0], scale) < len(_label(cell)) for cell in cells if cell[1] < cell[2])
    return "\n".join(lines + [CUT.format(width)] * cut)


def _cells(events: Iterable[Event]) -> list[Cell]:
    return [(e.action, e.begin_s, e.end_s) for e in events if isinstance(e.action, Compute)]


def _label(cell: Cell) -> str:
    return cell[0].name


def _hosted(cells: Iterable[Cell]) -> str:
    """The stages that a rank computes, in order of their first action."""
    return " ".join(dict.fromkeys(str(action.stage) for action, *_ in cells))


def _scale(cells: Iterable[Cell]) -> float:
    """Columns a second, so that the shortest action holds its name and a blank."""
    timed = (cell for cell in cells if cell[2] > cell[1])
    return max(((len(_label(cell)) + 1) / (cell[2] - cell[1]) for cell in timed), default=1.0)


def _columns(cell: Cell, begin: float, scale: float) -> tuple[int, int]:
    start, stop = (round((t - begin) * scale) for t in cell[1:])
    return start, stop


def _width(cell: Cell, begin: float, scale: float) -> int:
    start, stop = _columns(cell, begin, scale)
    return stop - start


def _row(cells: Iterable[Cell], begin: float, scale: float) -> str:
    row = ""
    for cell in cells:
        start, stop = _columns(cell, begin, scale)
        room, name = stop - start, _label(cell)
        if room > len(name):
            drawn = f"{name:─<{room - 1}} " if room > len(name) + 1 else f"{name} "
        else:
            drawn = name if room == len(name) else name[:1].ljust(room, "─")[:room]
        row = row.ljust(start)[:start] + drawn
    return row.rstrip()


def _shortened(ranks: Sequence[int]) -> str:
    """Write ranks in short.

    >>> _shortened([0, 1, 2, 4]), _shortened(range(0, 64, 2))
    ('0-2,4', '0,2,... (32 ranks)')
    """
    found = list(runs(sorted(ranks)))
    whole = ",".join(found)
    return whole if len(whole) <= LONGEST else f"{','.join(found[:2])},... ({len(ranks)} ranks)"
