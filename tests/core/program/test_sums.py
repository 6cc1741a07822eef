"""Sums of gradients, gathers of weights: when they are posted, in which order, and what verify finds otherwise."""

import math

import pytest

from jobs import edited, job, program_for, program_of, step_with
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.program.verify import listing_of, verify
from mimogrid.core.schedule.actions import Compute, Gather, Reduce, WaitGather, WaitReduce
from mimogrid.core.simulate.simulation import simulate
from timed import rank_by_rank


CHUNKS = "l gpt dp2 pp2 chunks2"
ABSENT = {"v": (4, 0, 0, 0, 0, 0, 0, 0)}
"""Only the first sample has an image: the other dp ranks never compute for it."""


def program(text: str, rows: dict[str, tuple[int, ...]] | None = None, **facts: object) -> Program:
    """The program of a step, with several buckets a stage."""
    return program_for(step_with(job(text, bucket_mb=0.002, **facts), rows or {}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("v vit dp2 > l; l gpt dp2 pp2", "1f1b"),
        ("v vit dp2 @0 > l; l gpt dp2 tp2 @0", "1f1b"),
        (CHUNKS, "interleaved"),
        ("v vit dp2 > l; l gpt tp2 sp pp2", "zb-h2"),
    ],
)
def test_a_sum_is_posted_once_its_gradient_is_complete_and_waited_for_at_the_end(
    text: str, schedule: str
) -> None:
    """A reduction follows the last turn of its stage on any dp rank, also where a dp rank has no rows."""
    planned = program(text, ABSENT, schedule=schedule)
    index = planned.order.index
    for rank in planned.topology.ranks:
        actions = planned.of(rank)
        posted = [action for action in actions if isinstance(action, Reduce)]
        assert planned.sums(rank) == tuple(posted)
        for reduce in posted:
            complete = max(index[a] for a in planned.order.actions if a.stage == reduce.stage)
            place = actions.index(reduce)
            before = [index[a] for a in actions[:place] if isinstance(a, Compute)]
            after = [index[a] for a in actions[place:] if isinstance(a, Compute)]
            assert max(before, default=-1) <= complete < min(after, default=math.inf)
        waits = [action.posted for action in actions if isinstance(action, WaitReduce)]
        assert posted == waits
        end = actions.index(WaitReduce(posted[0].stage, posted[0].bucket)) if posted else len(actions)
        assert not any(isinstance(action, Compute) for action in actions[end:])


def test_ranks_that_share_sums_post_them_in_one_order() -> None:
    """A communicator matches calls by their order: also where dp ranks are without rows, and stages share ranks."""
    for text, schedule in ((CHUNKS, "interleaved"), ("v vit dp2 @0 > l; l gpt dp2 @0", "1f1b")):
        planned = program(text, ABSENT, schedule=schedule)
        orders: dict[tuple[int, ...], set[tuple[Reduce, ...]]] = {}
        for rank in planned.topology.ranks:
            for group in {planned.joint(rank, reduce) for reduce in planned.sums(rank)}:
                mine = tuple(r for r in planned.sums(rank) if planned.joint(rank, r) == group)
                orders.setdefault(group, set()).add(mine)
        assert orders
        assert all(1 == len(found) for found in orders.values())


def test_sums_of_a_chunk_go_on_while_another_is_computed() -> None:
    """The last chunk is summed beside the backwards of the first, and the step is as short as if that took no time."""
    planned = program_of(CHUNKS, batch=8, microbatches=4, schedule="interleaved")
    late, early = ("l.0.1", "l.1.1"), ("l.0", "l.1")

    def step_s(**reduce: float) -> float:
        stages = {
            name: StageCosts(forward=1.0, backward=2.0, reduce=reduce.get("late", 0.0)) for name in late
        }
        stages |= {
            name: StageCosts(forward=1.0, backward=2.0, reduce=reduce.get("early", 0.0)) for name in early
        }
        return simulate(planned, Costs(stages=stages)).step_s

    assert step_s() == step_s(late=1.5) < step_s(early=1.5)


def test_groups_that_one_rank_stands_for_do_not_wait_for_each_other() -> None:
    """Rank 0 stands for all four, so for two groups of `a` and for that of `z`, which sum side by side."""
    planned = program_of("a vit dp2 tp2 @0 > z; z gpt dp4 @0", batch=4, microbatches=1)
    costs = Costs(stages={name: StageCosts(forward=1.0, backward=2.0, reduce=9.0) for name in ("a.0", "z.0")})
    folded, whole = simulate(planned, costs), rank_by_rank(planned, costs)
    assert 1 == len(folded.classes.members)
    assert whole.step_s == folded.step_s == 1 + 1 + 2 + 2 + 9


def test_two_ranks_that_post_sums_in_another_order() -> None:
    """No walk gets stuck in that: a communicator would add up what does not belong together."""
    planned = program("l gpt dp2")
    listing = listing_of(planned)
    lines = [str(action) for action in listing[1]]
    a, b = lines.index("l.0 REDUCE0"), lines.index("l.0 REDUCE1")
    lines[a], lines[b] = lines[b], lines[a]
    assert (
        "rank 1 reaches 'l.0 REDUCE1' when rank 0 reaches 'l.0 REDUCE0': a communicator of both would mix them up",
    ) == verify(planned, edited(listing, 1, *lines))


def test_a_sum_on_the_ranks_that_compute_together() -> None:
    """Partial sums over tp lie at one place among the computations of the tp ranks: they share a communicator."""
    planned = program_of("a gpt tp2 sp @0; b gpt tp2 sp @0", batch=2, microbatches=1)
    listing = listing_of(planned)
    lines = [str(action) for action in listing[1]]
    early = next(i for i, line in enumerate(lines) if " REDUCE" in line)
    late = max(i for i, action in enumerate(listing[1]) if isinstance(action, Compute))
    assert early < late
    lines.insert(late, lines.pop(early))
    (fault,) = verify(planned, edited(listing, 1, *lines))
    assert "a communicator of both would mix them up" in fault


def test_a_sum_that_nobody_waits_for() -> None:
    """The step would be taken with what is half summed."""
    planned = program("l gpt dp2")
    listing = listing_of(planned)
    lines = [str(action) for action in listing[0] if str(action) != "l.0 WAIT_REDUCE1"]
    (fault,) = verify(planned, edited(listing, 0, *lines))
    assert "rank 0: 'l.0 WAIT_REDUCE1' is missing" == fault


# -- gathers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("v vit dp2 > l; l gpt dp2 pp2 tied", "1f1b"),
        ("v vit dp2 @0 > l; l gpt dp2 tp2 sp @0", "1f1b"),
        (CHUNKS, "interleaved"),
    ],
)
def test_weights_are_gathered_beside_the_first_forwards(text: str, schedule: str) -> None:
    """All gathers are posted first, those of first layers first, and each stage waits for its own before it computes.

    Also where a dp rank computes nothing for a stage: it waits before the step ends.
    """
    planned = program(text, ABSENT, schedule=schedule, sharded=True)
    assert any(planned.gathers(rank) for rank in planned.topology.ranks)
    for rank in planned.topology.ranks:
        actions = planned.of(rank)
        gathers = planned.gathers(rank)
        assert gathers == actions[: len(gathers)]
        for stage in {gather.stage for gather in gathers}:
            buckets = [gather.bucket for gather in gathers if gather.stage == stage]
            assert sorted(buckets, reverse=True) == buckets
            first = next(
                (i for i, a in enumerate(actions) if isinstance(a, Compute) and a.stage == stage),
                len(actions),
            )
            waits = [i for i, a in enumerate(actions) if isinstance(a, WaitGather) and a.stage == stage]
            assert [*gathers] == [*dict.fromkeys(gathers)]
            assert len(buckets) == len(waits)
            assert max(waits) < first
    assert () == verify(planned)


def test_only_a_sharded_update_gathers() -> None:
    """A step without shares, a step that does not train, and a module with one copy have nothing to gather."""
    for text, shared in (("l gpt dp2", False), ("l gpt tp2 sp", True), ("v vit dp2 frozen > l; l gpt", True)):
        planned = program(text, sharded=shared)
        assert not any(planned.gathers(rank) for rank in planned.topology.ranks)
    step = step_with(job("l gpt dp2", sharded=True))
    assert not any(isinstance(a, Gather) for a in program_for(step, training=False).of(0))


def test_what_is_gathered_takes_no_time_beside_what_comes_before() -> None:
    """The gather of a later stage is over when the first forward has come to it; that of the first stage is not."""
    planned = program_of("v vit dp2 > l; l gpt dp2", batch=8, microbatches=2, sharded=True)

    def step_s(**gather: float) -> float:
        stages = {
            f"{name}.0": StageCosts(forward=1.0, backward=2.0, gather=gather.get(name, 0.0)) for name in "vl"
        }
        timeline = simulate(planned, Costs(stages=stages))
        assert timeline.lower_bound_s <= timeline.step_s
        return timeline.step_s

    assert step_s() == step_s(l=1.0) == step_s(v=0.5) - 0.5 == step_s(l=1.5) - 0.5


def test_weights_that_are_read_before_they_are_there() -> None:
    """Half of them would be of the step before."""
    planned = program("l gpt dp2", sharded=True)
    listing = listing_of(planned)
    lines = [str(action) for action in listing[0]]
    wait, first = lines.index("l.0 WAIT_GATHER0"), lines.index("l.0 F0")
    assert wait < first
    lines.insert(first, lines.pop(wait))
    (fault,) = verify(planned, edited(listing, 0, *lines))
    assert "rank 0: 'l.0 F0' comes before 'l.0 WAIT_GATHER0', which it needs" == fault
