"""Diagnosis: the records of all ranks tell which rank the world waits for."""

from hypothesis import given
from hypothesis import strategies as st

import jobs
from mimogrid.core.faults.diagnosis import (
    GONE,
    LEFT,
    RUNNING,
    STOPPED,
    HeartbeatRecord,
    diagnose,
    faulty_rank,
)
from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import replay


PROGRAM = jobs.program_of("v vit dp2 > l; l gpt pp3")
LISTING = {rank: PROGRAM.of(rank) for rank in PROGRAM.topology.ranks}


def seen(rank: int, index: int, *, step: int = 3, since_s: float = 0.0, **fields: object) -> HeartbeatRecord:
    """A rank that runs, at an action of its program."""
    actions = LISTING[rank]
    inside = 0 <= index < len(actions)
    facts = {
        "doing": str(actions[index]) if inside else "between steps",
        "index": index if inside else -1,
        "state": RUNNING,
        **fields,
    }
    return HeartbeatRecord(rank=rank, host="h", step=step, count=len(actions), since_s=since_s, **facts)  # type: ignore[arg-type]


def halted(program: Program, late: int, index: int) -> dict[int, HeartbeatRecord]:
    """What all are seen doing once one of them stays before an action, and the others have gone as far as they can."""
    cut = {**LISTING, late: LISTING[late][:index]}
    blocked = {b.rank: cut[b.rank].index(b.action) for b in replay(program, cut).blocked}
    # One that has reached the norm waits there; later ones wait for a shorter time.
    return {
        rank: seen(rank, blocked.get(rank, len(LISTING[rank])), since_s=1.0 + rank, waits=rank in blocked)
        if rank != late
        else seen(rank, index, since_s=5.0)
        for rank in LISTING
    }


@given(late=st.sampled_from(sorted(LISTING)), data=st.data())
def test_whoever_waits_finds_the_one_that_fell_behind(late: int, data: st.DataObject) -> None:
    """Wherever a rank stays, each rank that is halted blames it: not its neighbour, not the longest wait."""
    index = data.draw(st.integers(0, len(LISTING[late]) - 2))
    world = halted(PROGRAM, late, index)
    for rank, record in world.items():
        if rank != late and record.index >= 0:
            assert late == faulty_rank(rank, world, PROGRAM)


def test_a_process_that_is_gone_is_to_blame_before_one_that_is_stopped() -> None:
    """And both before any that runs, wherever they are; one that left by itself is not."""
    world = halted(PROGRAM, 4, 3)
    others = {1: seen(1, 0, state=STOPPED), 2: seen(2, 0, state=GONE), 3: seen(3, -1, state=GONE, doing=LEFT)}
    assert 1 == faulty_rank(0, {**world, 1: others[1]}, PROGRAM)
    assert 2 == faulty_rank(0, {**world, **others}, PROGRAM)
    for rank in (0, 1, 2):
        assert 3 != faulty_rank(rank, {**world, 3: others[3]}, PROGRAM)


def test_between_steps_the_one_that_came_least_far_is_to_blame() -> None:
    """A rank that is still in an earlier step, or not where the others are."""
    saving = {rank: seen(rank, -1, doing="writing a checkpoint", since_s=2.0) for rank in LISTING}
    behind = seen(2, -1, step=2, doing="writing a checkpoint", since_s=9.0)
    assert 2 == faulty_rank(0, {**saving, 2: behind}, None)
    assert 3 == faulty_rank(0, {**saving, 3: seen(3, -1, since_s=9.0)}, None)


def test_at_one_moment_the_one_that_waits_for_nobody_is_to_blame() -> None:
    """All are saving; three have done their part of it, and were there before the one that has not."""
    for late in LISTING:
        saving = {r: seen(r, -1, doing="saving", since_s=1.0, waits=r != late) for r in LISTING}
        saving[late] = seen(late, -1, doing="saving", since_s=2.0)
        assert {late} == {faulty_rank(rank, saving, None) for rank in LISTING if rank != late}


def test_one_that_never_came_is_named_without_a_sighting() -> None:
    """Those who are missing are known before anything is known of them."""
    diagnosis = diagnose(0, {0: seen(0, -1, doing="rendezvous")}, None, now_s=4.0, suspects=(3,))
    assert str(diagnosis).startswith("rank 3 (host unknown) stopped answering")


def test_a_report_names_all_that_the_law_asks_for() -> None:
    """Rank, host, module, stage, step, action, microbatch, edge, and who waited for what."""
    world = halted(PROGRAM, 3, [str(a) for a in LISTING[3]].index("l.1 F2"))
    line = str(diagnose(2, world, PROGRAM, now_s=6.0))
    assert line.startswith("rank 3 (host h, module l, stage l.1) fell behind at step 3 in 'l.1 F2' (action ")
    assert "microbatch 2), begun 1.0 s before; rank 2 (host h) waited 3.0 s in '" in line
    assert "edge l.0 -> l.1) for its 'l.1 " in line
