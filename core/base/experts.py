"""Experts: which ranks hold the experts of a module, and which dp ranks compute together because of them.

Inside each pipeline stage the experts renumber the ranks, in the order of the module's grid: expert_tp is the fastest
axis, then ep, then expert_dp (`grid.Grid.regrouped`). Position e along ep holds block e of the experts, each split over
expert_tp; expert_dp counts the copies. A token goes to the ranks that hold its experts, so the ranks along
(expert_tp, ep) compute together, and so do all dp ranks that they belong to:

>>> grid = Grid((Axis("tp", 2), Axis("dp", 3)))
>>> view = expert_view(grid, expert_tp=1, ep=3)
>>> view.ranks_along(TOGETHER)
((0, 1, 2), (3, 4, 5))
>>> ep_dp_ranks_of(grid, view)  # dp_rank 1 has a rank in both groups
((0, 1, 2), (0, 1, 2), (0, 1, 2))
"""

import functools

from mimogrid.core.base.grid import Axis, Grid


TOGETHER = ("expert_tp", "ep")
"""The axes along which tokens go to their experts."""


def expert_view(grid: Grid, *, expert_tp: int, ep: int) -> Grid:
    """Return the view of a module's grid under the axes of its experts."""
    copies = grid.size // (grid.extent("pp") * expert_tp * ep)
    sizes = {"expert_tp": expert_tp, "ep": ep, "expert_dp": copies}
    return grid.regrouped(tuple(Axis(name, size) for name, size in sizes.items()), keep="pp")


def block_of(experts: int, ep: int, position: int) -> range:
    """Return which experts of a layer a position along `ep` holds; `ep` divides the number of experts.

    >>> [block_of(6, 3, position) for position in range(3)]
    [range(0, 2), range(2, 4), range(4, 6)]
    """
    each = experts // ep
    return range(position * each, (position + 1) * each)


@functools.lru_cache(maxsize=256)
def ep_dp_ranks_of(grid: Grid, experts: Grid) -> tuple[tuple[int, ...], ...]:
    """Return for each dp rank the dp ranks that compute together with it, itself included, ascending."""
    together = {dp_rank: {dp_rank} for dp_rank in range(grid.extent("dp"))}
    for ranks in experts.ranks_along(TOGETHER):
        met = set[int]().union(*(together[grid.position(rank)["dp"]] for rank in ranks))
        together |= dict.fromkeys(met, met)
    return tuple(tuple(sorted(dp_ranks)) for _, dp_ranks in sorted(together.items()))
