"""Nodes: how many ranks each node of a cluster takes, so that ranks that share a layer are on one node.

Launchers put ranks in order on nodes. Between two nodes a tp group would be cut where the number of ranks of a node is
not a multiple of its size. It is better to leave places empty.
"""

from collections.abc import Sequence

from mimogrid.core.topology.topology import Topology


def cuts_of(topology: Topology) -> frozenset[int]:
    """Return where the ranks of a world may be cut: the numbers of ranks in front of which every tp group ends."""
    inside = {
        rank
        for module in topology.modules.values()
        for group in module.grid.ranks_along([axis.name for axis in module.grid.axes if axis.name == "tp"])
        for rank in range(min(group) + 1, max(group) + 1)
    }
    return frozenset(range(topology.world_size + 1)) - inside


def ranks_of_nodes(topology: Topology, places: Sequence[int]) -> tuple[int, ...] | None:
    """Return how many ranks each node takes, in order of ranks, at most as many as it has places; None: too few.

    Each node takes as many as it can without cutting a tp group.
    """
    cuts, begin, taken = cuts_of(topology), 0, list[int]()
    for count in places:
        end = max(cut for cut in cuts if begin <= cut <= begin + count)
        taken.append(end - begin)
        begin = end
    return tuple(taken) if begin == topology.world_size else None
