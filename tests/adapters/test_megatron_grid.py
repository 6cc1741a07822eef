"""Our grid against Megatron-core's, on which frameworks that call both rely."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.hyper_comm_grid import HyperCommGrid

from mimogrid.core.base.grid import Axis, Grid


NAMES = ("tp", "cp", "dp", "pp", "ep")


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """Give Megatron's grid a world to fit in, without a process group."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4096"}):
        yield


@given(
    st.permutations(NAMES), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 9), st.data()
)
def test_groups_equal_megatrons(names: list[str], sizes: list[int], offset: int, data: st.DataObject) -> None:
    """For any shape, order of axes, offset and axes asked for, in any order, the groups and their members agree."""
    axes = tuple(Axis(name, size) for name, size in zip(names, sizes, strict=False))
    known = [axis.name for axis in axes]
    theirs = HyperCommGrid(shape=[axis.size for axis in axes], dim_names=known, rank_offset=offset)
    asked = data.draw(st.permutations(known))[: data.draw(st.integers(1, len(known)))]
    expected = tuple(tuple(group) for group in theirs.get_rank_enum(asked))
    assert expected == Grid(axes, offset=offset).ranks_along(asked)
    assert expected == Grid(axes, offset=offset).ranks_along(list(reversed(asked)))


def test_a_name_alone_is_one_axis() -> None:
    """One axis may be asked for by its bare name, as there."""
    theirs = HyperCommGrid(shape=[2, 3], dim_names=["tp", "dp"])
    expected = tuple(tuple(group) for group in theirs.get_rank_enum("dp"))
    assert expected == Grid((Axis("tp", 2), Axis("dp", 3))).ranks_along("dp")
