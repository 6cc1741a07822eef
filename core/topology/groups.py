"""Groups: every process group that will exist, in one order that all ranks share.

A group is known by its ranks: two uses with equal ranks share one. Groups are made in *slots*, one after the
other; the groups of a slot are disjoint, so each rank makes exactly one in each slot (alone where it is in
none) and nothing that it is not in. Two ranks can so never meet in different orders, and the number of calls
does not grow with the world.

Where a backend connects the ranks of a group only when they first use it, in the midst of a step they would come to
that in different orders (a known deadlock of NCCL's communicators of two ranks). So each group is used once as soon
as it is made, slot by slot: by the same argument everybody gets through.
"""

import enum
from collections.abc import Iterable, Iterator

import attrs

from mimogrid.core.base.experts import TOGETHER
from mimogrid.core.base.samples import overlapping
from mimogrid.core.topology.topology import Link, Module, Topology


COLLECTIVE_AXES = (("tp",), ("cp",), ("tp", "cp"), ("cp", "dp"))
"""The axes of each module along which its ranks compute, gather rows, and reduce gradients."""
PARTIAL_AXES = ("tp", "cp", "dp")
"""The axes along which gradients are reduced that are partial along tp, in modules that have such."""
EXPERT_AXES = (TOGETHER, ("expert_tp",), ("expert_dp",))
"""The axes of a module's experts along which tokens cross, shards are gathered, and gradients are reduced."""

Ranks = tuple[int, ...]
Slot = tuple[Ranks, ...]


class Purpose(enum.Enum):
    """What a group is for: computing together, the messages of all, or the messages from one rank to another."""

    COLLECTIVE = "collective"
    MESSAGES = "messages"
    CHANNEL = "channel"


@attrs.frozen
class Opening:
    """Groups that are made, and used for the first time, at once. In a channel the sender stands first."""

    purpose: Purpose
    slot: Slot


def openings_of(topology: Topology, *, has_tags: bool) -> tuple[Opening, ...]:
    """Return every group of a job in the order in which all ranks make them.

    With tags one group carries all messages. Without, what shares a communicator runs one after the other, so each
    ordered pair of ranks has its own.
    """
    collectives = tuple(Opening(Purpose.COLLECTIVE, slot) for slot in reversed(groups_of(topology)))
    if has_tags:
        return (*collectives, Opening(Purpose.MESSAGES, (topology.ranks,)))
    channels = in_slots((a, b) for a, b in channels_of(topology) if a != b)
    return (*collectives, *(Opening(Purpose.CHANNEL, slot) for slot in channels))


def groups_of(topology: Topology) -> tuple[Slot, ...]:
    """Return the slots of the groups for collectives; the first is empty: there each rank is alone."""
    return ((), *in_slots(ranks for ranks in _uses(topology) if len(ranks) > 1))


def channels_of(topology: Topology) -> tuple[Ranks, ...]:
    """Return every (sender, receiver) pair of ranks that a step may use, itself included where it colocates.

    At a bridge any two ranks of dp ranks that share samples may meet, whatever the rows of a step turn out to be.
    """
    pairs = dict.fromkeys(pair for link in topology.links for pair in _ends(topology, link))
    return (*pairs, *((b, a) for a, b in pairs if (b, a) not in pairs))


def in_slots(groups: Iterable[Ranks]) -> tuple[Slot, ...]:
    """Deal groups into as few slots as come to hand: each goes to the first where its ranks are free.

    >>> in_slots([(0, 1), (2, 3), (1, 2), (0, 3), (0, 1)])
    (((0, 1), (2, 3)), ((1, 2), (0, 3)))
    """
    slots: list[tuple[set[int], list[Ranks]]] = []
    for ranks in dict.fromkeys(groups):
        fits = (slot for slot in slots if slot[0].isdisjoint(ranks))
        slot = next(fits, None)
        if slot is None:
            slot = (set[int](), list[Ranks]())
            slots.append(slot)
        taken, members = slot
        taken.update(ranks)
        members.append(ranks)
    return tuple(tuple(members) for _, members in slots)


def _uses(topology: Topology) -> Iterator[Ranks]:
    yield topology.ranks
    for axes in COLLECTIVE_AXES:
        for module in topology.modules.values():
            yield from module.grid.ranks_along(axes)
    for module in topology.modules.values():
        if any(module.is_partial(parameter) for parameter in module.parameters):
            yield from module.grid.ranks_along(PARTIAL_AXES)
    for axes in EXPERT_AXES:
        for module in topology.modules.values():
            if module.experts:
                yield from module.experts.ranks_along(axes)
    for module in topology.modules.values():
        if len(module.stages) > 1 and any(parameter.copy for parameter in module.parameters):
            yield from ((ranks[0], ranks[-1]) for ranks in module.grid.ranks_along("pp"))


def _ends(topology: Topology, link: Link) -> Iterator[Ranks]:
    source, target = topology.modules[link.source.module], topology.modules[link.target.module]
    for dp_rank in range(source.dp_size):
        senders = source.tp_cp_ranks(link.source, dp_rank)
        if link.edge is None:
            yield from zip(senders, target.tp_cp_ranks(link.target, dp_rank), strict=True)
            continue
        for other in _dp_ranks_met(topology, source, dp_rank, target):
            yield from ((a, b) for a in senders for b in target.tp_cp_ranks(link.target, other))


def _dp_ranks_met(topology: Topology, source: Module, dp_rank: int, target: Module) -> Iterable[int]:
    """Return the dp ranks of `target` that share a sample of a step with a dp rank of `source`, ascending."""
    total = topology.spec.batch.global_size
    return sorted(
        {
            other
            for mine in range(source.microbatches)
            for yours in overlapping(mine, source.microbatches, target.microbatches)
            for other in target.dp_ranks_over(source.samples(dp_rank, mine, total), yours, total)
        }
    )
