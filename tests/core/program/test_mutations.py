"""Mutations: every change of a sound listing is either rejected or harmless.

`rehearsal` decides which: a listing that `verify` accepts gets to the end there, with the same weights, in whatever
order ranks take their turns. A listing that `verify` rejects, although it has all actions on their ranks, fails there.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Mapping

import attrs
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobs import halved, program_for, step_with
from jobs import job as topology_of
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.program.verify import listing_of, verify, verify_each
from mimogrid.core.schedule.actions import (
    Action,
    Collective,
    Compute,
    Direction,
    Gather,
    Kind,
    Norm,
    Recv,
    Send,
    Tie,
    Transfer,
    Update,
    Wait,
    WaitCollective,
    WaitGather,
    WaitReduce,
    matching_op,
)
from rehearsal import RehearsalError, rehearse
from scale import drawn, nightly_only


RAGGED = {"v": (4, 3, 0, 0, 1), "a": (1, 0, 0, 3)}
JOBS: dict[str, str] = {
    "chain": "v vit > l; l gpt pp2",
    "long chain": "l gpt pp4",
    "two encoders": "v vit pp2 > l; a vit > l; l gpt",
    "colocated": "v vit tp2 @0 > l; l gpt dp2 @0",
    "partial overlap": "v vit dp2 @0 > l; l gpt pp2 @1",
    "fan-in": "v vit dp2 > l; l gpt",
    "fan-out": "v vit > l; l gpt dp2",
    "uneven dp ranks": "v vit dp3 > l; l gpt dp2",
    "chunks": "l gpt pp2 chunks2",
    "zero bubble": "v vit frozen > l; l gpt pp3",
    "zero bubble, further ahead": "v vit > l; l gpt tp2 pp2",
    "encoder and chunks": "v vit > l; l gpt pp2 chunks2",
    "dp ranks and chunks": "l gpt dp2 pp2 chunks2",
    "own microbatches": "v vit m2 > l; l gpt m4 pp2",
    "more of its own": "v vit m12 > l; l gpt m2 dp2",
    "counts that do not divide": "v vit dp2 m3 > a, b; a regressor m2 @2; b regressor m3 @2",
    "frozen": "v vit pp2 frozen > l; l gpt",
    "frozen behind": "v vit > l; l gpt pp2 frozen",
    "tied, tp": "v vit tp2 > l; l gpt tp2 tied pp2",
    "sequence parallel": "l gpt tp2 sp pp2",
    "cp": "l gpt cp2 pp2",
    "experts": "v vit > l; l gpt dp2 ep2 x2",
    "skip edge": "v vit > m, l; m block > l; l gpt",
    "generator": "v vit > l; l gpt > g; g regressor",
    "shared updates": "v vit dp2 @0 > l; l gpt dp2 pp2 tied @0",
    "shared updates of chunks": "l gpt dp2 tp2 sp pp2 chunks2",
    "cut": "v vit dp2 layers3 > l; l gpt dp2 layers3",
    "cut, shared updates": "l gpt dp2 ep2 x2 pp2 layers4",
}
SCHEDULES = {
    "chunks": "interleaved",
    "encoder and chunks": "interleaved",
    "dp ranks and chunks": "interleaved",
    "shared updates of chunks": "interleaved",
    "zero bubble": "zb-h1",
    "zero bubble, further ahead": "zb-h2",
}


@attrs.frozen(eq=False)
class Known:
    """A program, a sound listing of it, and what that comes to."""

    program: Program
    listing: Listing
    result: Mapping[Hashable, int]


@functools.cache
def known(name: str, *, ragged: bool, split: bool, training: bool = True) -> Known:
    """Return a job's program with what a rehearsal of it gives."""
    text = JOBS[name]
    microbatches, schedule = 6 if "m3" in text else 4, SCHEDULES.get(name, "1f1b")
    topology = topology_of(
        text,
        batch=12,
        microbatches=microbatches,
        schedule=schedule,
        bucket_mb=0.002,
        cut_mb=0.001 if name.startswith("cut") else 4.0,
        sharded="shared" in name,
    )
    step = step_with(topology, RAGGED if ragged else {})
    program = program_for(step, training=training)
    own = listing_of(program)
    listing = halved(own) if split and not program.order.cuts else own  # What is cut is never split.
    return Known(program, listing, rehearse(program, own, room=program.order.max_in_flight))


def comes_to(case: Known, changed: Listing, seed: int, *, serial: bool = False) -> bool:
    """Whether a rehearsal of a changed listing gives what it should."""
    try:
        result = rehearse(
            case.program, changed, seed=seed, serial=serial, room=case.program.order.max_in_flight
        )
    except RehearsalError:
        return False
    return result == case.result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ragged", [True, *nightly_only([False])])
@pytest.mark.parametrize("name", JOBS)
def test_turns_and_halves_change_nothing(name: str, ragged: bool, training: bool) -> None:
    """A sound listing gives the same weights in any order of turns, and with every backward in two."""
    for split in (False, True):
        case = known(name, ragged=ragged, split=split, training=training)
        assert () == verify(case.program, case.listing)
        assert all(comes_to(case, case.listing, seed) for seed in range(4))
        through = not verify(case.program, case.listing, strict=True)
        assert through == comes_to(case, case.listing, seed=4, serial=True)


# -- mutations ---------------------------------------------------------------------------------------------

Change = Callable[[list[Action], int, int], None]


def remove(actions: list[Action], i: int, _: int) -> None:
    """Leave one out."""
    del actions[i]


def double(actions: list[Action], i: int, j: int) -> None:
    """Do one again, anywhere."""
    actions.insert(j, actions[i])


def swap(actions: list[Action], i: int, j: int) -> None:
    """Do one for the other."""
    actions[i], actions[j] = actions[j], actions[i]


def swap_neighbours(actions: list[Action], i: int, _: int) -> None:
    """Do one before the one that was before it."""
    swap(actions, i, i - 1)


def move(actions: list[Action], i: int, j: int) -> None:
    """Do one earlier or later."""
    actions.insert(j, actions.pop(i))


def move_a_little(actions: list[Action], i: int, j: int) -> None:
    """Do one up to four places away."""
    move(actions, i, min(max(i + j % 9 - 4, 0), len(actions) - 1))


def readdress(actions: list[Action], i: int, j: int) -> None:
    """Give one another microbatch, stage, peer, direction, end or kind."""
    actions[i] = _others(actions[i], actions)[j % len(_others(actions[i], actions))]


def _others(action: Action, around: list[Action]) -> list[Action]:
    stages = sorted({a.stage for a in around if isinstance(a, Compute)})
    if isinstance(action, Wait):
        return [action.transfer, *(Wait(other) for other in _others(action.transfer, around))]
    if isinstance(action, Norm | Update):
        return [Update(), Norm()]
    if isinstance(action, WaitCollective):
        return [action.posted, *(type(action)(r.stage, r.bucket) for r in _others(action.posted, around))]
    others: list[Action] = [attrs.evolve(action, stage=stage) for stage in stages]
    if isinstance(action, Compute):
        others += [attrs.evolve(action, kind=kind) for kind in Kind]
    if isinstance(action, Transfer):
        others += [Wait(action), matching_op(action), attrs.evolve(action, peer=action.stage)]
        others += [attrs.evolve(action, direction=direction) for direction in Direction]
        others += [(Send if isinstance(action, Recv) else Recv)(**_fields(action))]
    if isinstance(action, Collective):
        others += [each(action.stage, action.bucket) for each in (Gather, WaitGather, WaitReduce)]
        others += [attrs.evolve(action, bucket=action.bucket + 1)]
    elif not isinstance(action, Tie):
        others += [
            attrs.evolve(action, microbatch=k)
            for k in (action.microbatch + 1, action.microbatch - 1)
            if k >= 0
        ]
    return others


def _fields(transfer: Transfer) -> dict[str, object]:
    return {field.name: getattr(transfer, field.name) for field in attrs.fields(type(transfer))}


CHANGES: tuple[Change, ...] = (remove, double, swap, swap_neighbours, move, move_a_little, readdress)


def mutated(listing: Listing, change: Change, rank: int, i: int, j: int, *, everywhere: bool) -> Listing:
    """Return a listing with one thing changed on one rank, or on all that do the same; numbers count around."""
    chosen = sorted(listing)[rank % len(listing)]
    before = listing[chosen]
    actions = list(before)
    change(actions, i % len(actions), j % len(actions))
    return {
        r: tuple(actions) if r == chosen or (everywhere and own == before) else own
        for r, own in listing.items()
    }


DRAWN = (Phase.explicit, Phase.reuse, Phase.generate)
"""One mutation of a small job is small: to shrink it takes minutes and makes it no clearer."""
NUMBER = st.integers(0, 9999)
MUTATION = st.tuples(st.sampled_from(CHANGES), NUMBER, NUMBER, NUMBER, st.booleans())


@settings(max_examples=drawn(40), phases=DRAWN)
@given(
    st.sampled_from(sorted(JOBS)),
    st.booleans(),
    st.booleans(),
    st.lists(MUTATION, min_size=8, max_size=8),
    NUMBER,
)
def test_what_is_accepted_is_harmless(
    name: str, ragged: bool, split: bool, mutations: list[tuple[Change, int, int, int, bool]], seed: int
) -> None:
    """Of thousands of mutations, those that are accepted give the same weights, and the others need rejecting."""
    case = known(name, ragged=ragged, split=split)
    for change, rank, i, j, everywhere in mutations:
        changed = mutated(case.listing, change, rank, i, j, everywhere=everywhere)
        what = f"{change.__name__} of rank {rank}, {i}, {j}, everywhere: {everywhere}"
        faults = verify(case.program, changed)
        if not faults:
            assert comes_to(case, changed, seed), what
            assert comes_to(case, changed, seed + 1), what
        elif same_work(case.listing, changed):
            assert not comes_to(case, changed, seed), (what, faults)


def same_work(listing: Listing, changed: Listing) -> bool:
    """Whether every rank has the actions that it had, and ends the step as it did."""
    return all(
        collections.Counter(listing[rank]) == collections.Counter(changed[rank])
        and _end(listing[rank]) == _end(changed[rank])
        for rank in listing
    )


def _end(actions: tuple[Action, ...]) -> list[Action]:
    """The collectives of a list and what ends it, in its order; computing and messages may stand between them."""
    return [
        action for action in actions if isinstance(action, Collective | WaitCollective | Tie | Norm | Update)
    ]


@settings(max_examples=drawn(30), phases=DRAWN)
@given(
    st.sampled_from(sorted(JOBS)),
    st.booleans(),
    st.lists(MUTATION, min_size=4, max_size=4),
    NUMBER,
)
def test_one_queue_per_pair(
    name: str, split: bool, mutations: list[tuple[Change, int, int, int, bool]], seed: int
) -> None:
    """What passes strictly does so in a rehearsal with one queue per pair, and what only else passes does not."""
    case = known(name, ragged=True, split=split)
    for change, rank, i, j, everywhere in mutations:
        changed = mutated(case.listing, change, rank, i, j, everywhere=everywhere)
        strictly = verify(case.program, changed, strict=True)
        assert strictly == verify_each(case.program, changed, strict=True)
        if not verify(case.program, changed):
            assert comes_to(case, changed, seed, serial=True) == (not strictly)
        else:
            assert strictly
