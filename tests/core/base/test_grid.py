"""Grids: which rank stands where, and who stands beside it along any axes."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.grid import Axis, Grid


NAMES = ("tp", "cp", "dp", "pp", "x")


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Grids of up to five axes in any order, at any offset."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, 5))]
    axes = tuple(Axis(name, draw(st.integers(1, 3))) for name in names)
    return Grid(axes, offset=draw(st.integers(0, 9)))


@given(grids())
def test_rank_and_position_are_inverse(grid: Grid) -> None:
    """Every rank has a position of its own, and is the rank at it; the axes say the same one by one."""
    assert list(range(grid.offset, grid.offset + grid.size)) == [
        grid.rank_at(**grid.position(rank)) for rank in grid.ranks
    ]
    for rank, axis in itertools.product(grid.ranks, grid.axes):
        assert grid.position(rank)[axis.name] == grid.position_along(axis.name, rank) < axis.size


@given(grids(), st.data())
def test_groups_partition_the_ranks(grid: Grid, data: st.DataObject) -> None:
    """The groups along any axes hold every rank once, and their members differ along these axes only."""
    names = [axis.name for axis in grid.axes]
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))
    groups = grid.ranks_along(sorted(chosen))
    assert sorted(grid.ranks) == sorted(rank for group in groups for rank in group)
    assert {math.prod(grid.extent(name) for name in chosen)} == {len(group) for group in groups}
    for group in groups:
        still = [tuple(v for k, v in grid.position(rank).items() if k not in chosen) for rank in group]
        assert 1 == len(set(still))
        assert all(group == grid.group_of(rank, sorted(chosen)) for rank in group)


@given(grids(), st.data())
def test_a_view_keeps_its_axis(grid: Grid, data: st.DataObject) -> None:
    """Wherever the kept axis stands in the order, a view numbers anew inside each of its positions only."""
    keep = data.draw(st.sampled_from([axis.name for axis in grid.axes]))
    inside = grid.size // grid.extent(keep)
    first = data.draw(st.sampled_from([d for d in range(1, inside + 1) if inside % d == 0]))
    view = grid.regrouped((Axis("a", first), Axis("b", inside // first)), keep=keep)
    assert sorted(grid.ranks) == sorted(view.ranks)
    for rank in grid.ranks:
        assert grid.position_along(keep, rank) == view.position_along(keep, rank)
        assert rank == view.rank_at(**view.position(rank))
    others = [axis.name for axis in grid.axes if axis.name != keep]
    if others:
        assert set(map(frozenset, grid.ranks_along(others))) == set(
            map(frozenset, view.ranks_along(("a", "b")))
        )


def test_a_view_with_pp_in_the_middle() -> None:
    """Experts over (tp, dp) with pp between them: the ranks of a stage are not neighbours."""
    grid = Grid((Axis("tp", 2), Axis("pp", 2), Axis("dp", 2)))
    view = grid.regrouped((Axis("ep", 4),), keep="pp")
    assert ((0, 1, 4, 5), (2, 3, 6, 7)) == view.ranks_along("ep")
    assert ((0, 2), (1, 3), (4, 6), (5, 7)) == view.ranks_along("pp")


def test_published_groups() -> None:
    """The groups of a (tp2, cp1, pp2, dp2) grid are those that Megatron-core's grid gives."""
    grid = Grid((Axis("tp", 2), Axis("cp", 1), Axis("pp", 2), Axis("dp", 2)))
    assert ((0, 1), (2, 3), (4, 5), (6, 7)) == grid.ranks_along("tp")
    assert ((0, 2), (1, 3), (4, 6), (5, 7)) == grid.ranks_along("pp")
    assert ((0, 4), (1, 5), (2, 6), (3, 7)) == grid.ranks_along("dp")
    assert ((0, 1, 2, 3), (4, 5, 6, 7)) == grid.ranks_along(("tp", "pp"))


def test_strangers_are_errors() -> None:
    """A rank outside the grid, an unknown axis and a view of another size are errors, not empty answers."""
    grid = Grid((Axis("tp", 2), Axis("dp", 2)), offset=4)
    for rank in (3, 8):
        with pytest.raises(ValueError, match=r"rank \d is not among 4..7"):
            grid.position(rank)
        with pytest.raises(ValueError, match=r"rank \d is not among 4..7"):
            grid.position_along("dp", rank)
    with pytest.raises(ValueError, match=r"axes \['pp'\] are not among"):
        grid.ranks_along("pp")
    with pytest.raises(ValueError, match=r"axes \['tqp'\] are not among \['dp', 'tp'\]"):
        grid.rank_at(tqp=1)
    with pytest.raises(ValueError, match="do not cover 2 ranks"):
        grid.regrouped((Axis("ep", 4),), keep="dp")
