"""The index of a checkpoint: its tensors, and which file has which part of each.

A checkpoint may have been made to mislead. So no index may name a file outside of its folder, no header may describe
bytes outside of its file, and both must say the same of every part. Parts tile their tensors. Nothing here needs torch.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.tiling import tiling_fault
from mimogrid.core.update.contents import Described, Tensors, is_count
from mimogrid.shell.checkpoint.jsonfile import OTHER, canonical, read_object
from mimogrid.shell.job.tensorfile import WIDTHS, StoredTensor, header_of, size_of


INDEX = "index.json"


@attrs.frozen
class ShardPlace:
    """A part of a tensor: its file, where it begins in the full tensor, and its shape."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@attrs.frozen
class IndexedTensor:
    """A tensor in the index of a checkpoint: its full shape, and the places of its parts."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[ShardPlace, ...]

    @property
    def bytes(self) -> int:
        """The size of the full tensor."""
        return size_of(self.dtype, self.shape)


def read_index(checkpoint: Path) -> dict[str, IndexedTensor]:
    """Return the tensors of a checkpoint by name. Raises PlanError."""
    try:
        return {name: _tensor(facts) for name, facts in read_object(checkpoint / INDEX).items()}
    except (KeyError, TypeError, ValueError) as error:
        message = f"'{INDEX}' does not say what is in the files: {error!r}."
        raise PlanError([Problem(str(checkpoint), message, OTHER)]) from None


def index_text(tensors: Mapping[str, IndexedTensor]) -> str:
    """Return the text of an index, as `read_index` reads it."""
    return canonical({name: attrs.asdict(stored) for name, stored in tensors.items()})


def described(index: Mapping[str, IndexedTensor]) -> Tensors:
    """Return dtype and shape of each tensor of an index."""
    return {name: Described(frozenset({stored.dtype}), stored.shape) for name, stored in index.items()}


def _tensor(facts: Mapping[str, Any]) -> IndexedTensor:
    if facts["dtype"] not in WIDTHS:
        raise ValueError(f"{facts['dtype']!r} is no dtype")
    parts = (ShardPlace(str(p["file"]), _counts(p["offsets"]), _counts(p["shape"])) for p in facts["parts"])
    return IndexedTensor(facts["dtype"], _counts(facts["shape"]), tuple(parts))


def _counts(values: Iterable[object]) -> tuple[int, ...]:
    found = tuple(value for value in values if isinstance(value, int) and is_count(value))
    if len(found) != len(tuple(values)):
        raise ValueError(f"{values!r} are no counts")
    return found


# -- checking ----------------------------------------------------------------------------------------------


def contradictions(
    checkpoint: Path, files: Iterable[str], index: Mapping[str, IndexedTensor]
) -> Iterator[str]:
    """Yield where an index and the headers of the files contradict each other; only the first fault of each file."""
    headers: dict[str, Mapping[str, StoredTensor]] = {}
    for name in files:
        if name.endswith(".safetensors"):
            try:
                headers[name] = header_of(checkpoint / name)
            except ValueError as error:
                yield f"'{name}' {error}."
                return
    wrong: dict[str, str] = {}
    for tensor, stored in index.items():
        for place in stored.parts:
            if place.file not in headers:
                message = f"names '{place.file}' for '{tensor}', which is no tensor file of this checkpoint."
                wrong.setdefault(INDEX, f"'{INDEX}' {message}")
            elif (fault := _contradiction(tensor, stored, place, headers[place.file])) is not None:
                wrong.setdefault(place.file, f"'{place.file}' {fault}")
        if fault := tiling_fault(stored.shape, [(place.offsets, place.shape) for place in stored.parts]):
            wrong.setdefault(INDEX, f"'{INDEX}' {fault}: '{tensor}'.")
    indexed = {(place.file, name) for name, stored in index.items() for place in stored.parts}
    for file, name in sorted({(file, name) for file, names in headers.items() for name in names} - indexed):
        wrong.setdefault(file, f"'{file}' has '{name}', and '{INDEX}' does not say it has.")
    yield from wrong.values()


def _contradiction(
    tensor: str, stored: IndexedTensor, place: ShardPlace, header: Mapping[str, StoredTensor]
) -> str | None:
    """Return how the header of a file contradicts the index about a part of a tensor, if it does."""
    found = header.get(tensor)
    if found is None:
        return f"has no '{tensor}', and '{INDEX}' says it has."
    if (found.dtype, found.shape) != (stored.dtype, place.shape):
        indexed = f"{stored.dtype} {list(place.shape)}"
        return f"has {found.dtype} {list(found.shape)} for '{tensor}', '{INDEX}' says {indexed}."
    if found.offsets != place.offsets:
        at = f"at {list(found.offsets)}, '{INDEX}' says at {list(place.offsets)}"
        return f"has a part of '{tensor}' {at}."
    return None
