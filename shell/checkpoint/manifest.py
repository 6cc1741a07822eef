"""Manifests: which checkpoints a run has, what each says of itself, and whether it is whole.

    checkpoints/step-00000100/
        manifest.json         step, job, layout, cursor, versions, and size and checksum of every other file
        index.json            every tensor: its dtype, its full shape, and which file has which part
        shard-*.safetensors   what each rank holds and no other writes

A checkpoint is written as ``step-00000100.partial`` and gets its name when it is whole, manifest and all. So whatever
has such a name and lacks a file, or has one too many, was damaged later: it is refused, by the name of the file.
Nothing here needs torch.
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
from mimogrid.shell.checkpoint.tensorfile import Found, checksum, header_of, size_of, write_text


OPTIMIZER = "optimizer."
"""Begins the names of what the optimizer keeps; those of weights begin with their module."""
VERSION = 1
CHECKPOINTS = "checkpoints"
"""Where they lie in the folder of a run."""
MANIFEST, INDEX, PARTIAL = "manifest.json", "index.json", ".partial"
_NAME = re.compile(r"step-\d{8,}")


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint is from which a step is the next."""
    return checkpoints / f"step-{step:08}"


def published(checkpoints: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whole or not."""
    found = (path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def located(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, or the one that a folder is. Raises PlanError for none."""
    if _NAME.fullmatch(folder.name) or (folder / MANIFEST).exists():
        return [folder]
    found = published(folder / CHECKPOINTS) or published(folder)
    if not found:
        message = "holds no checkpoint." if folder.is_dir() else "is no folder."
        raise PlanError([Problem(str(folder), message, "Name the folder of a run, or of a checkpoint.")])
    return found


def newest_of(folder: Path) -> Path:
    """Return the newest checkpoint of a run, or the one that a folder is. Raises PlanError where it is damaged."""
    return _whole(located(folder))


def step_of(checkpoint: Path) -> int:
    """Return the step that is the next after a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


# -- reading -----------------------------------------------------------------------------------------------


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself. Raises PlanError."""
    manifest = _read(checkpoint / MANIFEST)
    version = manifest.get("version")
    if version != VERSION:
        message = f"'{MANIFEST}' is of version {version!r}; this mimogrid reads {VERSION}."
        remedy = "Use the mimogrid that wrote it."
        raise PlanError([Problem(str(checkpoint), message, remedy)])
    lacking = [key for key, is_right in _NEEDED.items() if not is_right(manifest.get(key))]
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
"""What a manifest must say, and what that looks like."""


@attrs.frozen
class Place:
    """A part of a tensor: which file has it, where it begins in the full one, and its shape."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@attrs.frozen
class Stored:
    """A tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Place, ...]

    @property
    def bytes(self) -> int:
        """Of the full tensor."""
        return size_of(self.dtype, self.shape)


def read_index(checkpoint: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by name. Raises PlanError."""
    try:
        return {
            name: Stored(
                facts["dtype"],
                tuple(facts["shape"]),
                tuple(Place(p["file"], tuple(p["offsets"]), tuple(p["shape"])) for p in facts["parts"]),
            )
            for name, facts in _read(checkpoint / INDEX).items()
        }
    except (KeyError, TypeError) as error:
        message = f"'{INDEX}' does not say what is in the files: {error!r}."
        raise PlanError([Problem(str(checkpoint), message, _OTHER)]) from None


def index_text(tensors: Mapping[str, Stored]) -> str:
    """Write an index as `read_index` reads it."""
    return canonical({name: attrs.asdict(stored) for name, stored in tensors.items()})


def canonical(value: Mapping[str, object]) -> str:
    """Write a JSON object such that equal values are equal bytes: keys in order, a line for each."""
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


# -- judging -----------------------------------------------------------------------------------------------


def newest(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None. Raises PlanError for one that is damaged."""
    found = published(checkpoints)
    return _whole(found) if found else None


def _whole(found: list[Path]) -> Path:
    """Return the last of some checkpoints. Raises PlanError where it is damaged; the newest whole one is offered."""
    faults: dict[Path, tuple[str, ...]] = {}
    for checkpoint in reversed(found):
        faults[checkpoint] = tuple(damage(checkpoint))
        if not faults[checkpoint]:
            break
    if faults[found[-1]]:
        raise PlanError(
            Problem(str(found[-1]), f"{found[-1].name}: {fault}", way_out(faults))
            for fault in faults[found[-1]]
        )
    return found[-1]


def way_out(faults: Mapping[Path, tuple[str, ...]]) -> str:
    """Say how to go on from the newest whole checkpoint, by what is wrong with each."""
    newest_first = sorted(faults, key=step_of, reverse=True)
    whole = next((checkpoint for checkpoint in newest_first if not faults[checkpoint]), None)
    if whole is None:
        return "No checkpoint here is whole: begin a new run."
    if whole is newest_first[0]:
        return f"The newest, {whole.name}, is whole: runs go on from it."
    damaged = newest_first[: newest_first.index(whole)]
    aside = shlex.join(["mv", *map(str, reversed(damaged)), str(whole.parent.parent)])
    return f"The newest whole one is {whole.name}. To go on from it, put aside what is damaged: {aside}"


def damage(checkpoint: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a checkpoint, by its manifest."""
    if _leads_elsewhere(checkpoint):
        yield "is a link that leads elsewhere."
        return
    if not checkpoint.is_dir():
        yield "is no folder."
        return
    if _leads_elsewhere(checkpoint / MANIFEST):
        yield f"'{MANIFEST}' is a link that leads elsewhere."
        return
    try:
        files = read_manifest(checkpoint)["files"]
    except PlanError as error:
        yield from (problem.message for problem in error.problems)
        return
    found = [fault for name, facts in files.items() for fault in _damage_of(checkpoint / name, facts)]
    more = sorted(path.name for path in checkpoint.iterdir() if path.name not in {MANIFEST, *files})
    found += [f"'{name}' is not of this checkpoint: its manifest does not name it." for name in more]
    yield from found or _untruths(checkpoint, files)


def _untruths(checkpoint: Path, files: Iterable[str]) -> Iterator[str]:
    """Yield where files that are as they were written do not fit together; of each file the first that is wrong.

    Whoever wrote such a checkpoint, nothing of it is read: no index leads out of its folder, no header out of its file.
    """
    try:
        index = read_index(checkpoint)
    except PlanError as error:
        yield from (problem.message for problem in error.problems)
        return
    headers: dict[str, Mapping[str, Found]] = {}
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
                message = f"names '{place.file}' for '{tensor}'; no file of this checkpoint with tensors is called so."
                wrong.setdefault(INDEX, f"'{INDEX}' {message}")
            elif (said := _contradiction(tensor, stored, place, headers[place.file])) is not None:
                wrong.setdefault(place.file, f"'{place.file}' {said}")
        if sum(math.prod(place.shape) for place in stored.parts) != math.prod(stored.shape):
            message = f"has parts of '{tensor}' that are not {list(stored.shape)} together."
            wrong.setdefault(INDEX, f"'{INDEX}' {message}")
    yield from wrong.values()


def _contradiction(tensor: str, stored: Stored, place: Place, header: Mapping[str, Found]) -> str | None:
    """Return what a file says of a part of a tensor, where that is not what the index says."""
    found = header.get(tensor)
    if found is None:
        return f"has no '{tensor}', '{INDEX}' says it has."
    if (found.dtype, found.shape) != (stored.dtype, place.shape):
        told = f"{stored.dtype} {list(place.shape)}"
        return f"has {found.dtype} {list(found.shape)} for '{tensor}', '{INDEX}' says {told}."
    ends = (offset + n for offset, n in zip(place.offsets, place.shape, strict=True))
    if (
        any(end > full for end, full in zip(ends, stored.shape, strict=True))
        or min(place.offsets, default=0) < 0
    ):
        return f"has a part of '{tensor}' at {list(place.offsets)}, outside of {list(stored.shape)}."
    return None


def _damage_of(path: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    if _leads_elsewhere(path):
        yield f"'{path.name}' is a link that leads elsewhere."
    elif not path.is_file():
        yield f"'{path.name}' is missing."
    elif path.stat().st_size != facts["bytes"]:
        yield f"'{path.name}' has {path.stat().st_size} bytes; {facts['bytes']} were written."
    elif checksum(path) != facts["sha256"]:
        yield f"'{path.name}' is not what was written: its checksum differs."


def _leads_elsewhere(path: Path) -> bool:
    return path.resolve() != path.parent.resolve() / path.name


# -- writing -----------------------------------------------------------------------------------------------


def publish(
    partial: Path, target: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give a whole checkpoint its name. Raises OSError, also where there is one of that name."""
    manifest = {"version": VERSION, **facts, "files": files, "created": time.time()}
    write_text(partial / MANIFEST, canonical(manifest))
    _settle(partial)
    partial.rename(target)
    _settle(target.parent)


def prune(checkpoints: Path, *, keep: int, keep_every: int) -> None:
    """Let go of all but the newest `keep`, and those of steps that `keep_every` divides.

    Each loses its name first: what is cut off while it is removed would else look damaged.
    """
    for old in published(checkpoints)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))


def clear(checkpoints: Path) -> None:
    """Remove what saves left that were cut off."""
    remove(checkpoints.glob(f"step-*{PARTIAL}"))


def remove(folders: Iterable[Path]) -> None:
    """Remove folders, as far as that can be done."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
