"""Cuts: the last backward of a stage in parts, with the sums of gradients between them."""

from collections.abc import Mapping, Sequence

import pytest

from jobs import edited, job, program_for, step_with
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.program.verify import listing_of, verify, verify_each
from mimogrid.core.schedule.actions import Compute, Kind, Reduce, WaitReduce
from mimogrid.core.simulate.lockstep import lockstep
from mimogrid.core.simulate.measured import mean_costs
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.update.buckets import buckets_of


ABSENT = {"v": (4, 0, 0, 0, 0, 0, 0, 0)}
"""Only the first sample has an image: in most microbatches nobody computes for it."""


def program(
    text: str,
    rows: Mapping[str, Sequence[int]] | None = None,
    *,
    bucket_mb: float = 0.002,
    cut_mb: float = 0.002,
    **facts: object,
) -> Program:
    """The program of a step of a job whose models are tiny, as are its buckets."""
    topology = job(text, bucket_mb=bucket_mb, cut_mb=cut_mb, **facts)  # type: ignore[arg-type]
    return program_for(step_with(topology, rows or {}))


def lines(planned: Program, rank: int) -> list[str]:
    """What a rank does from the first part of a backward on, without what it waits for."""
    actions = planned.of(rank)
    parts = [i for i, a in enumerate(actions) if isinstance(a, Compute) and a.kind is Kind.BACKWARD_PART]
    rest = actions[parts[0] :] if parts else ()
    return [str(action) for action in rest if not isinstance(action, WaitReduce)]


def test_a_part_is_followed_by_the_sums_of_what_it_completes() -> None:
    """Layers from the last one on, and behind each the buckets that are complete; at last the first layer."""
    planned = program("l gpt dp2 layers3", bucket_mb=0.002, cut_mb=0.002)
    expected = """
        l.0 B3/2
        l.0 REDUCE0
        l.0 B3/1
        l.0 REDUCE1
        l.0 B3
        l.0 REDUCE2
        l.0 REDUCE3"""
    assert [line.strip() for line in expected.split("\n")[1:]] == lines(planned, 1)[:-2]


@pytest.mark.parametrize(
    "text",
    [
        "l gpt dp2 layers3",
        "l gpt dp2 layers3 tied",
        "l gpt dp2 pp2 layers6 tied",
        "v vit dp2 layers3 > l; l gpt dp2 tp2 sp layers3",
        "v vit dp2 layers3 @0 > l; l gpt dp2 layers3 @0",
        "l gpt dp2 ep2 x2 layers3",
        "l gpt cp2 layers4",
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("rows", [{}, ABSENT])
def test_cut_programs_are_sound(text: str, sharded: bool, rows: Mapping[str, Sequence[int]]) -> None:
    """No part is missing, every sum follows its gradients, and all ranks of a group post sums in one order."""
    planned = program(text, rows, sharded=sharded)
    assert planned.order.cuts
    assert () == verify(planned) == verify_each(planned)
    for cuts in planned.order.cuts.values():
        assert 0 < sum(cut.share for cut in cuts) < 1


def test_no_bucket_is_summed_before_its_layers_are_done() -> None:
    """Whatever lies between parts: parameters of a bucket belong to layers that the parts have come to."""
    for text in (
        "l gpt dp2 layers4 tied",
        "l gpt dp2 tp2 sp layers4",
        "v vit dp2 layers4 > l; l gpt cp2 layers4",
    ):
        planned = program(text)
        for rank in planned.topology.ranks:
            down_to: int | None = None
            for action in planned.of(rank):
                if isinstance(action, Compute):
                    down_to = action.layer
                if isinstance(action, Reduce) and down_to is not None:
                    info = planned.topology.stages[action.stage]
                    table = {p.name: p.layer for p in info.parameters}
                    bucket = buckets_of(planned.topology, info, rank)[action.bucket]
                    places = {table[span.name] for span in bucket.spans}
                    assert "first" not in places
                    assert all(place >= down_to for place in places if isinstance(place, int))


def test_what_verify_finds() -> None:
    """A sum before its part, a part that is missing, and parts in the wrong order are refused."""
    planned = program("l gpt dp2 layers3")
    listing = listing_of(planned)
    mine = [str(action) for action in listing[0]]
    part, other = (i for i, line in enumerate(mine) if "/" in line)
    reduce = mine.index("l.0 REDUCE0")
    early = [*mine[:part], mine[reduce], *mine[part:reduce], *mine[reduce + 1 :]]
    assert any("REDUCE0' comes before 'l.0 B3/" in p for p in verify(planned, edited(listing, 0, *early)))
    without = [*mine[:part], *mine[part + 1 :]]
    assert any(f"'{mine[part]}' is missing" in p for p in verify(planned, edited(listing, 0, *without)))
    swapped = [*mine]
    swapped[part], swapped[other] = mine[other], mine[part]
    found = verify(planned, edited(listing, 0, *swapped))
    assert any(f"'{mine[other]}' comes before '{mine[part]}', which it needs" in p for p in found)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("l gpt dp2 layers3", {"cut_mb": 0.0}),
        ("l gpt dp2 layers3", {"cut_mb": 4.0}),
        ("l gpt dp2 layers1", {"bucket_mb": 25.0}),
        ("l gpt pp2 layers6", {}),
        ("l gpt dp2 pp2 layers6", {"schedule": "zb-h1"}),
        ("l gpt dp2 layers3 frozen > r; r regressor", {}),
    ],
)
def test_what_is_not_cut(text: str, facts: Mapping[str, object]) -> None:
    """Nothing where cuts are off or would free too little, nothing sums, backwards are split, or nothing trains."""
    assert {} == program(text, **facts).order.cuts  # type: ignore[arg-type]


def test_only_what_computes_last_on_a_rank_is_cut() -> None:
    """The sums of the last chunk run beside the backwards of the first; an encoder ends the step on shared ranks."""
    chunks = program("l gpt dp2 pp2 chunks2 layers12", schedule="interleaved")
    assert {"l.0", "l.1"} == set(map(str, chunks.order.cuts))
    shared = program("v vit dp2 layers3 @0 > l; l gpt dp2 layers3 @0")
    assert {"v.0"} == set(map(str, shared.order.cuts))


def test_a_cut_step_is_as_short_as_its_sums_allow() -> None:
    """All sums but the last run beside the rest of the backward, in every clock, and the bound holds."""
    costs = Costs(stages={"l.0": StageCosts(forward=1.0, backward=2.0, reduce=1.0)})
    cut = program("l gpt dp2 layers3", bucket_mb=0.004, cut_mb=0.002)
    whole = program("l gpt dp2 layers3", bucket_mb=0.004, cut_mb=0.0)
    assert pytest.approx(4 * 3.0 + 1.0) == simulate(whole, costs).step_s
    timeline = simulate(cut, costs)
    last = cut.order.of(next(iter(cut.order.cuts)))[-1]
    hidden = sum(
        event.end_s - event.begin_s
        for event in timeline.events_of(0)
        if isinstance(event.action, WaitReduce) and event.action.bucket == 0
    )
    assert 0.0 == hidden
    assert timeline.lower_bound_s <= timeline.step_s < 4 * 3.0 + 0.7
    assert pytest.approx(timeline.step_s) == lockstep(cut, costs).step_s
    assert pytest.approx(12.0) == timeline.busy_s[0]
    assert pytest.approx(1.0) == sum(cut.order.share(part) for part in cut.order.parts(last))


def test_parts_are_measured_as_one_backward() -> None:
    """Costs that are measured of a cut step are those of a step that is not cut."""
    costs = Costs(stages={"l.0": StageCosts(forward=1.0, backward=2.0)})
    found = mean_costs(simulate(program("l gpt dp2 layers3"), costs).events)
    assert 2.0 == pytest.approx(found.of("l.0").whole_backward)
