"""Histograms as text and as SVG: one below the other, a bin for each line or bar."""

from collections.abc import Iterator, Sequence

from mimogrid.core.data.histogram import Histogram
from mimogrid.core.draw import marks
from mimogrid.core.draw.marks import BOLD, GREY, INKS, MIDDLE


BAR_COLUMNS = 40
WIDTH, MARGIN, HEIGHT, GAP = 720.0, 24.0, 110.0, 4.0
TITLE, LABEL = 14.0, 10.5


def histogram_text(found: Histogram) -> Iterator[str]:
    """Yield the lines of a histogram: its numbers in a line, then a bar for each bin."""
    yield f"{found.name}   {found.summary}"
    names = [_bin(found, index) for index in range(len(found.counts))]
    wide, most = max(map(len, names)), max(found.counts)
    for name, count in zip(names, found.counts, strict=True):
        yield f"  {name:>{wide}}  {'█' * -(-count * BAR_COLUMNS // most):<{BAR_COLUMNS}}  {count}"


def histograms_svg(title: str, histograms: Sequence[Histogram]) -> str:
    """Return a page with the histograms one below the other."""
    parts = [marks.words(MARGIN, MARGIN + TITLE, title, size=TITLE + 2, more=BOLD)]
    top = MARGIN + 2 * TITLE + 8
    for number, found in enumerate(histograms):
        parts += _drawn(found, top, INKS[number % len(INKS)].dark)
        top += HEIGHT + 72
    return marks.document(WIDTH, top, parts)


def _drawn(found: Histogram, top: float, colour: str) -> Iterator[str]:
    yield marks.words(MARGIN, top + TITLE, found.name, size=TITLE, more=BOLD)
    yield marks.words(MARGIN, top + TITLE + 16, found.summary, size=LABEL, fill=GREY)
    base, most = top + 40 + HEIGHT, max(found.counts)
    step = (WIDTH - 2 * MARGIN) / max(len(found.counts), 8)
    names = [_bin(found, index) for index in range(len(found.counts))]
    fits = max(marks.width_of(name, LABEL) for name in names) <= step
    for index, (name, count) in enumerate(zip(names, found.counts, strict=True)):
        left, height = MARGIN + index * step, (HEIGHT - 14) * count / most
        bar = marks.rect(left, base - height, step - GAP, height, colour)
        yield from marks.with_tip(f"{name}: {count}", [bar])
        middle = left + (step - GAP) / 2
        yield marks.words(middle, base - height - 4, f"{count:,}", size=LABEL - 1.5, fill=GREY, more=MIDDLE)
        below = (middle, name) if fits else (left, name.partition("-")[0])  # or only where the bin begins
        yield marks.words(below[0], base + LABEL + 3, below[1], size=LABEL - 1.5, more=MIDDLE)
    yield marks.line(f"M{MARGIN} {base}H{WIDTH - MARGIN}")


def _bin(found: Histogram, index: int) -> str:
    least, most = found.bounds(index)
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"
