"""Fullest ranks: for each module, the rank with it that holds most bytes at once, and how many.

Only the order of a rank's actions counts, not their times. Ranks that host the same stages and exchange as many bytes
hold the same, so one of each class is lowered.
"""

from collections.abc import Mapping

import attrs

from mimogrid.core.base.grid import Grid
from mimogrid.core.pricing.footprint import ranks_by_stages
from mimogrid.core.program.lower import Program
from mimogrid.core.simulate.memory import most_bytes
from mimogrid.core.simulate.rank_classes import RankClasses, alike_in_bytes
from mimogrid.core.topology.topology import Topology


@attrs.frozen
class Fullest:
    """The rank with a module that holds most, and how many bytes that is."""

    rank: int
    bytes: int

    def stage(self, topology: Topology, module: str) -> str:
        """Return the first stage that the rank has of a module."""
        return f"{module}.{topology.modules[module].grid.position_along('pp', self.rank)}"


def fullest_ranks(program: Program) -> dict[str, Fullest]:
    """Return, by module, the rank with it that holds most."""
    topology = program.topology
    by_stages = ranks_by_stages(topology)
    alike = RankClasses.of({rank: stages for stages, ranks in by_stages.items() for rank in ranks})
    held = {rank: most_bytes(program, rank) for rank in alike_in_bytes(program, alike).members}
    return {name: _fullest(module.grid, held) for name, module in topology.modules.items()}


def _fullest(grid: Grid, held: Mapping[int, int]) -> Fullest:
    rank = max((rank for rank in held if rank in grid), key=lambda rank: (held[rank], -rank))
    return Fullest(rank, held[rank])
