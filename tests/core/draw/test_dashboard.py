"""The data of the interactive page: what is decoded from them is the timeline."""

import itertools

import attrs
import pytest

from jobs import program_of
from mimogrid.core.draw import dashboard
from mimogrid.core.draw.dashboard import PARTS, POINTS, curve_of, timeline_of
from mimogrid.core.draw.picture import picture
from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.timeline import CAUSES


THREE = "vision vit dp2 pp2 > language; audio vit dp2 frozen > language; language gpt pp2 tp2"
CROWD = "vision vit dp96 > language; language gpt pp2 dp32"


def timed(text, latency=0.0):
    """The simulated timeline of a job."""
    program = program_of(text, batch=768)
    costs = attrs.evolve(assumed(program.topology), edge=EdgeCosts(latency=latency))
    return simulate(program, costs)


def decoded(numbers, size):
    """Intervals of the page: begin, end, and what follows them."""
    at = 0
    for start in range(0, len(numbers), size):
        begin = at + numbers[start]
        at = begin + numbers[start + 1]
        yield begin, at, *numbers[start + 2 : start + size]


@pytest.mark.parametrize("text", [THREE, CROWD])
def test_every_compute_action_and_idle_time_is_found_again(text):
    """Times are right to a millionth of the step, and do not drift; kinds and microbatches are those of the actions."""
    timeline = timed(text, latency=0.3)
    page = timeline_of(picture(timeline))
    names, causes = page["names"], page["causes"]
    assert len(causes) == len(CAUSES)
    scale = timeline.step_s / PARTS
    ranks = 0
    for row in page["rows"]:
        rank = int(row["ranks"].split(",")[0].split("-")[0])
        ranks += sum(_count(run) for run in row["ranks"].split(", "))
        events = [event for event in timeline.events_of(rank) if isinstance(event.action, Compute)]
        assert [
            (event.action.kind.name, str(event.action.stage), event.action.microbatch) for event in events
        ] == [
            (names[what].split("|")[1], names[what].split("|")[3], microbatch)
            for _, _, what, microbatch in decoded(row["computes"], 4)
        ]
        times = [(begin * scale, end * scale) for begin, end, *_ in decoded(row["computes"], 4)]
        for event, (begin, end) in zip(events, times, strict=True):
            assert (event.begin_s, event.end_s) == pytest.approx((begin, end), abs=scale)
        idle = sum(end - begin for begin, end, _ in decoded(row["idles"], 3)) * scale
        assert sum(timeline.idle_s_by_rank[rank].values()) == pytest.approx(
            idle, abs=len(row["idles"]) * scale
        )
    assert len(timeline.classes.leader) == ranks


def _count(run):
    first, _, last = run.partition("-")
    return int(last or first) - int(first) + 1


def test_memory_keeps_its_peak():
    """However few levels are kept, the highest is among them, and no time goes back."""
    timeline = timed(THREE)
    for row in timeline_of(picture(timeline))["rows"]:
        assert row["peak"] == max(row["memory"][1::2])
        assert all(step >= 0 for step in row["memory"][::2])


def test_a_page_that_would_be_too_large_shows_some_rows_of_every_stage(monkeypatch):
    """What is left out is said."""
    timeline = timed(THREE)
    whole = picture(timeline)
    monkeypatch.setattr(
        dashboard, "ACTIONS", sum(len(row.events) + len(row.idles) for row in whole.rows) * 3 // 5
    )
    page = timeline_of(whole)
    assert len(page["rows"]) < len(whole.rows)
    assert f"{len(page['rows'])} of {len(whole.rows)} rows" in page["note"]
    kinds = {row.name.split("  ")[1] for row in whole.rows}
    assert kinds == {row["name"].split("  ")[1] for row in page["rows"]}


def test_a_long_curve_keeps_its_extremes():
    """A curve of any length has at most so many points, its highest, its lowest and its last one among them."""
    points = [(x, float((x * 7919) % 10_007)) for x in range(50_000)]
    curve = curve_of("loss", points)
    assert len(curve["x"]) <= POINTS + 3
    assert {min(y for _, y in points), max(y for _, y in points), points[-1][1]} <= set(curve["y"])
    assert all(a < b for a, b in itertools.pairwise(curve["x"]))
