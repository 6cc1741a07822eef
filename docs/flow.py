"""Draw `docs/pictures/flow.svg`: the values of a job and the package that makes each.

python docs/flow.py            writes the picture
python docs/flow.py --check    fails if the picture is not what this file draws
"""

import sys
from pathlib import Path

from mimogrid.core.draw import marks


PICTURE = Path(__file__).parent / "pictures/flow.svg"
WIDTH, HEIGHT, COLUMN, ROW = 132.0, 54.0, 160.0, 104.0
LEFT, TOP = 132.0, 40.0

# Value, package, column, row.
BOXES = {
    "job file": ("TOML", 0, 0),
    "JobSpec": ("core/job", 1, 0),
    "Topology": ("core/topology", 2, 0),
    "roles, groups": ("core/topology", 3, 0),
    "costs": ("core/pricing", 4, 0),
    "Order": ("core/schedule", 5, 0),
    "descriptions": ("the data source", 0, 1),
    "Step, Routes": ("core/step", 2, 1),
    "reductions": ("core/update", 3, 1),
    "Program": ("core/program", 5, 1),
    "proof": ("core/program", 3, 2),
    "layouts": ("core/plan", 4, 2),
    "simulated step": ("core/simulate", 5, 2),
    "pictures": ("core/draw", 6, 2),
    "world": ("shell/world", 1, 3),
    "networks": ("shell/modules", 2, 3),
    "a trained step": ("shell/runtime", 5, 3),
    "checkpoints": ("shell/checkpoint", 6, 3),
}
PLACES = {(column, row) for _, column, row in BOXES.values()}
ROWS = ("once per job", "once per step", "without a world", "on every rank")

# From, to.
ARROWS = (
    ("job file", "JobSpec"),
    ("JobSpec", "Topology"),
    ("Topology", "roles, groups"),
    ("Topology", "costs"),
    ("costs", "Order"),
    ("descriptions", "Step, Routes"),
    ("Topology", "Step, Routes"),
    ("Step, Routes", "reductions"),
    ("reductions", "Program"),
    ("Order", "Program"),
    ("Program", "proof"),
    ("Program", "simulated step"),
    ("simulated step", "layouts"),
    ("simulated step", "pictures"),
    ("world", "networks"),
    ("networks", "a trained step"),
    ("Program", "a trained step"),
    ("a trained step", "checkpoints"),
)


def corner(name: str) -> tuple[float, float]:
    """Return where a box begins."""
    _, column, row = BOXES[name]
    return LEFT + column * COLUMN, TOP + row * ROW


def box(name: str) -> list[str]:
    """Draw a value with the package that makes it."""
    (x, y), package = corner(name), BOXES[name][0]
    ink = marks.INKS[0] if package.startswith("core") else marks.INKS[1]
    outside = not package.startswith(("core", "shell"))
    parts = marks.rect(x, y, WIDTH, HEIGHT, marks.FAINT if outside else ink.light, more=' rx="6"')
    middle = x + WIDTH / 2
    value = marks.words(middle, y + 23, name, size=13, more=marks.MIDDLE + marks.BOLD)
    return [parts, value, marks.words(middle, y + 41, package, size=11, fill=marks.GREY, more=marks.MIDDLE)]


def arrow(source: str, target: str) -> str:
    """Draw an arrow along a row, over a box, straight down, past a row, or through the gap above a row."""
    (x, y), (u, v) = corner(source), corner(target)
    if y == v and u < x:
        path = f"M{x} {y + HEIGHT / 2}L{u + WIDTH + 2} {v + HEIGHT / 2}"
    elif (
        y == v and u - x > COLUMN and (BOXES[source][1] + 1, BOXES[source][2]) in PLACES
    ):  # over the box between
        over, start, end = y - 14, x + WIDTH * 0.75, u + WIDTH / 4
        path = f"M{start} {y}L{start} {over}L{end} {over}L{end} {v - 2}"
    elif y == v:
        path = f"M{x + WIDTH} {y + HEIGHT / 2}L{u - 2} {v + HEIGHT / 2}"
    elif x == u and v - y > ROW:  # past the row between
        side = x + WIDTH + 12
        path = f"M{x + WIDTH} {y + HEIGHT - 10}L{side} {y + HEIGHT - 10}L{side} {v + 12}L{u + WIDTH + 2} {v + 12}"
    elif x == u:
        path = f"M{x + WIDTH / 2} {y + HEIGHT}L{u + WIDTH / 2} {v - 2}"
    else:
        gap = v - (ROW - HEIGHT) / 2
        path = f"M{x + WIDTH / 2} {y + HEIGHT}L{x + WIDTH / 2} {gap}L{u + WIDTH / 2} {gap}L{u + WIDTH / 2} {v - 2}"
    return marks.line(path, stroke=marks.GREY, width=1.3, more=' marker-end="url(#tip)"')


def picture() -> str:
    """Return the whole picture."""
    parts = [arrow(source, target) for source, target in ARROWS]
    for name in BOXES:
        parts += box(name)
    for row, words in enumerate(ROWS):
        y = TOP + row * ROW + HEIGHT / 2 + 4
        parts.append(marks.words(16, y, words, size=12, fill=marks.GREY))
    return marks.document(LEFT + 7 * COLUMN - 10, TOP + 3 * ROW + HEIGHT + 28, parts)


def main(arguments: list[str]) -> int:
    """Write the picture, or compare it."""
    if arguments == ["--check"]:
        return 0 if PICTURE.read_text(encoding="utf-8") == picture() else 1
    PICTURE.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
