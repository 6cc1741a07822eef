"""Grids: the block of ranks of a module under named axes, fastest axis first.

A grid of shape (tp=2, dp=3) at offset 4 holds the ranks 4..9; rank = offset + tp + 2*dp. A process group is a set of
ranks *along* some axes: they differ along these axes and have the same position on the others.

>>> grid = Grid((Axis("tp", 2), Axis("dp", 3)), offset=4)
>>> grid.ranks_along("tp")
((4, 5), (6, 7), (8, 9))
>>> grid.position(7)
{'tp': 1, 'dp': 1}
>>> grid.rank_at(tp=1, dp=1)
7

A *view* lays other axes over the same ranks. Experts need one: inside each pipeline stage the tp, cp and
dp ranks are renumbered as expert_tp, ep and expert_dp (the expert grid of Megatron-core).
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping

import attrs


@attrs.frozen
class Axis:
    """One named axis of a grid."""

    name: str
    size: int


@attrs.frozen(cache_hash=True)
class Grid:
    """A block of ranks under named axes; `axes[0]` varies fastest.

    In a view that renumbers the ranks, `places[i]` is the rank of flat index i. A plain grid has no `places`: its
    ranks count up from `offset`.
    """

    axes: tuple[Axis, ...]
    offset: int = 0
    places: tuple[int, ...] | None = None

    @functools.cached_property
    def size(self) -> int:
        """How many ranks the grid holds."""
        return math.prod(axis.size for axis in self.axes)

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks in order of flat index."""
        return self.places or tuple(range(self.offset, self.offset + self.size))

    def __contains__(self, rank: int) -> bool:
        return self.offset <= rank < self.offset + self.size

    def extent(self, axis: str) -> int:
        """Return the size of an axis; an axis that the grid lacks has size 1."""
        return self._strides[axis][1] if axis in self._strides else 1

    def rank_at(self, **position: int) -> int:
        """Return the rank at a position; axes that are not named count as 0. Raises ValueError for an unknown axis."""
        self._check(position)
        flat = sum(i * self._strides[axis][0] for axis, i in position.items())
        return self.places[flat] if self.places else self.offset + flat

    def position(self, rank: int) -> dict[str, int]:
        """Return the rank's position on every axis. Raises ValueError for a rank outside the grid."""
        flat = self._flat(rank)
        return {name: flat // stride % size for name, (stride, size) in self._strides.items()}

    def position_along(self, axis: str, rank: int) -> int:
        """Return the rank's position on one axis. Raises ValueError for a rank outside the grid."""
        stride, size = self._strides.get(axis, (1, 1))
        return self._flat(rank) // stride % size

    def _flat(self, rank: int) -> int:
        if rank not in self:
            raise ValueError(f"rank {rank} is not among {self.offset}..{self.offset + self.size - 1}")
        return self._inverse[rank] if self.places else rank - self.offset

    @functools.cached_property
    def _inverse(self) -> Mapping[int, int]:
        """The flat index of each rank of `places`."""
        return {rank: flat for flat, rank in enumerate(self.places or ())}

    def _check(self, axes: Iterable[str]) -> None:
        unknown = set(axes) - self._strides.keys()
        if unknown:
            raise ValueError(f"axes {sorted(unknown)} are not among {sorted(self._strides)}")

    @functools.cached_property
    def _strides(self) -> Mapping[str, tuple[int, int]]:
        """For each axis, the distance of neighbours in flat index, and the size."""
        strides = itertools.accumulate((axis.size for axis in self.axes), operator.mul, initial=1)
        return {axis.name: (stride, axis.size) for axis, stride in zip(self.axes, strides, strict=False)}

    def ranks_along(self, axes: str | Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Return every group of ranks that differ only along `axes`, groups and members in grid order.

        Equals Megatron-core's ``HyperCommGrid.get_rank_enum``. Raises ValueError for an unknown axis.
        """
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        self._check(names)
        moving = _offsets(self.axes, lambda axis: axis.name in names)
        still = _offsets(self.axes, lambda axis: axis.name not in names)
        ranks = self.ranks
        return tuple(tuple(ranks[base + step] for step in moving) for base in still)

    def group_of(self, rank: int, axes: str | Iterable[str]) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` only along `axes`."""
        return _groups(self, (axes,) if isinstance(axes, str) else tuple(axes))[rank]

    def regrouped(self, axes: tuple[Axis, ...], *, keep: str) -> "Grid":
        """Return a view that puts the ranks of each position along `keep` under new axes.

        The new axes come first, `keep` comes last. Raises ValueError unless the sizes agree.

        >>> base = Grid((Axis("tp", 2), Axis("dp", 2), Axis("pp", 2)))
        >>> base.regrouped((Axis("expert_tp", 1), Axis("ep", 4)), keep="pp").ranks_along("ep")
        ((0, 1, 2, 3), (4, 5, 6, 7))
        """
        stages = self.extent(keep)
        if math.prod(axis.size for axis in axes) * stages != self.size:
            raise ValueError(f"{axes} do not cover {self.size // stages} ranks")
        others = [axis.name for axis in self.axes if axis.name != keep]
        stage_ranks = self.ranks_along(others) if others else tuple((r,) for r in self.ranks)
        places = tuple(rank for ranks in stage_ranks for rank in ranks)
        return Grid((*axes, Axis(keep, stages)), offset=self.offset, places=places)


def _offsets(axes: tuple[Axis, ...], wanted: Callable[[Axis], bool]) -> tuple[int, ...]:
    """Return the flat-index offsets of all positions along the wanted axes, first axis fastest."""
    offsets, stride = [0], 1
    for axis in axes:
        if wanted(axis):
            offsets = [base + i * stride for i in range(axis.size) for base in offsets]
        stride *= axis.size
    return tuple(offsets)


@functools.lru_cache(maxsize=256)
def _groups(grid: Grid, axes: tuple[str, ...]) -> dict[int, tuple[int, ...]]:
    return {rank: group for group in grid.ranks_along(axes) for rank in group}
