"""Checkpoints: weights and optimizer state by layout-independent name, at full logical shape.

What a folder holds is in `shell.checkpoint.manifest`. Tensors go through the planners of
torch.distributed.checkpoint: they check that what ranks write covers every tensor exactly once, and find for what a
rank needs the files that have it. So any layout reads what any other wrote: a piece carries its place in the full
tensor. Files are what DCP's safetensors storage writes, and it is what reads them. Nothing is pickled into a file.

What else a run needs follows from the step's number: samples, learning rate and random draws are functions of it.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.shell.checkpoint import tensorfile
from mimogrid.shell.checkpoint.manifest import Place, Stored
from mimogrid.shell.checkpoint.tensorfile import Entry
from mimogrid.shell.runtime.pieces import TensorPiece, TensorPieces


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""


# -- writing -----------------------------------------------------------------------------------------------


def items_of(pieces: TensorPieces) -> list[WriteItem]:
    """Return what a rank writes, each item at its place in the full tensor, in the order of the pieces."""
    return [
        _write_item(name, part, piece)
        for name, of_name in pieces.items()
        for part, piece in enumerate(of_name)
    ]


def shard_name(rank: int, part: int = 0, parts: int = 1) -> str:
    """Return the name of one of the files that a rank of the job's group writes."""
    return f"shard-{rank + 1:05}-model-{part + 1:05}-of-{parts:05}.safetensors"


def files_of(rank: int, items: Iterable[WriteItem]) -> dict[str, list[WriteItem]]:
    """Deal what a rank writes to files. In a file a name comes once, so what has several parts is in several."""
    of_part: dict[int, list[WriteItem]] = {}
    for item in items:
        of_part.setdefault(item.index.index or 0, []).append(item)
    return {shard_name(rank, part, len(of_part)): found for part, found in sorted(of_part.items())}


def index_of(plans: Sequence[list[WriteItem]]) -> dict[str, Stored]:
    """Return the index of what all ranks write together; DCP's planner checks that nothing lacks or overlaps."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    agreed, _ = planner.create_global_plan([SavePlan(items, planner_data={}) for items in plans])
    assert [len(items) for items in plans] == [len(plan.items) for plan in agreed], "written twice"
    full: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts: dict[str, list[Place]] = {}
    files = (file for rank, items in enumerate(plans) for file in files_of(rank, items).items())
    for file, item in ((file, item) for file, items in files for item in items):
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        full[name] = DTYPES[data.properties.dtype], tuple(data.size)
        place = Place(file, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        parts.setdefault(name, []).append(place)
    return {name: Stored(*full[name], tuple(places)) for name, places in parts.items()}


def write_shard(
    path: Path, items: Sequence[WriteItem], tensors: Mapping[MetadataIndex, torch.Tensor]
) -> dict[str, Any]:
    """Write a file of a rank's, from host memory; return its size and checksum. Raises OSError."""
    places = {
        item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets}
        for item in items
        if item.tensor_data
    }
    assert len(items) == len(places), "a name twice in a file"
    metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    entries = (entry_of(item.index.fqn, tensors[item.index]) for item in items)
    return tensorfile.write(path, entries, metadata)


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    """Return a tensor in host memory as it goes into a file."""
    return Entry(name, DTYPES[tensor.dtype], tuple(tensor.shape), lambda: values_of(tensor))


def values_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in host memory."""
    array: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_item(name: str, part: int, piece: TensorPiece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, torch.Size(piece.offsets), part),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(piece),
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.full_shape),
        ),
    )


def _chunk(piece: TensorPiece) -> ChunkStorageMetadata:
    """Return the place of a piece, in the terms of torch.distributed.checkpoint."""
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.size())


# -- reading -----------------------------------------------------------------------------------------------


def load(checkpoint: Path, pieces: TensorPieces, group: dist.ProcessGroup) -> None:
    """Fill every piece from a checkpoint, whatever layout wrote it; joint over `group`.

    Raises PlanError where it lacks a tensor, or has one of another shape.
    """
    with _failures_as_errors(checkpoint):
        dcp.load(
            {name: parts[0].tensor for name, parts in pieces.items()},
            storage_reader=HuggingFaceStorageReader(str(checkpoint)),
            planner=_Loading(pieces),
            process_group=group,
        )


@contextlib.contextmanager
def _failures_as_errors(checkpoint: Path) -> Iterator[None]:
    """Turn a failure on any rank into an error of ours; torch's own is no Exception, and would end the process."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, PlanError):
            raise cause from None
        raise WorldError(f"checkpoint '{checkpoint.name}' failed on rank {rank}: {cause}") from error


class _Loading(DefaultLoadPlanner):
    """Plans to fill this rank's pieces from whatever parts a checkpoint has."""

    def __init__(self, pieces: TensorPieces) -> None:
        super().__init__()
        self._pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        written = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for name, parts in self._pieces.items():
            stored, needed = written.get(name), parts[0].full_shape
            if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != needed:
                shape = list(stored.size) if isinstance(stored, TensorStorageMetadata) else "nothing"
                message = f"has {shape} for '{name}', the job needs {list(needed)}."
                remedy = "Load it into the model that wrote it, with the optimizer that wrote it."
                raise PlanError([Problem("checkpoint", message, remedy)])
            items += create_read_items_for_chunk_list(name, stored, [_chunk(part) for part in parts])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        whole = self._pieces[index.fqn][index.index or 0].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole
