"""Manifests: which checkpoints a run has, what each contains, and whether it is whole.

    checkpoints/step-00000100/
        manifest.json         step, job, layout, versions, machine, and size and checksum of every other file
        index.json            every tensor: its dtype, its full shape, and the file of each part
        shard-*.safetensors   the slices that one rank writes

A checkpoint is written as ``step-00000100.partial`` and renamed when it is complete, with its manifest. So a checkpoint
of that name with a file missing, or with one too many, was damaged later. It is refused, and the file is named. Nothing
here needs torch.
"""

import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.checkpoint.tensorfile import StoredTensor, checksum, header_of, size_of, write_text


OPTIMIZER = "optimizer."
"""The prefix of the names of optimizer state; names of weights begin with their module."""
VERSION = 1
CHECKPOINTS = "checkpoints"
"""Their folder, in the folder of a run."""
MANIFEST, INDEX, PARTIAL = "manifest.json", "index.json", ".partial"
_NAME = re.compile(r"step-\d{8,}")


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after which `step` is the next."""
    return checkpoints / f"step-{step:08}"


def published(checkpoints: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whole or not."""
    found = (path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def located(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; of a folder that is a checkpoint, itself. Raises PlanError."""
    if _NAME.fullmatch(folder.name) or (folder / MANIFEST).exists():
        return [folder]
    found = published(folder / CHECKPOINTS) or published(folder)
    if not found:
        message = "holds no checkpoint." if folder.is_dir() else "is not a folder."
        raise PlanError([Problem(str(folder), message, "Name the folder of a run, or of a checkpoint.")])
    return found


def newest_of(folder: Path) -> Path:
    """Return the newest checkpoint of a run, or the checkpoint that `folder` is. Raises PlanError if it is damaged."""
    return _whole(located(folder))


def step_of(checkpoint: Path) -> int:
    """Return the step that is next after a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


# -- reading -----------------------------------------------------------------------------------------------


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint. Raises PlanError where it cannot be used."""
    manifest = _read(checkpoint / MANIFEST)
    version = manifest.get("version")
    if version != VERSION:
        message = f"'{MANIFEST}' is of version {version!r}; this mimogrid reads {VERSION}."
        remedy = "Use the version of mimogrid that wrote it."
        raise PlanError([Problem(str(checkpoint), message, remedy)])
    lacking = [key for key, is_valid in _NEEDED.items() if not is_valid(manifest.get(key))]
    if lacking:
        raise PlanError([Problem(str(checkpoint), f"'{MANIFEST}' lacks {', '.join(lacking)}.", _OTHER)])
    return manifest


def _is_list_of_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        Path(name).name == name and isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys()
        for name, facts in value.items()
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


_NEEDED: Mapping[str, Callable[[object], bool]] = {
    "step": _is_count,
    "steps_taken": _is_count,
    "watch": lambda value: isinstance(value, dict),
    "job": lambda value: isinstance(value, str),
    "files": _is_list_of_files,
}
"""The keys that a manifest must have, each with a check of its value."""


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
        return {
            name: IndexedTensor(
                facts["dtype"],
                tuple(facts["shape"]),
                tuple(ShardPlace(p["file"], tuple(p["offsets"]), tuple(p["shape"])) for p in facts["parts"]),
            )
            for name, facts in _read(checkpoint / INDEX).items()
        }
    except (KeyError, TypeError) as error:
        message = f"'{INDEX}' does not say what is in the files: {error!r}."
        raise PlanError([Problem(str(checkpoint), message, _OTHER)]) from None


def index_text(tensors: Mapping[str, IndexedTensor]) -> str:
    """Return the text of an index, as `read_index` reads it."""
    return canonical({name: attrs.asdict(stored) for name, stored in tensors.items()})


def canonical(value: Mapping[str, object]) -> str:
    """Write a JSON object so that equal values give equal bytes: keys in order, a line for each."""
    lines = (f"{json.dumps(key)}: {json.dumps(value[key], sort_keys=True)}" for key in sorted(value))
    return "{\n" + ",\n".join(lines) + "\n}\n"


_OTHER = "Take another checkpoint."


def _read(path: Path) -> dict[str, Any]:
    def refused(message: str) -> PlanError:
        return PlanError([Problem(str(path.parent), f"'{path.name}' {message}.", _OTHER)])

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refused("is missing") from None
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise refused(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise refused("is no JSON object")
    return value


# -- checking ----------------------------------------------------------------------------------------------


def newest(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None. Raises PlanError if it is damaged."""
    found = published(checkpoints)
    return _whole(found) if found else None


def _whole(found: list[Path]) -> Path:
    """Return the last checkpoint of a list. Raises PlanError if it is damaged, and names the newest whole one."""
    faults: dict[Path, tuple[str, ...]] = {}
    for checkpoint in reversed(found):
        faults[checkpoint] = tuple(damage(checkpoint))
        if not faults[checkpoint]:
            break
    if faults[found[-1]]:
        raise PlanError(
            Problem(str(found[-1]), f"{found[-1].name}: {fault}", remedy_for(faults))
            for fault in faults[found[-1]]
        )
    return found[-1]


def remedy_for(faults: Mapping[Path, tuple[str, ...]]) -> str:
    """Say how to continue from the newest whole checkpoint, given what is wrong with each."""
    newest_first = sorted(faults, key=step_of, reverse=True)
    whole = next((checkpoint for checkpoint in newest_first if not faults[checkpoint]), None)
    if whole is None:
        return "No checkpoint here is whole: begin a new run."
    if whole is newest_first[0]:
        return f"The newest, {whole.name}, is whole: runs continue from it."
    damaged = newest_first[: newest_first.index(whole)]
    move = shlex.join(["mv", *map(str, reversed(damaged)), str(whole.parent.parent)])
    return f"The newest whole one is {whole.name}. To continue from it, move the damaged ones away: {move}"


def damage(checkpoint: Path) -> Iterator[str]:
    """Yield what is wrong with a checkpoint: with its files by its manifest, else with what they say."""
    if _is_link(checkpoint):
        yield "is a link to another place."
        return
    if not checkpoint.is_dir():
        yield "is not a folder."
        return
    if _is_link(checkpoint / MANIFEST):
        yield f"'{MANIFEST}' is a link to another place."
        return
    try:
        files = read_manifest(checkpoint)["files"]
    except PlanError as error:
        yield from (problem.message for problem in error.problems)
        return
    found = [fault for name, facts in files.items() for fault in _damage_of(checkpoint / name, facts)]
    more = sorted(path.name for path in checkpoint.iterdir() if path.name not in {MANIFEST, *files})
    found += [f"'{name}' is not of this checkpoint: its manifest does not name it." for name in more]
    yield from found or _inconsistencies(checkpoint, files)


def _inconsistencies(checkpoint: Path, files: Iterable[str]) -> Iterator[str]:
    """Yield where files with the right checksums contradict each other; only the first fault of each file.

    A checkpoint may have been made to mislead. So no index may name a file outside of its folder, and no header may
    describe bytes outside of its file.
    """
    try:
        index = read_index(checkpoint)
    except PlanError as error:
        yield from (problem.message for problem in error.problems)
        return
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
        if sum(math.prod(place.shape) for place in stored.parts) != math.prod(stored.shape):
            message = f"has parts of '{tensor}' that do not make {list(stored.shape)} together."
            wrong.setdefault(INDEX, f"'{INDEX}' {message}")
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
    ends = (offset + n for offset, n in zip(place.offsets, place.shape, strict=True))
    if (
        any(end > full for end, full in zip(ends, stored.shape, strict=True))
        or min(place.offsets, default=0) < 0
    ):
        return f"has a part of '{tensor}' at {list(place.offsets)}, outside of {list(stored.shape)}."
    return None


def _damage_of(path: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield how a file differs from its size and checksum in the manifest."""
    if _is_link(path):
        yield f"'{path.name}' is a link to another place."
    elif not path.is_file():
        yield f"'{path.name}' is missing."
    elif path.stat().st_size != facts["bytes"]:
        yield f"'{path.name}' has {path.stat().st_size} bytes; {facts['bytes']} were written."
    elif checksum(path) != facts["sha256"]:
        yield f"'{path.name}' has changed since it was written: its checksum differs."


def _is_link(path: Path) -> bool:
    return path.resolve() != path.parent.resolve() / path.name


# -- writing -----------------------------------------------------------------------------------------------


def publish(
    partial: Path, target: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the manifest and rename a complete checkpoint. Raises OSError, also if `target` exists."""
    manifest = {"version": VERSION, **facts, "files": files, "created": time.time()}
    write_text(partial / MANIFEST, canonical(manifest))
    _sync_names(partial)
    partial.rename(target)
    _sync_names(target.parent)


def prune(checkpoints: Path, *, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` and those of steps that `keep_every` divides.

    Each is renamed first, so that one whose removal is interrupted does not look damaged.
    """
    for old in published(checkpoints)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))


def clear(checkpoints: Path) -> None:
    """Remove what interrupted saves have left."""
    remove(checkpoints.glob(f"step-*{PARTIAL}"))


def remove(folders: Iterable[Path]) -> None:
    """Remove folders, and ignore what cannot be removed."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk (fsync of the folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
