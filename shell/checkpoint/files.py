"""Files of checkpoints: weights and optimizer state by layout-independent name, at full logical shape.

`shell.checkpoint.manifest` says what a folder holds. Tensors go through the planners of torch.distributed.checkpoint
(DCP). They check that what the ranks write covers every tensor exactly once, and find the files that hold what a rank
needs. So any layout reads what any other wrote, because a slice carries its place in the full tensor. The files have
the format of DCP's safetensors storage, and DCP's reader reads them. Nothing is pickled into a file.

Everything else that a run needs follows from the number of the step: samples, learning rate and random draws are
functions of it.
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
from mimogrid.shell.checkpoint.index import IndexedTensor, ShardPlace
from mimogrid.shell.checkpoint.manifest import PARTIAL, reading
from mimogrid.shell.device.values import DTYPE_NAMES, values_of
from mimogrid.shell.job import tensorfile
from mimogrid.shell.job.tensorfile import TensorEntry
from mimogrid.shell.runtime.tensor_slices import TensorSlice, TensorSlices


# -- writing -----------------------------------------------------------------------------------------------


def items_of(slices: TensorSlices) -> list[WriteItem]:
    """Return what a rank writes, one item per slice, in their order."""
    return [_write_item(name, i, part) for name, parts in slices.items() for i, part in enumerate(parts)]


def shard_name(rank: int, part: int = 0, parts: int = 1) -> str:
    """Return the name of a file that a rank of the job's group writes: `part` of so many `parts`."""
    return f"shard-{rank + 1:05}-model-{part + 1:05}-of-{parts:05}.safetensors"


def files_of(rank: int, items: Iterable[WriteItem]) -> dict[str, list[WriteItem]]:
    """Group what a rank writes by file. A name occurs once in a file, so the slices of a tensor go to several files."""
    of_part: dict[int, list[WriteItem]] = {}
    for item in items:
        of_part.setdefault(item.index.index or 0, []).append(item)
    return {shard_name(rank, part, len(of_part)): found for part, found in sorted(of_part.items())}


def index_of(plans: Sequence[list[WriteItem]]) -> dict[str, IndexedTensor]:
    """Return the index of what all ranks write; DCP's planner checks that nothing is missing and nothing overlaps."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    agreed, _ = planner.create_global_plan([SavePlan(items, planner_data={}) for items in plans])
    assert [len(items) for items in plans] == [len(plan.items) for plan in agreed], "a slice is written twice"
    full: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts: dict[str, list[ShardPlace]] = {}
    files = (file for rank, items in enumerate(plans) for file in files_of(rank, items).items())
    for file, item in ((file, item) for file, items in files for item in items):
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        full[name] = DTYPE_NAMES[data.properties.dtype], tuple(data.size)
        place = ShardPlace(file, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        parts.setdefault(name, []).append(place)
    return {name: IndexedTensor(*full[name], tuple(places)) for name, places in parts.items()}


def write_shard(
    path: Path, items: Sequence[WriteItem], tensors: Mapping[MetadataIndex, torch.Tensor]
) -> dict[str, Any]:
    """Write a file of a rank from host memory; return its ``bytes`` and ``sha256``. Raises OSError."""
    places = {
        item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets}
        for item in items
        if item.tensor_data
    }
    assert len(items) == len(places), "a name occurs twice in a file"
    metadata = {tensorfile.SHARDING: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    entries = (entry_of(item.index.fqn, tensors[item.index]) for item in items)
    return tensorfile.write(path, entries, metadata)


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write full tensors in host memory into a file of their own, completely or not at all. Raises OSError."""
    partial = path.with_name(path.name + PARTIAL)
    tensorfile.write(partial, (entry_of(name, tensor) for name, tensor in tensors.items()), {})
    partial.replace(path)


def entry_of(name: str, tensor: torch.Tensor) -> TensorEntry:
    """Return a tensor in host memory as an entry to write."""
    return TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda: values_of(tensor))


def _write_item(name: str, index: int, part: TensorSlice) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, torch.Size(part.offsets), index),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(part),
            properties=TensorProperties(dtype=part.tensor.dtype),
            size=torch.Size(part.full_shape),
        ),
    )


def _chunk(part: TensorSlice) -> ChunkStorageMetadata:
    """Return the place of a slice, in the terms of torch.distributed.checkpoint."""
    return ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.size())


# -- reading -----------------------------------------------------------------------------------------------


def load(checkpoint: Path, slices: TensorSlices, group: dist.ProcessGroup) -> None:
    """Fill every slice from a checkpoint that any layout may have written. All ranks of `group` call it.

    Raises PlanError where the checkpoint lacks a tensor or has one of another shape.
    """
    with reading(checkpoint), _failures_as_errors(checkpoint):
        dcp.load(
            {name: parts[0].tensor for name, parts in slices.items()},
            storage_reader=HuggingFaceStorageReader(str(checkpoint)),
            planner=_Loading(slices),
            process_group=group,
        )


@contextlib.contextmanager
def _failures_as_errors(checkpoint: Path) -> Iterator[None]:
    """Turn a failure on any rank into our error. torch's own is no Exception, so it would end the process."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, PlanError):
            raise cause from None
        raise WorldError(f"checkpoint '{checkpoint.name}' failed on rank {rank}: {cause}") from error


class _Loading(DefaultLoadPlanner):
    """Plans which parts of a checkpoint fill which slices of this rank."""

    def __init__(self, slices: TensorSlices) -> None:
        super().__init__()
        self._slices = slices

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        written = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for name, parts in self._slices.items():
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
        whole = self._slices[index.fqn][index.index or 0].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole
