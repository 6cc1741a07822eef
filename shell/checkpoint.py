"""Checkpoints: weights and optimizer state by layout-independent name, at full logical shape.

    checkpoints/step-00000100/
        manifest.json         step, job, versions, and the checksum of every other file; written last
        shard-*.safetensors   what each rank holds and no other writes

Tensors go through torch.distributed.checkpoint's planners and its safetensors storage, so that any layout reads
what any other wrote: a piece carries its place in the full tensor. Nothing is pickled into a file. A checkpoint
is written under another name and renamed when whole; whatever has no manifest never was one.

What else a run needs follows from the step's number: samples, learning rate and random draws are functions of it.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
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

from mimogrid.core.errors import PlanError, Problem, WorldError
from mimogrid.core.faults import PUBLISHED, PUBLISHING, SAVING, WRITING


MANIFEST = "manifest.json"
PARTIAL = ".partial"


@attrs.frozen(eq=False)
class Piece:
    """A rank's part of a full tensor, and where it begins in it."""

    tensor: torch.Tensor
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The part's place, in the terms of torch.distributed.checkpoint."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.size())


Pieces = Mapping[str, tuple[Piece, ...]]
"""Of each tensor the parts that a rank has. In a file a name comes once: who writes has one part of it."""


def save(
    folder: Path,
    pieces: Pieces,
    facts: Mapping[str, Any],
    group: dist.ProcessGroup,
    *,
    keep: int,
    at: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a checkpoint of the step that `facts` names, and let go of all but the newest `keep`.

    Every rank of `group` calls it with its own pieces; its first rank publishes. `at` hears of the moments.
    """
    at(SAVING)
    target = folder / f"step-{facts['step']:08}"
    partial = target.with_name(target.name + PARTIAL)
    first = group.rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    at(WRITING)
    dist.barrier(group)
    with _failures_as_errors(target):
        dcp.save(
            {name: piece.tensor for name, (piece,) in pieces.items()},
            storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
            planner=_Saving(pieces),
            process_group=group,
        )
    if first:
        at(PUBLISHING)
        _publish(partial, target, facts)
        at(PUBLISHED)
        for old in _published(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier(group)


def load(checkpoint: Path, pieces: Pieces, group: dist.ProcessGroup) -> None:
    """Fill every piece from a checkpoint, whatever layout wrote it."""
    with _failures_as_errors(checkpoint):
        dcp.load(
            {name: parts[0].tensor for name, parts in pieces.items()},
            storage_reader=HuggingFaceStorageReader(str(checkpoint)),
            planner=_Loading(pieces),
            process_group=group,
        )


@contextlib.contextmanager
def _failures_as_errors(checkpoint: Path) -> Iterator[None]:
    """Turn a failure on any rank into a WorldError; torch's own is no Exception, and would end the process."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise WorldError(f"checkpoint '{checkpoint.name}' failed on rank {rank}: {cause}") from error


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None. Raises PlanError for one that is damaged."""
    published = _published(folder)
    if not published:
        return None
    faults = list(damage(published[-1]))
    if faults:
        whole = next((c.name for c in reversed(published[:-1]) if not any(damage(c))), None)
        remedy = (
            f"Remove '{published[-1]}' to go on from {whole}."
            if whole
            else "No other checkpoint of this run is whole: begin a new run."
        )
        raise PlanError([Problem(str(published[-1]), fault, remedy) for fault in faults])
    return published[-1]


def damage(checkpoint: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a checkpoint, by its manifest."""
    for name, facts in read_manifest(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            yield f"'{name}' is missing."
        elif path.stat().st_size != facts["bytes"]:
            yield f"'{name}' has {path.stat().st_size} bytes; {facts['bytes']} were written."
        elif _checksum(path) != facts["sha256"]:
            yield f"'{name}' is not what was written: its checksum differs."


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself."""
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    return manifest


def _published(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step-*[0-9]/{MANIFEST}"))


def _publish(partial: Path, target: Path, facts: Mapping[str, Any]) -> None:
    for path in partial.glob("*.safetensors"):
        _settle_header(path)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _checksum(path)}
        for path in sorted(partial.iterdir())
    }
    manifest = {**facts, "files": files, "created": time.time()}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _settle_header(path: Path) -> None:
    """Sort the metadata of a file, which safetensors writes in random order: equal state is equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        settled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(settled) == size, f"the header of {path.name} changed its length"
        file.seek(8)
        file.write(settled)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Saving(DefaultSavePlanner):
    """Plans to write the pieces that are this rank's to write, each at its place in the full tensor."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self._pieces = pieces

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(name, piece) for name, (piece,) in self._pieces.items()]
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        (piece,) = self._pieces[write_item.index.fqn]
        return piece.tensor.contiguous()


def _write_item(name: str, piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, torch.Size(piece.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=piece.chunk,
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.full_shape),
        ),
    )


class _Loading(DefaultLoadPlanner):
    """Plans to fill this rank's pieces from whatever parts a checkpoint has."""

    def __init__(self, pieces: Pieces) -> None:
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
            items += create_read_items_for_chunk_list(name, stored, [part.chunk for part in parts])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        whole = self._pieces[index.fqn][index.index or 0].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole
