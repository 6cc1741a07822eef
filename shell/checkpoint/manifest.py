"""Manifests: which checkpoints a run has, what each contains, and whether it is whole.

    checkpoints/step-00000100/
        manifest.json         step, job, layout, versions, machine, size and checksum of every other file, and a
                              checksum of all of this
        index.json            every tensor: its dtype, its full shape, and the file of each part
        shard-*.safetensors   the slices that one rank writes

A checkpoint is written as ``step-00000100.partial`` and renamed when it is complete, with its manifest. So a checkpoint
of that name with a file missing, or with one too many, was damaged later. It is refused, and the file is named. So is
one whose parts contradict each other, or the table of the job that wrote it (`core.update.contents`). Checksums show
damage; who may write there can also renew them. Nothing here needs torch.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.contents import Tensors, field_faults, is_count, table_faults, written_as
from mimogrid.shell.checkpoint.index import INDEX, contradictions, described, read_index
from mimogrid.shell.checkpoint.jsonfile import OTHER, canonical, read_object
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.tensorfile import checksum, write_text


VERSION = 2
"""The format that is written. Manifests of format 1 have no checksum of their own."""
SHOWN = 4
"""How many differences from the job are listed."""
CHECKPOINTS = "checkpoints"
"""Their folder, in the folder of a run."""
MANIFEST, PARTIAL = "manifest.json", ".partial"
DIGEST = "digest"
"""The key of the checksum of everything else in a manifest."""
_NAME = re.compile(r"step-[0-9]{8,18}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after which `step` is the next."""
    return checkpoints / f"step-{step:08}"


def published(checkpoints: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whole or not."""
    found = (path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def located(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; of a folder that is a checkpoint, itself. Raises PlanError."""
    folder = Path(os.path.abspath(folder))  # so that "." has a name; links are not followed
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
    manifest = read_object(checkpoint / MANIFEST)
    version = manifest.get("version")
    if type(version) is not int or version not in (1, VERSION):
        message = f"'{MANIFEST}' is of version {version!r}; this mimogrid reads 1 and {VERSION}."
        remedy = "Use the version of mimogrid that wrote it."
        raise PlanError([Problem(str(checkpoint), message, remedy)])
    faults = list(field_faults(manifest))
    if not _is_list_of_files(manifest.get("files")):
        faults.append("lacks files, each with its bytes and sha256.")
    if (
        not faults
        and (version > 1 or DIGEST in manifest)
        and manifest.get(DIGEST) != manifest_digest(manifest)
    ):
        faults = ["has changed since it was written: its checksum differs."]
    if faults:
        raise PlanError(Problem(str(checkpoint), f"'{MANIFEST}' {fault}", OTHER) for fault in faults)
    return manifest


def manifest_digest(manifest: Mapping[str, object]) -> str:
    """Return the checksum of everything in a manifest but its checksum."""
    text = canonical({key: value for key, value in manifest.items() if key != DIGEST})
    return hashlib.sha256(text.encode()).hexdigest()


def _is_list_of_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        _FILE.fullmatch(name)
        and isinstance(facts, dict)
        and is_count(facts.get("bytes"))
        and isinstance(facts.get("sha256"), str)
        for name, facts in value.items()
    )


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
    newest_first = sorted(faults, key=lambda c: (len(c.name), c.name), reverse=True)
    whole = next((checkpoint for checkpoint in newest_first if not faults[checkpoint]), None)
    if whole is None:
        return "No checkpoint here is whole: begin a new run."
    if whole is newest_first[0]:
        return f"The newest, {whole.name}, is whole: runs continue from it."
    damaged = newest_first[: newest_first.index(whole)]
    move = shlex.join(["mv", *map(str, reversed(damaged)), str(whole.parent.parent)])
    return f"The newest whole one is {whole.name}. To continue from it, move the damaged ones away: {move}"


def damage(checkpoint: Path, on_read: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """Yield what is wrong with a checkpoint: with its files by its manifest, else with what they say.

    Files are read piece by piece; `on_read` is called with the bytes of each.
    """
    try:
        yield from _damage(checkpoint, on_read)
    except OSError as error:
        yield f"'{Path(str(error.filename or checkpoint)).name}' cannot be read: {error.strerror}."


def _damage(checkpoint: Path, on_read: Callable[[int], None]) -> Iterator[str]:
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
        manifest = read_manifest(checkpoint)
    except PlanError as error:
        yield from (problem.message for problem in error.problems)
        return
    files = manifest["files"]
    if checkpoint.name != (name := folder_of(checkpoint.parent, manifest["step"]).name):
        yield f"should be named '{name}': its '{MANIFEST}' says step {manifest['step']}."
        return
    found = [
        fault for name, facts in files.items() for fault in _damage_of(checkpoint / name, facts, on_read)
    ]
    more = sorted(path.name for path in checkpoint.iterdir() if path.name not in {MANIFEST, *files})
    found += [f"'{name}' is not of this checkpoint: its manifest does not name it." for name in more]
    yield from found or _inconsistencies(checkpoint, manifest)


def _inconsistencies(checkpoint: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield where files with the right checksums contradict each other, or the job that wrote them."""
    try:
        index = read_index(checkpoint)
    except PlanError as error:
        yield from (problem.message for problem in error.problems)
        return
    try:
        spec = jobfile.recorded(facts["job"], checkpoint / MANIFEST)
    except PlanError as error:
        yield f"'{MANIFEST}' {error.problems[0].message}"
        return
    except RecursionError:
        yield f"'{MANIFEST}' holds a job that is nested too deeply."
        return
    found = list(contradictions(checkpoint, facts["files"], index))
    yield from found or itertools.islice(_differences(spec, facts, described(index)), SHOWN)


def _differences(spec: JobSpec, facts: Mapping[str, Any], found: Tensors) -> Iterator[str]:
    """Yield how a checkpoint differs from what the job that wrote it holds after so many steps."""
    problems = problems_of(spec, None)
    if problems:
        yield f"'{MANIFEST}' holds a job that cannot run: {problems[0].where}: {problems[0].message}"
        return
    topology = topology_of(spec, found)
    for fault in table_faults(topology, found, steps_taken=facts["steps_taken"]):
        yield f"'{INDEX}' {fault}"
    if facts["version"] > 1:
        for key, value in written_as(topology, facts["step"]).items():
            if facts.get(key) != value:
                yield f"'{MANIFEST}' has {facts.get(key)!r} for {key}, its job and its step give {value!r}."


def topology_of(spec: JobSpec, found: Tensors) -> Topology:
    """Return the topology of the job that wrote a checkpoint; the job is legal.

    A job need not say how wide the rows of its data are. The weights that read them do.
    """
    weights = {name: found.get(f"{name}.input.weight") for name in spec.modules}
    widths = {name: of.shape[-1] if of is not None and of.shape else 1 for name, of in weights.items()}
    return assemble(spec, SourceFacts(features=widths))


def _damage_of(path: Path, facts: Mapping[str, Any], on_read: Callable[[int], None]) -> Iterator[str]:
    """Yield how a file differs from its size and checksum in the manifest."""
    if _is_link(path):
        yield f"'{path.name}' is a link to another place."
    elif not path.is_file():
        yield f"'{path.name}' is missing."
    elif path.stat().st_size != facts["bytes"]:
        yield f"'{path.name}' has {path.stat().st_size} bytes; {facts['bytes']} were written."
    elif checksum(path, on_read) != facts["sha256"]:
        yield f"'{path.name}' has changed since it was written: its checksum differs."


def _is_link(path: Path) -> bool:
    return path.is_symlink()


# -- writing -----------------------------------------------------------------------------------------------


def publish(
    partial: Path, target: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the manifest and rename a complete checkpoint. Raises OSError, also if `target` exists."""
    manifest = {"version": VERSION, **facts, "files": files, "created": time.time()}
    write_text(partial / MANIFEST, canonical({**manifest, DIGEST: manifest_digest(manifest)}))
    _sync_names(partial)
    partial.rename(target)
    _sync_names(target.parent)


def prune(checkpoints: Path, *, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` and those of steps that `keep_every` divides.

    Each is renamed first, so that one whose removal is interrupted does not look damaged. One that a process reads
    (`reading`) is left until the next save.
    """
    for old in published(checkpoints)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            with _alone(old) as is_alone:
                if is_alone:
                    shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed while open. Raises PlanError where it has just been removed.

    Who reads shares a lock on the manifest, and who removes needs it alone. A file system without locks keeps nothing.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context((checkpoint / MANIFEST).open("rb"))
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
            (checkpoint / MANIFEST).stat()  # who removes it may have been faster
        except OSError as error:
            message = f"cannot be read: {error.strerror}. Its run may have just removed it."
            raise PlanError([Problem(str(checkpoint), message, "Take a newer checkpoint.")]) from None
        yield


@contextlib.contextmanager
def _alone(checkpoint: Path) -> Iterator[bool]:
    """Keep others from reading a checkpoint while open; False where one reads it already."""
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context((checkpoint / MANIFEST).open("r+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks, or a damaged checkpoint
            pass
        yield True


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
