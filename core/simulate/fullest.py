"""Fullest ranks: for each module, the rank with it that holds most bytes at once, and how many.

Only the order of a rank's actions counts, not their times. Ranks that host the same stages and exchange as many bytes
hold the same, so one of each class is looked at. Of these only those are lowered that may hold most: messages are
small beside what forwards save, and the first ranks of a pipeline save most.
"""

import functools
from collections.abc import Callable, Hashable, Mapping

import attrs

from mimogrid.core.base.grid import Grid
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.program.lower import Program
from mimogrid.core.simulate.memory import bytes_between, most_bytes
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


def fullest_ranks(
    program: Program, whole: Topology | None = None, *, each: int | None = None, lowered: int | None = None
) -> dict[str, Fullest]:
    """Return, by module, the rank with it that holds most.

    The program may be that of some of the dp ranks of a `whole` topology. What these share counts as on the first rank
    there that hosts the same stages. Of the ranks that host the same stages, `each` are looked at, or all. Of a module
    at most so many ranks are `lowered`, those first that may hold most: another one may hold a little more then.
    """
    topology, more = program.topology, _more_bytes(program, whole)
    most = {rank: bounds[1] for rank, bounds in _bounds(program, more, each).items()}

    @functools.cache
    def held(rank: int) -> int:
        return most_bytes(program, rank) + more[rank]

    return {name: _fullest(module.grid, most, held, lowered) for name, module in topology.modules.items()}


def bounds_of_fullest(
    program: Program, whole: Topology | None = None, *, each: int | None = None
) -> tuple[dict[str, Fullest], int]:
    """Return, by module, the rank that holds most if messages take no buffers, and what no rank holds more than.

    Likewise, but nothing is lowered.
    """
    bounds = _bounds(program, _more_bytes(program, whole), each)
    least = {
        name: max(
            (Fullest(rank, bytes_) for rank, (bytes_, _) in bounds.items() if rank in module.grid),
            key=lambda each: (each.bytes, -each.rank),
        )
        for name, module in program.topology.modules.items()
    }
    return least, max(most for _, most in bounds.values())


def _bounds(program: Program, more: Mapping[int, int], each: int | None) -> Mapping[int, tuple[int, int]]:
    """Return between which two numbers the bytes of a rank of each class are, with `more` than the program says."""
    by_stages = program.topology.ranks_by_stages
    some = {
        rank: stages
        for stages, ranks in by_stages.items()
        for rank in ranks[:: max(1, len(ranks) // each) if each else 1]
    }
    alike = RankClasses.of(some)
    leaders = alike_in_bytes(program, alike).members
    known: dict[Hashable, int] = {}
    found = {rank: bytes_between(program, rank, known) for rank in leaders}
    return {rank: (least + more[rank], most + more[rank]) for rank, (least, most) in found.items()}


def _more_bytes(program: Program, whole: Topology | None) -> Mapping[int, int]:
    """Return what each rank keeps more in the whole topology: mostly less than nothing, as more dp ranks share it."""
    if whole is None:
        return dict.fromkeys(program.topology.ranks, 0)
    in_whole = whole.ranks_by_stages
    return {
        rank: kept(whole, in_whole[stages][0]).bytes - kept(program.topology, ranks[0]).bytes
        for stages, ranks in program.topology.ranks_by_stages.items()
        for rank in ranks
    }


def _fullest(grid: Grid, most: Mapping[int, int], held: Callable[[int], int], lowered: int | None) -> Fullest:
    """Return the fullest rank of a grid; `most` has what ranks hold at most, `held` says what they hold."""
    best = Fullest(-1, -1)
    ranks = sorted((rank for rank in most if rank in grid), key=lambda rank: (-most[rank], rank))
    for rank in ranks[:lowered]:
        if most[rank] < best.bytes:
            break
        best = max(best, Fullest(rank, held(rank)), key=lambda each: (each.bytes, -each.rank))
    return best
