"""Pictures: golden text, and laws of what is drawn: inside the page, without overlaps."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET

import attrs
import pytest

from jobs import job, program_of
from mimogrid.core.base.units import in_bytes
from mimogrid.core.draw import marks, page, perfetto, picture
from mimogrid.core.draw.arrows import MOST_ARROWS
from mimogrid.core.draw.ranks import rank_map_svg
from mimogrid.core.draw.svg import svg
from mimogrid.core.draw.text import text as in_text
from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.schedule.actions import Compute, Kind, Send
from mimogrid.core.simulate.measured import measured
from mimogrid.core.simulate.memory import peak_bytes
from mimogrid.core.simulate.simulation import MANY, simulate
from timed import rank_by_rank


THREE = "vision vit dp2 pp2 > language; audio vit dp2 frozen > language; language gpt pp2 tp2"
WIDE = "vision vit dp8 tp2 > language; language gpt pp4 tp4 dp3"
CROWD = "vision vit dp96 > language; language gpt pp2 dp32"
SVG = "{http://www.w3.org/2000/svg}"


def timed(text, latency=0.0, **options):
    """A program and its simulated timeline."""
    program = program_of(text, **options)
    costs = attrs.evolve(assumed(program.topology), edge=EdgeCosts(latency=latency))
    return program, simulate(program, costs)


def drawn(text, **options):
    """The picture of a simulated timeline, parsed."""
    _, timeline = timed(text, **options)
    return ET.fromstring(svg(picture.picture(timeline, "a title")))


def tips(found):
    """What parts of a picture say of themselves."""
    return [tip.text for tip in found.iter(f"{SVG}title")]


def test_text_shows_a_row_per_rank_to_scale():
    """Names of one width, backwards of twice the length; dp ranks that do the same share a row."""
    _, timeline = timed("vision vit dp2 > language; language gpt pp2", batch=8, microbatches=4)
    expected = """
rank 0-1  vision.0   | F0 F1 F2             B0─── F3 B1───    B2───    B3───
rank 2    language.0 |    F0 F1       B0─── F2 B1─── F3 B2───    B3───
rank 3    language.1 |       F0 B0─── F1 B1─── F2 B2─── F3 B3───
"""
    assert expected.strip() == in_text(timeline.events)


@pytest.mark.parametrize("width", [60, 100, 172])
def test_text_keeps_to_its_width_and_says_so(width):
    """Where there is no room for names, a cell shows its kind."""
    _, timeline = timed("vision vit > language; language gpt pp4", batch=64, microbatches=64)
    *rows, note = in_text(timeline.events, width=width).splitlines()
    assert width >= max(map(len, rows))
    assert f"(narrowed to {width} columns: some numbers are left out)" == note
    assert {"F", "B", "─", " "} >= set("".join(row.partition("| ")[2] for row in rows)) - set("0123456789")


def test_text_shows_both_halves_of_a_backward():
    """I is the gradient of the inputs, W that of the weights; every number is there if all have room."""
    _, timeline = timed("language gpt pp2", schedule="zb-h1", batch=3, microbatches=3)
    expected = """
rank 0  language.0 | F0 F1    I0 W0 F2 I1 W1 I2 W2
rank 1  language.1 |    F0 I0 F1 I1 W0 F2 I2 W1 W2
"""
    assert expected.strip() == in_text(timeline.events)


def test_text_shows_which_ranks_a_rank_stands_for():
    """One of each class, with the ranks of the class."""
    _, timeline = timed(CROWD, batch=96, microbatches=1)
    members = timeline.classes.members
    events = [event for rank in members for event in timeline.events_of(rank)]
    shown = in_text(events, members=members)
    assert ["rank 0-95", "rank 96-127", "rank 128-159"] == re.findall("rank [0-9-]+", shown)


def test_every_compute_action_is_a_cell_with_its_number():
    """Each has a tip in words, too, which screen readers read."""
    _, timeline = timed(THREE, batch=16, microbatches=8)
    found = tips(drawn(THREE, batch=16, microbatches=8))
    computes = [event.action for event in timeline.events if isinstance(event.action, Compute)]
    for action in set(computes):
        assert computes.count(action) == sum(tip.startswith(f"{action}: ") for tip in found)


@pytest.mark.parametrize("ink", marks.INKS)
@pytest.mark.parametrize("chunk", [0, 1])
def test_kinds_differ_without_colour(ink, chunk):
    """A forward is much lighter than a backward, of whose halves one is striped and one an outline."""
    forward, backward, inputs, weights, part = (ink.of(kind, chunk, 2) for kind in Kind)
    assert backward == part
    assert contrast(forward.colour, backward.colour) > 2.5
    assert not any(fill.pattern or fill.outline for fill in (forward, backward))
    assert inputs.pattern
    assert weights.outline
    assert marks.WHITE == weights.colour
    for fill in (forward, backward, inputs, weights):
        assert contrast(fill.colour, fill.text) > (3 if chunk else 4.5)


def test_chunks_differ_without_colour():
    """A later chunk is lighter, in every kind."""
    for ink in marks.INKS:
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            first, second = (luminance(ink.of(kind, chunk, 2).colour) for chunk in (0, 1))
            assert second > 1.1 * first


VISION = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
"""What linear RGB becomes: Machado, Oliveira and Fernandes 2009, severity 1.0."""


@pytest.mark.parametrize("vision", VISION)
def test_modules_differ_in_any_colour_vision(vision):
    """By more than 9 in CIELAB, where 2.3 can just be told apart."""
    for shade in ("light", "dark"):
        seen = [lab(getattr(ink, shade), VISION[vision]) for ink in marks.INKS]
        assert all(math.dist(one, other) > 9 for one, other in itertools.combinations(seen, 2))


def linear(colour):
    """Linear RGB, 0 to 1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def lab(colour, vision):
    """CIELAB of a colour as one sees it, D65."""
    r, g, b = (sum(w * p for w, p in zip(row, linear(colour), strict=True)) for row in vision)
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z)]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


def contrast(one, other):
    """How well one colour reads on another, 1 to 21 (WCAG)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    """How light a colour is, 0 to 1."""
    r, g, b = linear(colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("language gpt", {"batch": 1, "microbatches": 1}),
        (THREE, {"batch": 16, "microbatches": 8, "latency": 0.5}),
        (WIDE, {"batch": 64, "microbatches": 8, "latency": 0.2}),
        ("vision vit dp2 > language; language gpt dp2 @0", {"batch": 64, "microbatches": 32}),
        ("vision vit > language; language gpt pp2 chunks2", {"schedule": "interleaved"}),
        (THREE, {"batch": 16, "microbatches": 8, "schedule": "zb-h1"}),
        (CROWD, {"batch": 96, "microbatches": 1}),
    ],
)
def test_texts_lie_on_the_page_and_not_on_each_other(text, options):
    """From 1 to 160 ranks, by a generous estimate of how wide letters are."""
    _, timeline = timed(text, **options)
    check_texts(drawn(text, **options))
    check_texts(ET.fromstring(svg(picture.above(timeline, timeline, "a title " * 30))))
    check_texts(ET.fromstring(svg(*(picture.picture(timeline, "a title") for _ in range(2)))))


def check_texts(found):
    """No text of a page leaves it or lies on another."""
    boxes = [box(text) for text in found.iter(f"{SVG}text")]
    width, height = float(found.get("width")), float(found.get("height"))
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
    assert "" == in_text([])
    ET.fromstring(svg(picture.picture(measured(program_of("language gpt"), []))))


def test_words_of_the_user_are_escaped():
    """A title is text, not markup."""
    _, timeline = timed("language gpt")
    assert "<b>" not in svg(picture.picture(timeline, "<b>"))


def test_memory_stands_under_each_rank_with_its_peak():
    """The most bytes of every rank, in words and, in the order of ranks, beside its strip."""
    _, timeline = timed(THREE, batch=16, microbatches=8)
    found = drawn(THREE, batch=16, microbatches=8)
    peaks = [in_bytes(size) for size in peak_bytes(timeline).values()]
    assert peaks == [tip.split(",")[0].removeprefix("at most ") for tip in tips(found) if "at most" in tip]
    assert peaks == [
        text.text for text in found.iter(f"{SVG}text") if (text.text or "").endswith("B") and " " in text.text
    ]


def test_the_critical_path_is_outlined_on_all_ranks_that_share_it():
    """Every compute action of it, on every rank that takes part."""
    program = program_of("language gpt pp2 tp2")
    timeline = rank_by_rank(program, assumed(program.topology))
    assert timeline.critical_path
    assert all(isinstance(segment.action, Compute) for segment in timeline.critical_path)
    found = ET.fromstring(svg(picture.picture(timeline)))
    assert 2 * len(timeline.critical_path) == len(found.findall(f".//{SVG}rect[@fill-opacity='0']"))


def test_messages_are_arrows_from_rank_to_rank():
    """All of them where they are few; few where they are many, and the legend says which."""
    _, few = timed(THREE, batch=4, microbatches=2, latency=0.5)
    between = [message for message in few.message_intervals if message.rank_source != message.rank_target]
    arrows = [tip for tip in tips(drawn(THREE, batch=4, microbatches=2, latency=0.5)) if "SEND" in tip]
    assert sorted(f"{f.transfer}, rank {f.rank_source} to {f.rank_target}" for f in between) == sorted(arrows)
    many = drawn(WIDE, batch=768, microbatches=32)
    assert 0 < sum("SEND" in tip for tip in tips(many)) <= MOST_ARROWS
    assert any("microbatches" in (text.text or "") for text in many.iter(f"{SVG}text"))


def test_of_a_large_world_one_rank_of_each_class_is_drawn():
    """And it says how many are like it; a page is bounded in any world."""
    _, timeline = timed(CROWD, batch=96, microbatches=1)
    texts = [text.text for text in drawn(CROWD, batch=96, microbatches=1).iter(f"{SVG}text")]
    assert ["rank 0 x 96  vision.0", "rank 96 x 32  language.0", "rank 128 x 32  language.1"] == [
        text for text in texts if text.startswith("rank")
    ]
    assert 160 == sum(row.count for row in picture.picture(timeline).rows)


def test_a_page_of_many_microbatches_is_bounded():
    """Cells that are too narrow to be seen are merged: a row has no more cells than there is room for."""
    _, timeline = timed("language gpt pp2", batch=1536, microbatches=1536)
    found = ET.fromstring(svg(picture.picture(timeline, "a title")))
    actions = sum(isinstance(event.action, Compute) for event in timeline.events)
    cells = sum(path.get("d").count("M") for path in found.iter(f"{SVG}path") if path.get("transform"))
    assert 0 < cells <= 2 * page.WIDEST / page.VISIBLE < actions


def test_a_plan_stands_above_the_measured_step():
    """Rank by rank, on one scale, each with its own times."""
    program, planned = timed(THREE, batch=4, microbatches=2)
    late = [attrs.evolve(e, begin_s=2 * e.begin_s + 5, end_s=2 * e.end_s + 5) for e in planned.events]
    found = ET.fromstring(svg(picture.above(planned, measured(program, late))))
    ranks = [text.text for text in found.iter(f"{SVG}text") if text.text.startswith("rank ")]
    assert [
        f"rank {rank}  {' '.join(str(i.stage) for i in program.topology.role(rank).stages)}  {which}"
        for rank in planned.classes.leader
        for which in ("planned", "measured")
    ] == ranks
    extents = {}
    for group in found.iter(f"{SVG}g"):
        tip = group.find(f"{SVG}title").text
        if tip.startswith("language.1 F0"):
            extents.setdefault(tip, float(group.find(f"{SVG}rect").get("width")))
    planned_width, measured_width = extents.values()
    assert measured_width == pytest.approx(2 * planned_width, abs=0.02)


def test_the_map_shows_every_rank_once_in_each_module_that_it_hosts():
    """With its position on the axes that are larger than 1, and ranks without a module as such."""
    topology = job(THREE, world=12)
    found = ET.fromstring(rank_map_svg(topology))
    hosted = [(rank, str(info.stage)) for rank in topology.ranks for info in topology.role(rank).stages]
    assert sorted(hosted) == sorted(
        (int(at[1]), at[2]) for tip in tips(found) if (at := re.match(r"rank (\d+): ([\w.]+),", tip))
    )
    words = [text.text for text in found.iter(f"{SVG}text")]
    assert {"idle", "no module", "feeds language", "feeds language; frozen", "has the loss"} <= set(words)
    assert 2 == words.count("tp1")


def test_the_map_of_a_large_world_has_blocks():
    """Ranks of one stage together, those that overlap and those that idle, each rank once per module."""
    topology = job(
        "vision vit dp64 > language; audio vit dp4 @64 > language; language gpt pp4 tp8 dp32 @0",
        batch=256,
        world=1100,
    )
    found = ET.fromstring(rank_map_svg(topology))
    check_texts(found)
    blocks = [re.match(r"ranks ([\d,]+) to ([\d,]+): (.+)", tip).groups() for tip in tips(found)]
    expected = [("0", "63", "vision.0"), ("64", "67", "audio.0")]
    expected += [(f"{256 * pp:,}", f"{256 * pp + 255:,}", f"language.{pp}") for pp in range(4)]
    assert expected == blocks
    words = [text.text for text in found.iter(f"{SVG}text")]
    assert {"idle: 76 ranks", "no module", "tp 8, dp 32, pp 4: 1,024 ranks"} <= set(words)


def traced(timeline, ranks=None):
    """The records of a trace, read from its text."""
    return json.loads("".join(perfetto.lines(timeline, ranks)))["traceEvents"]


def test_a_trace_holds_every_event_in_microseconds():
    """Processes are ranks; what computes and what moves are two tracks."""
    _, timeline = timed(THREE, batch=4, microbatches=2)
    found = traced(timeline)
    slices = [record for record in found if "X" == record["ph"]]
    assert [str(event.action) for event in timeline.events] == [record["name"] for record in slices]
    assert timeline.step_s * 1e6 == max(record["ts"] + record["dur"] for record in slices)
    names = [record["args"]["name"] for record in found if "process_name" == record["name"]]
    assert ["rank 0: vision.0", "rank 1: vision.0"] == names[:2]
    for event, record in zip(timeline.events, slices, strict=True):
        if isinstance(event.action, Compute):
            stage = event.action.stage
            said = {"module": stage.module, "stage": str(stage), "microbatch": event.action.microbatch}
            assert said == record["args"]


def test_a_trace_has_the_bytes():
    """Those of each transfer, at both ends the same in sum, and those that each rank holds at most."""
    _, timeline = timed(THREE, batch=16, microbatches=4)
    found = traced(timeline)
    moved = dict.fromkeys(("SEND", "RECV"), 0)
    for record in found:
        if "post" == record.get("cat"):
            moved["SEND" if "SEND" in record["name"] else "RECV"] += record["args"]["bytes"]
    assert 0 < moved["SEND"] == moved["RECV"]
    most = {}
    for record in found:
        if "C" == record["ph"]:
            most[record["pid"]] = max(most.get(record["pid"], 0), sum(record["args"].values()))
    assert peak_bytes(timeline) == most


@pytest.mark.parametrize(("leaders_only", "many"), [(False, MANY), (True, MANY), (True, 0)])
def test_a_trace_has_an_arrow_per_message(leaders_only, many, monkeypatch):
    """From within the action that makes it to within the one that reads it; also if a rank stands for its dp rank."""
    monkeypatch.setattr("mimogrid.core.simulate.simulation.MANY", many)
    _, timeline = timed(WIDE, batch=48, microbatches=2, latency=0.25)
    found = traced(timeline, timeline.classes.members if leaders_only else None)
    starts = {arrow["id"]: arrow for arrow in found if "s" == arrow["ph"]}
    ends = {arrow["id"]: arrow for arrow in found if "f" == arrow["ph"]}
    assert starts
    assert starts.keys() == ends.keys()
    assert timeline.by_dp_ranks is (not many)
    if not leaders_only:
        assert len(timeline.message_intervals) == len(starts)
    for i, start in starts.items():
        assert start["ts"] <= ends[i]["ts"]
        for arrow in (start, ends[i]):
            held = [s for s in found if "X" == s["ph"] and arrow["pid"] == s["pid"] and 0 == s["tid"]]
            assert any(s["ts"] < arrow["ts"] < s["ts"] + s["dur"] for s in held)


def test_a_measured_timeline_is_drawn_like_a_planned_one():
    """Whenever its clock starts: the same text, the same cells, the same trace."""
    program, timeline = timed("vision vit > language; language gpt", batch=4, microbatches=4)
    late = [attrs.evolve(e, begin_s=e.begin_s + 1024, end_s=e.end_s + 1024) for e in timeline.events]
    ran = measured(program, late)
    assert in_text(timeline.events) == in_text(ran.events)
    assert timeline.step_s == ran.step_s
    assert traced(timeline) == traced(ran)
    assert any(isinstance(event.action, Send) for event in ran.events)


def test_ranks_that_do_the_same_share_a_row():
    """In a world of more than a few ranks: those with equal times, whatever their peers are."""
    _, timeline = timed("vision vit dp8 tp2 > language; language gpt pp2 tp4 dp2", batch=16, microbatches=2)
    rows = picture.picture(timeline).rows
    assert [16, 8, 8] == [row.count for row in rows]
    few = picture.picture(timed("vision vit dp4 > language; language gpt pp2", batch=16)[1])
    assert [1] * 6 == [row.count for row in few.rows]


def test_a_long_step_is_shown_again_where_it_begins_and_ends():
    """On a scale on which numbers fit; nothing outside of the window is drawn."""
    _, timeline = timed("language gpt pp2", batch=256, microbatches=256)
    whole, *zoomed = page.pages_of(picture.picture(timeline))
    assert ["warm-up", "drain"] == [each.title.partition(",")[0] for each in zoomed]
    for each, (begin, end) in zip(zoomed, (each.window for each in zoomed), strict=True):
        for row in each.rows:
            assert all(begin <= event.begin_s <= event.end_s <= end for event in row.events)
    check_texts(ET.fromstring(svg(whole, *zoomed)))
    numbers = {text.text for text in ET.fromstring(svg(whole, *zoomed)).iter(f"{SVG}text")}
    assert {"0", "255"} <= numbers
    assert [whole.title] == [each.title for each in page.pages_of(picture.picture(timed("language gpt")[1]))]


def test_numbers_on_stripes_have_plates():
    """A box of their own under them, for readers of pages that know no paint-order."""
    found = svg(picture.picture(timed("language gpt pp2", schedule="zb-h1", batch=4, microbatches=4)[1]))
    assert "paint-order" not in found
    root = ET.fromstring(found)
    plates = [
        g
        for g in root.iter(f"{SVG}g")
        if (g[0].text or "").split()[1:2] and "I" in (g[0].text or "").split()[1]
    ]
    assert plates
    assert all(len(g.findall(f"{SVG}rect")) == 3 for g in plates if g.findall(f"{SVG}text"))
