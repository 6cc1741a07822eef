"""Pictures: golden text, and laws of what is drawn (inside the page, nothing over anything)."""

import itertools
import json
import re
import xml.etree.ElementTree as ET

import attrs
import pytest

from jobs import job, program_of
from mimogrid.core import draw
from mimogrid.core.costs import EdgeCosts
from mimogrid.core.pricing import assumed
from mimogrid.core.schedule.actions import Compute, Wait, parse
from mimogrid.core.simulate import simulate
from mimogrid.core.timeline import Event


THREE = "vision vit dp2 pp2 > language; audio vit dp2 frozen > language; language gpt pp2 tp2"
WIDE = "vision vit dp8 tp2 > language; language gpt pp4 tp4 dp3"
SVG = "{http://www.w3.org/2000/svg}"


def timed(text, latency=0.0, **options):
    """A program and its simulated timeline."""
    program = program_of(text, **options)
    costs = attrs.evolve(assumed(program.topology), edge=EdgeCosts(latency=latency))
    return program, simulate(program, costs)


def drawn(text, **options):
    """The picture of a simulated timeline, parsed."""
    _, timeline = timed(text, **options)
    return ET.fromstring(draw.svg(timeline.events, flights=timeline.flights, title="a title"))


def test_text_shows_a_row_per_rank_to_scale():
    """Names of one width, backwards of twice the length; data lanes that do the same share a row."""
    _, timeline = timed("vision vit dp2 > language; language gpt pp2", batch=8, microbatches=4)
    expected = """
rank 0-1  vision.0   | F0 F1 F2             B0─── F3 B1───    B2───    B3───
rank 2    language.0 |    F0 F1       B0─── F2 B1─── F3 B2───    B3───
rank 3    language.1 |       F0 B0─── F1 B1─── F2 B2─── F3 B3───
"""
    assert expected.strip() == draw.text(timeline.events)


def test_text_keeps_to_its_columns():
    """Where there is no room for names, a cell shows its kind."""
    _, timeline = timed("vision vit > language; language gpt pp4", batch=64, microbatches=64)
    rows = [line.partition("| ")[2] for line in draw.text(timeline.events, columns=100).splitlines()]
    assert max(map(len, rows)) <= 100
    assert {"F", "B", "─", " "} >= set("".join(rows)) - set("0123456789")


def test_every_compute_action_is_a_cell_with_its_number():
    """Each is told in words too, for readers of screens and for tips."""
    _, timeline = timed(THREE, batch=16, microbatches=8)
    picture = drawn(THREE, batch=16, microbatches=8)
    tips = [found.text for found in picture.iter(f"{SVG}title")]
    computes = [event.action for event in timeline.events if isinstance(event.action, Compute)]
    assert len(computes) == sum(": " in tip for tip in tips)
    assert all(any(tip.startswith(f"{action}: ") for tip in tips) for action in computes)


def test_kinds_differ_without_colour():
    """A forward is much lighter than a backward of the same module, a weight gradient is an outline."""
    for ink in draw.INKS:
        assert luminance(ink.light) > 0.5
        assert luminance(ink.dark) < 0.2
    kinds = ("F", "I", "W")
    events = [Event(0, parse(f"a.0 {kind}0"), i, i + 1) for i, kind in enumerate(kinds)]
    cells = ET.fromstring(draw.svg(events)).findall(f"{SVG}g")
    fills = [[rect.get("fill") for rect in cell.iter(f"{SVG}rect")] for cell in cells]
    assert [["#b3d4ee"], ["#0b5c96", "url(#stripes)"], ["#ffffff"]] == fills


def luminance(colour):
    """How light a colour is, 0 to 1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("language gpt", {"batch": 1, "microbatches": 1}),
        (THREE, {"batch": 16, "microbatches": 8, "latency": 0.5}),
        (WIDE, {"batch": 64, "microbatches": 8, "latency": 0.2}),
        ("vision vit dp2 > language; language gpt dp2 @0", {"batch": 64, "microbatches": 32}),
    ],
)
def test_texts_lie_on_the_page_and_not_on_each_other(text, options):
    """From 1 to 64 ranks, by a generous estimate of how wide letters are."""
    picture = drawn(text, **options)
    boxes = [box(found) for found in picture.iter(f"{SVG}text")]
    width, height = float(picture.get("width")), float(picture.get("height"))
    for left, top, right, bottom, words in boxes:
        assert left >= -1, words
        assert right <= width + 1, words
        assert top >= 0, words
        assert bottom <= height, words
    overlaps = [
        (a[4], b[4])
        for a, b in itertools.combinations(boxes, 2)
        if a[0] < b[2] - 0.5 and b[0] < a[2] - 0.5 and a[1] < b[3] - 0.5 and b[1] < a[3] - 0.5
    ]
    assert not overlaps


def box(found):
    """Where a text lies: left, top, right, bottom, and its words."""
    size, words = float(found.get("font-size")), found.text or ""
    wide = size * 0.55 * len(words)
    x, y = float(found.get("x")), float(found.get("y"))
    left = x - {"middle": wide / 2, "end": wide}.get(found.get("text-anchor"), 0)
    return left, y - size * 0.75, left + wide, y + size * 0.2, words


def test_an_empty_timeline_is_a_page():
    """Nothing computes, nothing fails."""
    assert "" == draw.text([])
    ET.fromstring(draw.svg([]))


def test_words_of_the_user_are_escaped():
    """A title is text, not markup."""
    assert "<b>" not in draw.svg([], title="<b>")


def test_the_map_shows_every_rank_once_in_each_module_that_it_hosts():
    """With its position on the axes that are larger than 1, and ranks without a module as such."""
    topology = job(THREE, world=12)
    picture = ET.fromstring(draw.rank_map_svg(topology))
    tips = [found.text for found in picture.iter(f"{SVG}title")]
    hosted = [(rank, str(info.stage)) for rank in topology.ranks for info in topology.stages_of(rank)]
    assert sorted(hosted) == sorted(
        (int(found[1]), found[2]) for tip in tips if (found := re.match(r"rank (\d+): ([\w.]+),", tip))
    )
    words = [found.text for found in picture.iter(f"{SVG}text")]
    assert {"idle", "no module", "feeds language", "feeds language; frozen", "has the loss"} <= set(words)
    assert 2 == words.count("tp1")


def test_a_trace_holds_every_event_in_microseconds():
    """Processes are ranks; what computes and what moves are two tracks."""
    _, timeline = timed(THREE, batch=4, microbatches=2)
    trace = draw.perfetto(timeline.events, names={0: "vision.0"})
    slices = [found for found in trace["traceEvents"] if "X" == found["ph"]]
    assert [str(event.action) for event in timeline.events] == [found["name"] for found in slices]
    assert timeline.step_s * 1e6 == max(found["ts"] + found["dur"] for found in slices)
    assert json.loads(json.dumps(trace)) == trace
    names = [found["args"]["name"] for found in trace["traceEvents"] if "process_name" == found["name"]]
    assert ["rank 0: vision.0", "rank 1"] == names[:2]


def test_a_trace_has_an_arrow_per_message():
    """From within the action that made it to within the one that reads it."""
    program, timeline = timed(THREE, batch=16, microbatches=4, latency=0.25)
    found = draw.perfetto(timeline.events, names={}, program=program)["traceEvents"]
    starts = {arrow["id"]: arrow for arrow in found if "s" == arrow["ph"]}
    ends = {arrow["id"]: arrow for arrow in found if "f" == arrow["ph"]}
    assert starts.keys() == ends.keys()
    assert len(timeline.flights) == len(starts)
    for i, start in starts.items():
        assert start["ts"] <= ends[i]["ts"]
        makers = [s for s in found if "X" == s["ph"] and start["pid"] == s["pid"] and 0 == s["tid"]]
        assert any(s["ts"] <= start["ts"] <= s["ts"] + s["dur"] for s in makers)


def test_a_measured_timeline_is_drawn_like_a_planned_one():
    """A clock that starts anywhere, and no flights."""
    _, timeline = timed("vision vit > language; language gpt", batch=4, microbatches=4)
    late = [attrs.evolve(e, begin_s=e.begin_s + 1e6, end_s=e.end_s + 1e6) for e in timeline.events]
    assert draw.text(timeline.events) == draw.text(late)
    assert draw.svg(timeline.events).count("<rect") == draw.svg(late).count("<rect")


def test_waits_are_thin_lanes():
    """One line for each wait that takes time."""
    _, timeline = timed(THREE, batch=16, microbatches=8)
    long = [e for e in timeline.events if isinstance(e.action, Wait) and e.end_s > e.begin_s]
    picture = drawn(THREE, batch=16, microbatches=8)
    lanes = [path for path in picture.findall(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    assert len(long) == len(lanes) > 0
