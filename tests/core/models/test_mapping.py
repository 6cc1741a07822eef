"""Recipes on lists of lists: what is read for a shard is the shard, and what is written is what was read."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.models.mapping import (
    Recipe,
    Rows,
    Shape,
    Slice,
    Stored,
    Zeros,
    by_group,
    inverse,
    padded,
    part_of,
    shard_rows,
    slices,
    stacked,
    whole,
)


Matrix = list[list[tuple[str, int] | int]]


def value_rows(tensor: Stored, columns: int) -> Matrix:
    """A tensor on disk as rows of that many values, each its name and its place."""
    values = [(tensor.name, i) for i in range(math.prod(tensor.shape))]
    return [values[i : i + columns] for i in range(0, len(values), columns)]


def matrix_of(recipe: Recipe) -> Matrix:
    """One of our tensors as rows, by the meaning of its recipe."""
    rows: Matrix = []
    for part in recipe.parts:
        if isinstance(part, Zeros):
            rows += [[0] * recipe.columns for _ in range(part.count)]
        else:
            rows += value_rows(part.tensor, recipe.columns)[part.start : part.stop]
    return rows


def block(piece: Slice, shape: Shape) -> list[tuple[str, int]]:
    """The values of a block of a tensor on disk, in order."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    places = itertools.product(*(range(start, stop) for start, stop in piece.bounds))
    return [(piece.name, sum(i * s for i, s in zip(place, strides, strict=True))) for place in places]


def read(recipe: Recipe, rows: Sequence[range] | None = None, columns: range | None = None) -> Matrix:
    """A shard, read slice by slice into zeros."""
    height = recipe.shape[0] if rows is None else sum(map(len, rows))
    width = recipe.columns if columns is None else len(columns)
    shard: Matrix = [[0] * width for _ in range(height)]
    shapes = {tensor.name: tensor.shape for tensor in recipe.tensors}
    for piece in slices(recipe, rows, columns):
        values = block(piece, shapes[piece.name])
        for row in piece.rows:
            shard[row], values = list(values[:width]), values[width:]
        assert not values
    return shard


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of every kind that families make."""
    columns = draw(st.sampled_from([(), (3,), (2, 2), (1, 3)]))
    groups, heads, width = (draw(st.integers(1, 3)) for _ in range(3))
    sizes = (groups * heads * width, groups * width, groups * width)
    kind = draw(st.sampled_from(["whole", "stacked", "part", "fused qkv", "three", "no key"]))
    if kind == "whole":
        tensor = Stored("w", (draw(st.integers(1, 6)), *columns))
        recipe = whole(tensor, (tensor.shape[0], math.prod(columns)) if columns else None)
    elif kind == "stacked":
        recipe = stacked([Stored(name, (draw(st.integers(1, 4)), *columns)) for name in "ab"], columns)
    elif kind == "part":
        experts = draw(st.integers(1, 4))
        all_of_them = Stored("e", (experts, draw(st.integers(1, 3)), *columns))
        recipe = part_of(all_of_them, draw(st.integers(0, experts - 1)), experts, columns)
    elif kind == "fused qkv":
        tensor = Stored("qkv", (sum(sizes), *columns))
        starts = (0, sizes[0], sizes[0] + sizes[1])
        query, key, value = ((tensor, start) for start in starts)
        recipe = by_group(query, key, value, groups=groups, heads=heads, width=width, columns=columns)
    else:
        query, key, value = ((Stored(n, (rows, *columns)), 0) for n, rows in zip("qkv", sizes, strict=True))
        key_or_none = None if kind == "no key" else key
        recipe = by_group(query, key_or_none, value, groups=groups, heads=heads, width=width, columns=columns)
    return padded(recipe, draw(st.integers(0, 2)))


@given(recipes())
def test_reading_all(recipe: Recipe) -> None:
    """A tensor that is read slice by slice is what its recipe says."""
    assert matrix_of(recipe) == read(recipe)
    assert recipe.stored_values == sum(value != 0 for row in read(recipe) for value in row)


@given(recipes(), st.data())
def test_reading_rows(recipe: Recipe, data: st.DataObject) -> None:
    """Any ranges of rows are read as cut from the whole tensor."""
    limits = st.tuples(*[st.integers(0, recipe.shape[0])] * 2).map(sorted)
    ranges = [range(*pair) for pair in data.draw(st.lists(limits, max_size=3))]
    full = matrix_of(recipe)
    assert [full[i] for rows in ranges for i in rows] == read(recipe, ranges)


@given(recipes().filter(lambda recipe: len(recipe.shape) == 2), st.data())
def test_reading_columns(recipe: Recipe, data: st.DataObject) -> None:
    """Columns are cut from every row, or refused where they are several dims on disk."""
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, recipe.columns)] * 2)))
    if any(tensor.shape[-1] != recipe.columns for tensor in recipe.tensors):
        with pytest.raises(ValueError, match="its columns cannot be cut"):
            slices(recipe, columns=range(start, stop))
        return
    assert [row[start:stop] for row in matrix_of(recipe)] == read(recipe, columns=range(start, stop))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_shards_are_the_tensor(ranks: int, blocks: int, each: int) -> None:
    """The rows of all tp ranks are every row once; within a block they are in the order of the ranks."""
    rows = ranks * blocks * each
    shards = [shard_rows(rows, rank=rank, ranks=ranks, blocks=blocks) for rank in range(ranks)]
    in_order = [i for block in zip(*shards, strict=True) for part in block for i in part]
    assert list(range(rows)) == in_order


def test_neighbouring_rows_are_one_slice() -> None:
    """Rows that follow each other on disk are read at once, also through several groups."""
    tensor = Stored("w", (6, 2))
    recipe = Recipe((6, 2), (Rows(tensor, 0, 2), Rows(tensor, 2, 4), Rows(tensor, 4, 6)))
    assert (Slice("w", ((1, 5), (0, 2)), range(4)),) == slices(recipe, [range(1, 3), range(3, 5)])


def test_an_expert_of_all() -> None:
    """Rows of an expert are read within its own part of the tensor of all."""
    recipe = part_of(Stored("up", (3, 4, 2)), 1, 3, (2,))
    assert (Slice("up", ((1, 2), (2, 4), (0, 2)), range(2)),) == slices(recipe, [range(2, 4)])


@given(st.lists(recipes(), min_size=1, max_size=3))
def test_writing_is_the_inverse(several: list[Recipe]) -> None:
    """Tensors on disk that are written from ours are those that ours were read from."""
    parts = {
        f"{i}": Recipe(recipe.shape, tuple(_renamed(part, i) for part in recipe.parts))
        for i, recipe in enumerate(several)
    }
    incomplete = [recipe for recipe in parts.values() if _rows_of_disk(recipe) > _rows_of_parts(recipe)]
    if incomplete:  # one expert of several
        with pytest.raises(ValueError, match="in no recipe"):
            inverse(parts)
        return
    ours = {name: read(recipe) for name, recipe in parts.items()}
    for tensor, sources in inverse(parts).items():
        columns = parts[sources[0].name].columns
        written = [row for source in sources for row in ours[source.name][source.start : source.stop]]
        assert value_rows(tensor, columns) == written


def _renamed(part: Rows | Zeros, number: int) -> Rows | Zeros:
    if isinstance(part, Zeros):
        return part
    return Rows(Stored(f"{part.tensor.name}{number}", part.tensor.shape), part.start, part.stop)


def _rows_of_disk(recipe: Recipe) -> int:
    return sum(math.prod(tensor.shape) // recipe.columns for tensor in recipe.tensors)


def _rows_of_parts(recipe: Recipe) -> int:
    return sum(part.count for part in recipe.parts if isinstance(part, Rows))


def test_rows_in_two_recipes() -> None:
    """A row on disk that is in two recipes is an error, and so is one that is in none."""
    tensor = Stored("w", (4, 2))
    first, second = (Recipe((2, 2), (Rows(tensor, start, start + 2),)) for start in (0, 1))
    with pytest.raises(ValueError, match="row 1 of w is in two recipes"):
        inverse({"a": first, "b": second})
    with pytest.raises(ValueError, match="row 2 of w is in no recipe"):
        inverse({"a": first})
    with pytest.raises(ValueError, match="row 0 of w is in no recipe"):
        inverse({"b": second})
