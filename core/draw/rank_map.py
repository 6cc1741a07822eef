"""Rank map: the pipeline stage of each module that every rank hosts, as text; and runs of ranks in short.

    rank     | 0-1 2-3 4-5
    vision   |   0   ·   ·
    language |   ·   0   1

In a small world every rank has a column. In a large one neighbours that host the same stages share a column.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from mimogrid.core.topology.topology import Topology


MOST = 64
"""Ranks of a world in which every rank has a column."""
COLUMNS = 16
"""Columns in a line of the map."""
NO_STAGE = "·"

_Value = TypeVar("_Value")


def rank_map(topology: Topology) -> Iterator[str]:
    """Yield the lines of a map: a row per module, a column per rank or run of ranks."""
    hosted = [_hosted(topology, rank) for rank in range(topology.world_size)]
    runs = [range(rank, rank + 1) for rank in range(topology.world_size)]
    if topology.world_size > MOST:
        runs = [run for _, run in runs_by(topology.world_size, hosted.__getitem__)]
    heads = [short(run) for run in runs]
    wide = max(len(name) for name in (*topology.modules, "rank"))
    for start in range(0, len(runs), COLUMNS):
        chosen = range(start, min(start + COLUMNS, len(runs)))
        widths = {i: max(len(heads[i]), 2) for i in chosen}
        yield " ".join([f"{'rank':<{wide}} |", *(f"{heads[i]:>{widths[i]}}" for i in chosen)])
        for name in topology.modules:
            cells = (f"{hosted[runs[i][0]].get(name, NO_STAGE):>{widths[i]}}" for i in chosen)
            yield " ".join([f"{name:<{wide}} |", *cells])
        yield ""


def _hosted(topology: Topology, rank: int) -> Mapping[str, str]:
    """Return the pipeline stage that a rank hosts, by module."""
    return {info.stage.module: str(info.stage.pp) for info in topology.role(rank).stages}


def runs_by(count: int, value_of: Callable[[int], _Value]) -> Iterator[tuple[_Value, range]]:
    """Yield the runs of neighbouring ranks, of `count` ranks, that have one value, with that value.

    >>> list(runs_by(5, lambda rank: rank // 3))
    [(0, range(0, 3)), (1, range(3, 5))]
    """
    for value, ranks in itertools.groupby(range(count), key=value_of):
        run = list(ranks)
        yield value, range(run[0], run[-1] + 1)


def runs(ranks: Iterable[int]) -> Iterator[str]:
    """Yield ascending ranks in short, run by run.

    >>> list(runs([0, 1, 2, 4]))
    ['0-2', '4']
    """
    for _, run in itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        found = [rank for _, rank in run]
        yield short(range(found[0], found[-1] + 1))


def short(run: Sequence[int]) -> str:
    """Return a run of ranks in short.

    >>> short(range(3, 4)), short(range(6, 8))
    ('3', '6-7')
    """
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
