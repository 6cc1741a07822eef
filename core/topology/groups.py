"""Groups: every process group of a job, in one order for all ranks.

A group is identified by its ranks: uses with equal ranks share a group. Groups are created in *slots*, one slot after
another. The groups of a slot are disjoint, so each rank creates exactly one group per slot, alone if it is in none of
them. Therefore no two ranks create two groups in different orders, and the number of calls does not grow with the
world.

Some backends connect the ranks of a group only at its first use. In a step, ranks could reach the first uses in
different orders and deadlock (NCCL's communicators of two ranks are known for it). So each group is used once when it
is created, slot by slot, which cannot deadlock for the same reason.
"""

import enum
from collections.abc import Iterable, Iterator

import attrs

from mimogrid.core.base.experts import TOGETHER
from mimogrid.core.base.samples import overlapping
from mimogrid.core.topology.topology import Link, Module, Topology


COLLECTIVE_AXES = (("tp",), ("cp",), ("tp", "cp"), ("cp", "dp"))
"""The axes of each module along which ranks compute, gather rows, or reduce gradients."""
PARTIAL_AXES = ("tp", "cp", "dp")
"""The axes along which gradients are reduced that are partial along tp, in modules with such parameters."""
EXPERT_AXES = (TOGETHER, ("expert_tp",), ("expert_dp",))
"""The axes of experts along which tokens are exchanged, shards are gathered, or gradients are reduced."""

Ranks = tuple[int, ...]
Slot = tuple[Ranks, ...]


class Purpose(enum.Enum):
    """The use of a group: collectives, the messages of all ranks, or the messages from one rank to another."""

    COLLECTIVE = "collective"
    MESSAGES = "messages"
    CHANNEL = "channel"


@attrs.frozen
class Opening:
    """Groups that are created and first used at the same time. In a channel the sender is the first rank."""

    purpose: Purpose
    slot: Slot


def openings_of(topology: Topology, *, has_tags: bool) -> tuple[Opening, ...]:
    """Return every group of a job in the order in which all ranks create them.

    With tags one group carries all messages. Without tags the messages of a communicator run one after another, so each
    ordered pair of ranks has its own group.
    """
    collectives = tuple(Opening(Purpose.COLLECTIVE, slot) for slot in reversed(groups_of(topology)))
    if has_tags:
        return (*collectives, Opening(Purpose.MESSAGES, (topology.ranks,)))
    channels = in_slots((a, b) for a, b in channels_of(topology) if a != b)
    return (*collectives, *(Opening(Purpose.CHANNEL, slot) for slot in channels))


def groups_of(topology: Topology) -> tuple[Slot, ...]:
    """Return the slots of the groups for collectives; the first slot is empty: in it each rank is alone."""
    return ((), *in_slots(ranks for ranks in _uses(topology) if len(ranks) > 1))


def channels_of(topology: Topology) -> tuple[Ranks, ...]:
    """Return every (sender, receiver) pair of ranks that a step may use; with colocated stages both may be one rank.

    At a bridge these are all pairs of ranks whose dp ranks share samples, whatever rows a step has.
    """
    pairs = dict.fromkeys(pair for link in topology.links for pair in _ends(topology, link))
    return (*pairs, *((b, a) for a, b in pairs if (b, a) not in pairs))


def in_slots(groups: Iterable[Ranks]) -> tuple[Slot, ...]:
    """Put groups into slots: each group into the first slot in which its ranks are free.

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
        occupied, members = slot
        occupied.update(ranks)
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
    return sorted(
        {
            other
            for total in topology.cut_into
            for mine in range(source.microbatches)
            for yours in overlapping(mine, source.microbatches, target.microbatches)
            for other in target.dp_ranks_over(source.samples(dp_rank, mine, total), yours, total)
        }
    )
