"""Collectives: the seconds in which ranks along some axes of a grid exchange bytes.

An all-reduce over n ranks moves 2 (n-1)/n of its bytes through each rank, an all-gather (n-1)/n, as in a ring. The
latency is that of a tree: log2 n times per direction. The slowest link among the ranks counts.
"""

import functools
import math

from mimogrid.core.base.grid import Grid
from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.topology.topology import Link, Topology


def all_reduce_s(size_bytes: float, grid: Grid, axes: tuple[str, ...], machine: Machine) -> float:
    """Return the seconds in which the ranks along some axes all-reduce so many bytes."""
    return 2 * gather_s(size_bytes, grid, axes, machine)


def gather_s(size_bytes: float, grid: Grid, axes: tuple[str, ...], machine: Machine) -> float:
    """Return the seconds in which the ranks along some axes all-gather so many bytes in all."""
    size = math.prod(grid.extent(axis) for axis in axes)
    if size == 1:
        return 0.0
    latency = _link_along(grid, axes, machine).latency
    return moved_s(size_bytes, grid, axes, machine) + math.ceil(math.log2(size)) * latency


def moved_s(size_bytes: float, grid: Grid, axes: tuple[str, ...], machine: Machine) -> float:
    """Return the seconds of an all-gather without latency."""
    size = math.prod(grid.extent(axis) for axis in axes)
    return _link_along(grid, axes, machine).carry_s(size_bytes * (size - 1) / size) if size > 1 else 0.0


def _link_along(grid: Grid, axes: tuple[str, ...], machine: Machine) -> EdgeCosts:
    """Return the slowest link among ranks along some axes."""
    return machine.link(within=_is_within(grid, axes, machine.accelerator.per_node))


@functools.lru_cache(maxsize=1 << 12)
def _is_within(grid: Grid, axes: tuple[str, ...], per_node: int) -> bool:
    """Return whether every group of ranks along some axes is within a node."""
    known = tuple(axis.name for axis in grid.axes if axis.name in axes)
    return all(len({rank // per_node for rank in ranks}) == 1 for ranks in grid.ranks_along(known))


def is_near(topology: Topology, link: Link, machine: Machine) -> bool:
    """Return whether a link is within a node: each pair of ranks of a pipeline link, all ranks of a bridge."""
    per_node = machine.accelerator.per_node
    ends = [_ranks(topology, stage.module, stage.pp) for stage in (link.source, link.target)]
    if link.edge is None:
        pairs = zip(*ends, strict=True)
        return all(source // per_node == target // per_node for source, target in pairs)
    return len({rank // per_node for ranks in ends for rank in ranks}) == 1


def _ranks(topology: Topology, module: str, pp: int) -> tuple[int, ...]:
    """Return the ranks of a module at a position along pp."""
    return _stage_ranks(topology.modules[module].grid)[pp]


@functools.lru_cache(maxsize=1 << 10)
def _stage_ranks(grid: Grid) -> tuple[tuple[int, ...], ...]:
    """Return the ranks at each position along pp."""
    return grid.ranks_along(tuple(axis.name for axis in grid.axes if axis.name != "pp"))
