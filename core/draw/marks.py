"""Marks: the elements of pictures: inks and patterns, texts with a known width, shapes of SVG.

A module has a hue. A kind of action has a lightness or a pattern, so that a picture can be read without colour: a
forward is light, a backward is dark, the gradient of inputs is dark and striped, and that of weights is an outline.
"""

from collections.abc import Iterable, Iterator
from xml.sax.saxutils import escape

import attrs

from mimogrid.core.base.text import printable
from mimogrid.core.schedule.actions import Kind


@attrs.frozen
class Ink:
    """The colours of a module: light under dark text, dark under white text."""

    light: str
    dark: str

    def of(self, kind: Kind, chunk: int = 0, chunks: int = 1) -> "Fill":
        """Return the fill of a kind of action; later chunks of a rank are paler."""
        pale = chunk / max(chunks - 1, 1)
        match kind:
            case Kind.FORWARD:
                return Fill(mixed(self.light, 0.65 * pale), BLACK)
            case Kind.BACKWARD | Kind.BACKWARD_PART:
                return Fill(mixed(self.dark, 0.28 * pale), WHITE)
            case Kind.INPUT_GRADIENT:
                return Fill(mixed(self.dark, 0.28 * pale), WHITE, pattern="stripes")
            case Kind.WEIGHT_GRADIENT:
                return Fill(WHITE, self.dark, outline=mixed(self.dark, 0.28 * pale))


@attrs.frozen
class Fill:
    """How a shape is filled: a colour, that of the text in it, a pattern laid over it, a line around it."""

    colour: str
    text: str
    pattern: str = ""
    outline: str = ""


WHITE, BLACK, GREY, FAINT = "#ffffff", "#1d2733", "#5b6875", "#dfe4e9"
INKS = (
    Ink("#adc7e7", "#00619a"),
    Ink("#f6d29f", "#aa5600"),
    Ink("#b8edd5", "#13694b"),
    Ink("#e9c9dd", "#8d396e"),
    Ink("#f7eda0", "#6c6119"),
    Ink("#e3defd", "#403d92"),
)
"""Hues near those of Okabe and Ito, moved apart until any two differ in each kind of colour vision."""

LETTERS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_PART: "part of a backward",
    Kind.INPUT_GRADIENT: "gradient of inputs",
    Kind.WEIGHT_GRADIENT: "gradient of weights",
}
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MIDDLE, BOLD, RIGHT = ' text-anchor="middle"', ' font-weight="bold"', ' text-anchor="end"'


def _pattern(name: str, size: float, angle: float, parts: str, paper: str = "#fbfbfb") -> str:
    """Return a pattern of `parts` on a square of paper, turned."""
    turned = f' patternTransform="rotate({angle:g})"' if angle else ""
    ground = f'<rect width="{size:g}" height="{size:g}" fill="{paper}"/>' if paper else ""
    return (
        f'<pattern id="{name}" width="{size:g}" height="{size:g}" patternUnits="userSpaceOnUse"{turned}>'
        f"{ground}{parts}</pattern>"
    )


PATTERNS = "".join(
    (
        _pattern("dots", 6, 0, '<circle cx="3" cy="3" r="1.1" fill="#8d99a6"/>'),
        _pattern("slants", 6, 45, '<rect width="1.6" height="6" fill="#8d99a6"/>'),
        _pattern("lines", 4, 0, '<rect width="4" height="0.9" fill="#b4bec8"/>'),
        _pattern("stripes", 6, 45, '<rect width="2.2" height="6" fill="#ffffff" fill-opacity="0.42"/>', ""),
        '<marker id="tip" viewBox="0 0 6 6" refX="5.4" refY="3" markerWidth="6" markerHeight="6" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.6L6 3L0 5.4z" fill="{BLACK}"/></marker>',
    )
)


def inks_of(modules: Iterable[str]) -> dict[str, Ink]:
    """Return the ink of each module, in the order given."""
    return {name: INKS[i % len(INKS)] for i, name in enumerate(modules)}


def mixed(colour: str, white: float) -> str:
    """Return a colour with a part of white in it, 0 to 1.

    >>> mixed("#004080", 0.5)
    '#80a0c0'
    """
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(p + (255 - p) * white):02x}" for p in parts)


def width_of(words: str, size: float) -> float:
    """Return the width of a text, in pixels, in a wide font: fonts differ."""
    return len(words) * size * 0.6


def wrapped(words: str, size: float, width: float) -> list[str]:
    """Break a text between words into lines of at most a width.

    >>> wrapped("to be or not", 10, 40)
    ['to be', 'or not']
    """
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def cut(words: str, size: float, width: float) -> str:
    """Shorten a text to a width.

    >>> cut("language.0 language.1", 10, 70)
    'language.0…'
    """
    most = max(int(width / width_of("m", size)), 2)
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def document(width: float, height: float, parts: Iterable[str]) -> str:
    """Return a page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="{FONT}">'
    )
    paper = f'<rect width="{width:g}" height="{height:g}" fill="{WHITE}"/>'
    return "\n".join((head, f"<defs>{PATTERNS}</defs>", paper, *parts, "</svg>\n"))


def rect(x: float, y: float, width: float, height: float, fill: str, *, more: str = "") -> str:
    """Return a box; `fill` is a colour or the name of a pattern."""
    painted = fill if fill.startswith("#") else f"url(#{fill})"
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{painted}"{more}/>'


def line(path: str, *, stroke: str = FAINT, width: float = 1.0, more: str = "") -> str:
    """Return a line along a path."""
    return f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}"{more}/>'


def words(x: float, y: float, text: str, *, size: float, fill: str = BLACK, more: str = "") -> str:
    """Return a text; `y` is its base line."""
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" fill="{fill}"{more}>{escape(printable(text))}</text>'


def with_tip(tip: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield parts as a group with a tip, for the pointer and for screen readers."""
    yield f"<g><title>{escape(printable(tip))}</title>"
    yield from parts
    yield "</g>"


def filled(x: float, y: float, width: float, height: float, fill: Fill, *, more: str = "") -> Iterator[str]:
    """Yield a box that is filled."""
    if fill.outline:
        outline = f' stroke="{fill.outline}" stroke-width="1.2"'
        yield rect(x + 0.9, y + 0.9, max(width - 1.8, 0.5), height - 1.8, fill.colour, more=outline)
    else:
        yield rect(x, y, width, height, fill.colour, more=more)
    if fill.pattern:
        yield rect(x, y, width, height, fill.pattern)
