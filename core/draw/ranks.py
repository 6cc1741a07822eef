"""Ranks: which modules every rank hosts, as a picture. A row is a module; a cell is a rank's position in it.

Up to `MOST` ranks are drawn one by one, `PER_LINE` in a line. In a larger world neighbours in one stage are one block,
on a line with the whole world.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.draw import marks
from mimogrid.core.draw.marks import BLACK, BOLD, FAINT, GREY, MIDDLE, RIGHT, WHITE, Ink
from mimogrid.core.draw.rank_map import runs_by
from mimogrid.core.topology.topology import Module, Stage, StageInfo, Topology


MOST, PER_LINE = 128, 16
CELL_WIDTH, CELL_HEIGHT, SMALLEST = 74.0, 40.0, 7.5
MARGIN = 16.0
WORLD_WIDTH, NARROW = 1200.0, 3.0
"""The width of a large world, and the least width at which its dp ranks are separated by lines."""
IDLE = ""
"""The row of ranks without a module."""


def rank_map_svg(topology: Topology) -> str:
    """Return the picture of a world."""
    inks = marks.inks_of(topology.modules)
    widths = [
        (marks.width_of(name, 13 * 1.08), marks.width_of(_role(m), 10.5), marks.width_of(_shape(m), 10.5))
        for name, m in topology.modules.items()
    ]
    drawn = _Map(topology, inks, 2 * MARGIN + max(max(each) for each in widths))
    return _cells(drawn) if topology.world_size <= MOST else _blocks(drawn)


@attrs.frozen
class _Map:
    """What the picture is drawn from."""

    topology: Topology
    inks: Mapping[str, Ink]
    left: float

    def x(self, column: int) -> float:
        return self.left + column * CELL_WIDTH

    def rows(self, ranks: Sequence[int]) -> list[str]:
        """Return the modules that some of these ranks host, and `IDLE` if one of them hosts none."""
        modules = self.topology.modules
        hosting = [name for name in modules if any(rank in modules[name].grid for rank in ranks)]
        return hosting + [IDLE] * any(not self.topology.role(rank).stages for rank in ranks)


def _role(module: Module) -> str:
    """Return whom a module feeds, and whether it is frozen, in a few words."""
    role = f"feeds {', '.join(edge.target for edge in module.outputs)}" if module.outputs else "has the loss"
    return role if any(info.trainable for info in module.stages) else f"{role}; frozen"


def _shape(module: Module) -> str:
    """Return the sizes of a module's grid."""
    sizes = ", ".join(f"{axis.name} {axis.size}" for axis in module.grid.axes if axis.size > 1)
    return f"{sizes or 'dp 1'}: {module.grid.size:,} rank{'s' * (module.grid.size > 1)}"


# -- rank by rank ------------------------------------------------------------------------------------------


def _cells(drawn: _Map) -> str:
    size = drawn.topology.world_size
    parts: list[str] = []
    top = MARGIN
    for start in range(0, size, PER_LINE):
        ranks = range(start, min(start + PER_LINE, size))
        parts += _line(drawn, ranks, top)
        top += 20 + (CELL_HEIGHT + 6) * len(drawn.rows(ranks)) + 14
    return marks.document(drawn.x(min(size, PER_LINE)) + MARGIN, top, parts)


def _line(drawn: _Map, ranks: range, top: float) -> Iterator[str]:
    topology = drawn.topology
    yield marks.words(drawn.left - 12, top + 12, "rank", size=11, fill=GREY, more=RIGHT)
    for i, rank in enumerate(ranks):
        yield marks.words(drawn.x(i) + CELL_WIDTH / 2, top + 12, str(rank), size=11, fill=GREY, more=MIDDLE)
    y = top + 20
    for name in drawn.rows(ranks):
        module = topology.modules.get(name)
        ink = drawn.inks[name].dark if module else GREY
        yield marks.words(MARGIN, y + 17, name or "no module", size=13, fill=ink, more=BOLD)
        yield marks.words(MARGIN, y + 32, _role(module) if module else "idle", size=10.5, fill=GREY)
        yield marks.line(f"M{drawn.left:g} {y + CELL_HEIGHT + 3:g}H{drawn.x(len(ranks)):g}")
        for i, rank in enumerate(ranks):
            hosted = topology.role(rank).stages
            if not hosted and not module:
                yield marks.rect(drawn.x(i) + 2, y, CELL_WIDTH - 4, CELL_HEIGHT, "dots", more=' rx="4"')
            for info in hosted:
                if info.stage.module == name and info.stage.chunk == 0:
                    yield from _cell(drawn, info, rank, drawn.x(i), y)
        y += CELL_HEIGHT + 6


def _cell(drawn: _Map, info: StageInfo, rank: int, x: float, y: float) -> Iterator[str]:
    """Draw one rank's cell in a module. Odd stages are dark, so that stages can be told apart."""
    module = drawn.topology.modules[info.stage.module]
    ink, grid = drawn.inks[info.stage.module], module.grid
    fill, colour = (ink.dark, WHITE) if info.stage.pp % 2 else (ink.light, BLACK)
    position = grid.position(rank)
    place = " ".join(f"{axis}{i}" for axis, i in position.items() if axis != "pp" and grid.extent(axis) > 1)
    chunks = [i.stage for i in module.stages if i.stage.pp == info.stage.pp]
    if len(chunks) > 1:
        place = f"{place} {len(chunks)} chunks".strip()
    middle = x + CELL_WIDTH / 2
    stage, size = str(info.stage), _fitting(str(info.stage), 11, bold=True)
    if size < SMALLEST:
        stage, size = f"pp{info.stage.pp}", 11
    tip = f"rank {rank}: {', '.join(map(str, chunks))}, {position}"
    parts = [
        marks.rect(x + 2, y, CELL_WIDTH - 4, CELL_HEIGHT, fill, more=' rx="4"'),
        marks.words(middle, y + (17 if place else 24), stage, size=size, fill=colour, more=MIDDLE + BOLD),
    ]
    if place:
        parts.append(marks.words(middle, y + 32, place, size=_fitting(place, 10.5), fill=colour, more=MIDDLE))
    yield from marks.with_tip(tip, parts)


def _fitting(text: str, size: float, *, bold: bool = False) -> float:
    """Return the largest size, up to `size`, at which a text fits into a cell."""
    return round(min(size, (CELL_WIDTH - 8) / marks.width_of(text, 1.2 if bold else 1)), 2)


# -- many ranks --------------------------------------------------------------------------------------------


def _blocks(drawn: _Map) -> str:
    topology = drawn.topology
    size = topology.world_size
    scale = WORLD_WIDTH / size
    parts: list[str] = [marks.words(drawn.left - 12, MARGIN + 12, "rank", size=11, fill=GREY, more=RIGHT)]
    y = MARGIN + 22
    rows = drawn.rows(range(size))
    bottom = y + len(rows) * (CELL_HEIGHT + 12)
    parts += _ticks(drawn, scale, bottom)
    for name in rows:
        module = topology.modules.get(name)
        ink = drawn.inks[name].dark if module else GREY
        found = list(_runs(topology, name))
        texts = (_role(module), _shape(module)) if module else (f"idle: {sum(map(len, found)):,} ranks", "")
        parts.append(marks.words(MARGIN, y + 13, name or "no module", size=13, fill=ink, more=BOLD))
        parts += [
            marks.words(MARGIN, y + 27 + 13 * i, each, size=10.5, fill=GREY)
            for i, each in enumerate(texts)
            if each
        ]
        for ranks in found:
            x, width = drawn.left + ranks[0] * scale, len(ranks) * scale
            if module:
                parts += _block(drawn, module, ranks, (x, width), y)
            else:
                parts.append(marks.rect(x, y, width, CELL_HEIGHT, "dots"))
        y += CELL_HEIGHT + 12
    return marks.document(drawn.left + WORLD_WIDTH + MARGIN, bottom + MARGIN, parts)


def _ticks(drawn: _Map, scale: float, bottom: float) -> Iterator[str]:
    """Draw the ranks at which modules begin and end, and the numbers of those that have room for it."""
    topology = drawn.topology
    wanted = {0, topology.world_size}
    for module in topology.modules.values():
        wanted |= {module.grid.offset, module.grid.offset + module.grid.size}
    until = -1.0
    for rank in sorted(wanted):
        x = drawn.left + rank * scale
        yield marks.line(f"M{x:.2f} {MARGIN + 16:g}V{bottom:.2f}", stroke=FAINT)
        half = marks.width_of(f"{rank:,}", 11) / 2
        if x - half > until:
            yield marks.words(x, MARGIN + 12, f"{rank:,}", size=11, fill=GREY, more=MIDDLE)
            until = x + half + 4


def _runs(topology: Topology, name: str) -> Iterator[range]:
    """Yield runs of neighbours in one pipeline stage of a module; if it is `IDLE`, runs of idle ranks."""

    def stage_of(rank: int) -> int | None:
        if name == IDLE:
            return None if topology.role(rank).stages else -1
        grid = topology.modules[name].grid
        return grid.position(rank)["pp"] if rank in grid else None

    return (run for stage, run in runs_by(topology.world_size, stage_of) if stage is not None)


def _block(drawn: _Map, module: Module, ranks: range, extent: tuple[float, float], y: float) -> Iterator[str]:
    """Draw a run of ranks in one stage, with lines between dp ranks that are wide enough."""
    x, width = extent
    pp = module.grid.position(ranks[0])["pp"]
    ink = drawn.inks[module.name]
    fill, colour = (ink.dark, WHITE) if pp % 2 else (ink.light, BLACK)
    stage = str(Stage(module.name, pp))
    parts = [marks.rect(x, y, width, CELL_HEIGHT, fill, more=f' stroke="{WHITE}" stroke-width="0.6"')]
    starts = [a for a, b in itertools.pairwise(ranks) if module.dp_rank_of(a) != module.dp_rank_of(b)]
    scale = width / len(ranks)
    if starts and width / (len(starts) + 1) >= NARROW:
        cuts = "".join(f"M{x + (a + 1 - ranks[0]) * scale:.2f} {y + 33:g}v7" for a in starts)
        parts.append(marks.line(cuts, stroke=colour, width=0.7, more=' stroke-opacity="0.6"'))
    first, last = ranks[0], ranks[-1]
    middle = x + width / 2
    for name in (stage, f"pp{pp}", str(pp)):
        if marks.width_of(name, 11 * 1.08) + 4 <= width:
            parts.append(marks.words(middle, y + 15, name, size=11, fill=colour, more=MIDDLE + BOLD))
            break
    numbers = f"{first:,}-{last:,}" if last > first else f"{first:,}"
    if marks.width_of(numbers, 10) + 4 <= width:
        parts.append(marks.words(middle, y + 28, numbers, size=10, fill=colour, more=MIDDLE))
    tip = f"ranks {first:,} to {last:,}: {stage}"
    yield from marks.with_tip(tip, parts)
