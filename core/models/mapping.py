"""Mapping: how our tensors lie in the tensors of a checkpoint on disk.

A tensor counts as rows: the last dims make one row, the dims before count rows. Each of ours is a stack of row ranges
of tensors on disk. That covers all that families need: a concatenation (gate and up), an interleaving (query, key and
value by key-value group), a split (the same from one tensor, or an expert from a tensor of all), and a view (a
convolution's weight as a matrix).

>>> q, k, v = (Stored(f"{x}_proj.weight", (rows, 3)) for x, rows in (("q", 4), ("k", 2), ("v", 2)))
>>> fused = by_group((q, 0), (k, 0), (v, 0), groups=2, heads=2, width=1, columns=(3,))
>>> [f"{rows.tensor.name[0]}{rows.start}:{rows.stop}" for rows in fused.parts]
['q0:2', 'k0:1', 'v0:1', 'q2:4', 'k1:2', 'v1:2']
>>> fused.shape
(8, 3)

A rank reads only what it holds. Under tensor parallelism that is a range of rows, or of columns:

>>> [(piece.name, piece.bounds) for piece in slices(fused, shard_rows(8, rank=1, ranks=2))]
[('q_proj.weight', ((2, 4), (0, 3))), ('k_proj.weight', ((1, 2), (0, 3))), ('v_proj.weight', ((1, 2), (0, 3)))]

`inverse` says for each tensor on disk which rows of ours it is written from.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import attrs


Shape = tuple[int, ...]


@attrs.frozen
class Stored:
    """A tensor on disk, whole."""

    name: str
    shape: Shape


@attrs.frozen
class Rows:
    """Rows [start, stop) of a tensor on disk."""

    tensor: Stored
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many rows they are."""
        return self.stop - self.start


@attrs.frozen
class Zeros:
    """Rows that are on no disk: they are zero, they do not train, and they are not written."""

    count: int


@attrs.frozen
class Recipe:
    """One of our tensors, whole: its shape, and what its rows are, first to last."""

    shape: Shape
    parts: tuple[Rows | Zeros, ...]

    @property
    def columns(self) -> int:
        """Values in a row."""
        return math.prod(self.shape[1:])

    @property
    def tensors(self) -> frozenset[Stored]:
        """The tensors on disk that hold any of it."""
        return frozenset(part.tensor for part in self.parts if isinstance(part, Rows))

    @property
    def stored_values(self) -> int:
        """How many of its values are on disk."""
        return sum(part.count for part in self.parts if isinstance(part, Rows)) * self.columns


@attrs.frozen
class Slice:
    """A block of a tensor on disk and where it lies in a shard of ours.

    Attributes:
        name: of the tensor on disk.
        bounds: (start, stop) along every dim of it.
        rows: rows of the shard that the block fills, in all columns of the shard.
    """

    name: str
    bounds: tuple[tuple[int, int], ...]
    rows: range


@attrs.frozen
class ParameterRows:
    """Rows [start, stop) of one of our tensors, whole."""

    name: str
    start: int
    stop: int


# -- making recipes ----------------------------------------------------------------------------------------


def whole(tensor: Stored, shape: Shape | None = None) -> Recipe:
    """Return the recipe of a tensor that is one on disk, in a shape of as many rows where it is not the same."""
    return stacked([tensor], (shape or tensor.shape)[1:])


def stacked(tensors: Sequence[Stored], columns: Shape) -> Recipe:
    """Return the recipe of whole tensors, one after the other, whose rows have the shape `columns`."""
    values = math.prod(columns)
    parts = tuple(Rows(tensor, 0, math.prod(tensor.shape) // values) for tensor in tensors)
    return Recipe((sum(part.count for part in parts), *columns), parts)


def part_of(tensor: Stored, index: int, parts: int, columns: Shape) -> Recipe:
    """Return the recipe of one of several equal parts of a tensor, such as one expert of a tensor of all."""
    each = math.prod(tensor.shape) // math.prod(columns) // parts
    return Recipe((each, *columns), (Rows(tensor, index * each, (index + 1) * each),))


def by_group(
    query: tuple[Stored, int],
    key: tuple[Stored, int] | None,
    value: tuple[Stored, int],
    *,
    groups: int,
    heads: int,
    width: int,
    columns: Shape,
) -> Recipe:
    """Return the recipe of a fused qkv: for each key-value group its queries, its key, its value.

    Args:
        query: a tensor, and its first row that is of a query.
        key: the same of keys; None: there are none, and their rows are zeros.
        value: the same of values.
        groups: key-value heads.
        heads: query heads of a group.
        width: rows of a head.
        columns: shape of a row.
    """
    parts: list[Rows | Zeros] = []
    for group in range(groups):
        for source, count in ((query, heads * width), (key, width), (value, width)):
            first = source[1] + group * count if source else 0
            parts.append(Rows(source[0], first, first + count) if source else Zeros(count))
    return Recipe((groups * (heads + 2) * width, *columns), tuple(parts))


def padded(recipe: Recipe, rows: int) -> Recipe:
    """Return a recipe with so many rows of zeros behind it, such as those of a padded vocabulary."""
    if not rows:
        return recipe
    return Recipe((recipe.shape[0] + rows, *recipe.shape[1:]), (*recipe.parts, Zeros(rows)))


# -- reading -----------------------------------------------------------------------------------------------


def shard_rows(rows: int, *, rank: int, ranks: int, blocks: int = 1) -> tuple[range, ...]:
    """Return which rows a tp rank holds, where they lie in equal blocks that are each cut by themselves.

    >>> shard_rows(8, rank=1, ranks=2), shard_rows(8, rank=1, ranks=2, blocks=2)
    ((range(4, 8),), (range(2, 4), range(6, 8)))
    """
    block, each = rows // blocks, rows // blocks // ranks
    return tuple(range(b * block + rank * each, b * block + (rank + 1) * each) for b in range(blocks))


def slices(
    recipe: Recipe, rows: Sequence[range] | None = None, columns: range | None = None
) -> tuple[Slice, ...]:
    """Return what to read for a shard; what is not read of it is zero.

    Args:
        recipe: of the whole tensor.
        rows: ranges of rows of the whole tensor that the shard has, one after the other; None: all.
        columns: of each row; None: all.

    Raises ValueError where columns are cut that are several dims on disk.
    """
    found: list[tuple[Rows, int]] = []
    at = 0
    for wanted in rows if rows is not None else (range(recipe.shape[0]),):
        for part, offset in _overlapping(recipe, wanted):
            if found and _goes_on(found[-1], part, at + offset):
                last, first = found.pop()
                found.append((Rows(part.tensor, last.start, part.stop), first))
            else:
                found.append((part, at + offset))
        at += len(wanted)
    return tuple(piece for part, offset in found for piece in _blocks(part, offset, recipe.columns, columns))


def _overlapping(recipe: Recipe, wanted: range) -> Iterator[tuple[Rows, int]]:
    """Yield the rows on disk of a range of ours, and where in the range they lie."""
    begin = 0
    for part in recipe.parts:
        start, stop = max(wanted.start, begin), min(wanted.stop, begin + part.count)
        if isinstance(part, Rows) and start < stop:
            first = part.start - begin
            yield Rows(part.tensor, first + start, first + stop), start - wanted.start
        begin += part.count


def _goes_on(found: tuple[Rows, int], part: Rows, at: int) -> bool:
    """Whether rows follow those found before, on disk and in the shard."""
    last, first = found
    return (last.tensor, last.stop, first + last.count) == (part.tensor, part.start, at)


def _blocks(part: Rows, at: int, values: int, columns: range | None) -> Iterator[Slice]:
    """Yield the blocks of a tensor on disk that some of its rows are."""
    shape = part.tensor.shape
    leading = _leading(shape, values)
    inner = tuple((0, size) for size in shape[leading:])
    if columns is not None:
        if len(inner) != 1:
            raise ValueError(
                f"{part.tensor.name} has rows of shape {shape[leading:]}; its columns cannot be cut"
            )
        inner = ((columns.start, columns.stop),)
    run = shape[leading - 1]  # rows up to the next step of an outer dim
    start = part.start
    while start < part.stop:
        stop = min(part.stop, (start // run + 1) * run)
        outer = _index(start // run, shape[: leading - 1])
        bounds = (*((i, i + 1) for i in outer), (start % run, start % run + stop - start), *inner)
        yield Slice(part.tensor.name, bounds, range(at + start - part.start, at + stop - part.start))
        start = stop


def _leading(shape: Shape, values: int) -> int:
    """Return how many dims of a tensor on disk count rows of so many values; all of them only for single values."""
    for leading in range(len(shape) - 1, 0, -1):
        if math.prod(shape[leading:]) == values:
            return leading
    if values == 1:
        return len(shape)
    raise ValueError(f"a tensor of shape {shape} has no rows of {values} values")


def _index(flat: int, sizes: Shape) -> Shape:
    index: list[int] = []
    for size in reversed(sizes):
        flat, place = divmod(flat, size)
        index.append(place)
    return tuple(reversed(index))


# -- writing -----------------------------------------------------------------------------------------------


def inverse(recipes: Mapping[str, Recipe]) -> dict[Stored, tuple[ParameterRows, ...]]:
    """Return for each tensor on disk the rows of ours that it is, first to last.

    Raises ValueError where a row on disk is in no recipe, or in two.
    """
    found: dict[Stored, list[tuple[int, ParameterRows]]] = {}
    values: dict[Stored, int] = {}
    for name, recipe in recipes.items():
        begins = itertools.accumulate((part.count for part in recipe.parts), initial=0)
        for begin, part in zip(begins, recipe.parts, strict=False):
            if isinstance(part, Rows):
                source = ParameterRows(name, begin, begin + part.count)
                found.setdefault(part.tensor, []).append((part.start, source))
                values[part.tensor] = recipe.columns
    for tensor, sources in found.items():
        sources.sort(key=lambda pair: pair[0])
        at = 0
        for start, source in sources:
            if start != at:
                raise ValueError(
                    f"row {min(start, at)} of {tensor.name} is in {'no' if start > at else 'two'} recipes"
                )
            at += source.stop - source.start
        if at * values[tensor] != math.prod(tensor.shape):
            raise ValueError(f"row {at} of {tensor.name} is in no recipe")
    return {tensor: tuple(source for _, source in sources) for tensor, sources in found.items()}
