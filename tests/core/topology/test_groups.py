"""Groups: all that will be needed exist, and nobody meets anybody in two orders."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import CASES
from jobs import job, program_of
from mimogrid.core.program.verify import listing_of
from mimogrid.core.schedule.actions import Transfer
from mimogrid.core.topology.groups import Purpose, Ranks, channels_of, groups_of, in_slots, openings_of


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(tuple)))
def test_slots_are_disjoint_and_whole(groups: list[Ranks]) -> None:
    """Every group is in one slot, and no rank is twice in a slot."""
    slots = in_slots(groups)
    assert sorted(set(groups)) == sorted(group for slot in slots for group in slot)
    for slot in slots:
        ranks = [rank for group in slot for rank in group]
        assert sorted(set(ranks)) == sorted(ranks)


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=3, unique=True).map(tuple)))
def test_members_make_their_groups_in_one_order(groups: list[Ranks]) -> None:
    """Ranks that make their groups slot by slot, each waiting for its members, all get through."""
    slots = in_slots(groups)
    assert not stuck({rank: [g for slot in slots for g in slot if rank in g] for rank in range(6)})


def stuck(todo: dict[int, list[Any]], ranks_of: Callable[[Any], Ranks] = lambda group: group) -> bool:
    """Whether ranks that use their groups one after the other, each when all of its members have come, stop."""
    todo = {rank: list(groups) for rank, groups in todo.items()}
    while any(todo.values()):
        ready = {group for groups in todo.values() for group in groups[:1]}
        used = next((g for g in ready if all(todo[rank][:1] == [g] for rank in ranks_of(g))), None)
        if used is None:
            return True
        for rank in ranks_of(used):
            todo[rank].pop(0)
    return False


@pytest.mark.parametrize("has_tags", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_connect_in_one_order(case: str, has_tags: bool) -> None:
    """Every group is used once when it is made, and nobody waits in a circle; in two orders, two ranks would."""
    topology = job(CASES[case], batch=48)
    openings = openings_of(topology, has_tags=has_tags)
    todo = {
        rank: [(o.purpose, ranks) for o in openings for ranks in o.slot if rank in ranks and len(ranks) > 1]
        for rank in topology.ranks
    }
    assert not stuck(todo, lambda use: use[1])
    wanted = {(a, b) for a, b in channels_of(topology) if a != b}
    channels = {ranks for uses in todo.values() for purpose, ranks in uses if purpose is Purpose.CHANNEL}
    assert (set() if has_tags else wanted) == channels
    both = [(a, b) for a, b in channels if (b, a) in channels]
    if both:
        one, other = ((Purpose.CHANNEL, pair) for pair in (min(both), min(both)[::-1]))
        uses = todo[one[1][0]]
        i, j = uses.index(one), uses.index(other)
        uses[i], uses[j] = uses[j], uses[i]
        assert stuck(todo, lambda use: use[1])


@pytest.mark.parametrize("case", CASES)
def test_every_group_that_is_needed_exists(case: str) -> None:
    """Who shares a shard, a dp rank, a gradient or a tied weight has a group, and all ranks of the job have one."""
    topology = job(CASES[case], batch=48)
    first, *slots = groups_of(topology)
    assert () == first
    exist = {group for slot in slots for group in slot}
    needed = {topology.ranks}
    for module in topology.modules.values():
        for axes in (("tp",), ("cp",), ("tp", "cp"), ("cp", "dp")):
            needed |= {module.grid.group_of(rank, axes) for rank in module.grid.ranks}
        if any(parameter.copy for parameter in module.parameters):
            pipelines = module.grid.ranks_along("pp")
            needed |= {(ranks[0], ranks[-1]) for ranks in pipelines}
    assert {group for group in needed if len(set(group)) > 1} <= exist
    for slot in slots:
        assert len({rank for group in slot for rank in group}) == sum(map(len, slot))


ROWS = st.lists(st.sampled_from((0, 1, 5)), min_size=1, max_size=48)


@given(st.sampled_from(sorted(CASES)), ROWS)
def test_every_message_has_a_channel(case: str, rows: list[int]) -> None:
    """Whatever rows a step has, its messages go between ranks that have a channel, in both directions."""
    names = ("vision", "image", "audio")
    program = program_of(CASES[case], dict.fromkeys(names, rows), batch=48)
    channels = channels_of(program.topology)
    assert len(set(channels)) == len(channels)
    assert {(b, a) for a, b in channels} == set(channels)
    used = {
        (rank, peer)
        for rank, actions in listing_of(program).items()
        for action in actions
        if isinstance(action, Transfer)
        for peer in program.peers_of(rank, action)
    }
    assert used <= set(channels)


def test_channels_of_dp_ranks_that_do_not_divide() -> None:
    """Three dp ranks against two: the middle one talks to both, the outer ones to one each."""
    topology = job(CASES["dp3 dp2"], batch=24)
    forward = {(a, b) for a, b in channels_of(topology) if a < b}
    assert {(0, 3), (1, 3), (1, 4), (2, 4)} == forward


def test_channels_of_uneven_counts() -> None:
    """With microbatches of their own, dp ranks meet wherever they ever share a sample."""
    topology = job("vision vit dp2 m8 > language; language gpt dp2 m4", batch=24)
    slow = {
        (source, target)
        for source, target in itertools.product(range(2), range(2))
        if {i for k in range(8) for i in topology.modules["vision"].samples(source, k, 24)}
        & {i for k in range(4) for i in topology.modules["language"].samples(target, k, 24)}
    }
    forward = {(a, b - 2) for a, b in channels_of(topology) if a < b}
    assert slow == forward
