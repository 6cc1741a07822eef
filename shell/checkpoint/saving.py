"""Saving: checkpoints that are written while training continues.

At a save point a rank copies what it writes into host memory. A step waits for nothing else. Then one thread of each
rank works in two phases, and between them the ranks agree:

    write      every rank writes its own files, into a folder with a temporary name
    publish    the first rank writes the manifest and renames the folder, then removes old checkpoints

The threads use files and copies, and no process group: those belong to training. The ranks learn that all have
ended a phase from the record that they exchange in each step anyway (`shell.runtime.agreement`). So all continue in
the same step, or all learn in the same step that one has failed. The previous checkpoint is kept until the new one
is published. One save is pending at a time. What is written does not depend on when: waiting for the thread at once
gives the same files.
"""

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from mimogrid.core.base.errors import WorldError
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.files import files_of, index_of, items_of, write_shard
from mimogrid.shell.checkpoint.index import INDEX, IndexedTensor, index_text
from mimogrid.shell.checkpoint.manifest import folder_of
from mimogrid.shell.job import tensorfile
from mimogrid.shell.runtime.tensor_slices import TensorSlices
from mimogrid.shell.world.phases import PUBLISHED, PUBLISHING, SAVING, WRITING


Files = dict[str, dict[str, Any]]
"""The ``bytes`` and ``sha256`` of files, by name."""


STALLED = 0.7
"""A rank waits for its file system for this part of the time for which the others wait for it, and says so first."""
ABANDON_S = 10.0
"""How long a rank that fails waits for the end of what it is writing."""


@attrs.frozen(eq=False)
class PendingSave:
    """A save that is not published yet.

    Attributes:
        target: the folder that it gets.
        facts: its manifest.
        partial: the folder that it is written into.
        phase: what the thread of this rank does for it, or has done.
        is_last_phase: whether that phase is the last.
    """

    target: Path
    facts: Mapping[str, Any]
    partial: Path
    phase: "Future[Files]"
    is_last_phase: bool = False


@attrs.frozen
class Failure:
    """Why a rank could not save: the file, and the error of the system."""

    where: str
    code: int
    message: str


class Saver:
    """Writes one rank's part of the checkpoints of a run. `open_saver` makes one.

    `on_phase` is called with the name of each phase that begins, and `on_wait` before this rank waits for the others.
    """

    def __init__(
        self,
        folder: Path,
        group: dist.ProcessGroup,
        *,
        keep: int,
        keep_every: int,
        timeout_s: float,
        on_phase: Callable[[str], None],
        on_wait: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._group = group
        self._timeout_s = timeout_s
        self._keep = keep
        self._keep_every = keep_every
        self._on_phase = on_phase
        self._on_wait = on_wait
        self._pending: PendingSave | None = None
        self._copies: dict[MetadataIndex, torch.Tensor] = {}
        self._items: list[WriteItem] = []
        self._plans: list[list[WriteItem]] = [[] for _ in range(group.size())]
        self._index: dict[str, IndexedTensor] = {}

    @property
    def is_ready(self) -> bool:
        """Whether this rank has ended its phase of the pending save, if there is one."""
        return self._pending is None or self._pending.phase.done()

    def begin(self, slices: TensorSlices, facts: Mapping[str, Any]) -> None:
        """Begin to save the step that `facts` names, once the previous save is published. All ranks call it together.

        The slices may change as soon as it returns. Raises WorldError if the previous save failed.
        """
        self.wait_for_save()
        self._on_phase(SAVING)
        items = items_of(slices)
        self._plan(items)
        tensors = (part.tensor for parts in slices.values() for part in parts)
        for item, tensor in zip(items, tensors, strict=True):
            copy = self._copies.get(item.index)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not tensor.is_cpu)
                self._copies[item.index] = copy
            copy.copy_(tensor)
        self._on_phase(WRITING)
        target = folder_of(self._folder, facts["step"])
        partial = target.with_name(target.name + manifest.PARTIAL)
        self._pending = PendingSave(target, facts, partial, _in_thread(self._write, partial))

    def advance(self) -> Path | None:
        """Begin the next phase of the pending save; waits for ranks that are not ready. All ranks call it together.

        Returns the checkpoint if it has been published. Raises WorldError if any rank failed.
        """
        pending = self._pending
        if pending is None:
            return None
        files = self._agreed(pending)
        if pending.is_last_phase:
            self._pending = None
            if not self._group.rank():
                self._on_phase(PUBLISHED)
            return pending.target
        if not self._group.rank():
            self._on_phase(PUBLISHING)
        publishing = _in_thread(self._publish, pending, files)
        self._pending = attrs.evolve(pending, phase=publishing, is_last_phase=True)
        return None

    def wait_for_save(self) -> Path | None:
        """Wait until no save is pending, and return what was published. All ranks call it together."""
        target = None
        while self._pending is not None:
            target = self.advance()
        return target

    def abandon(self) -> None:
        """Give up the pending save without the other ranks; one that is being published is published."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        wait([pending.phase], timeout=ABANDON_S)
        if pending.phase.done() and not self._group.rank():
            manifest.remove([pending.partial])

    def _plan(self, items: list[WriteItem]) -> None:
        """Send the first rank what this one writes, if that has changed. It rarely does, as the layout does not."""
        changed = None if items == self._items else items
        self._items = items
        first = not self._group.rank()
        every: list[Any] | None = [None] * self._group.size() if first else None
        self._on_wait()
        dist.gather_object(changed, every, group=self._group, group_dst=0)
        if every and any(new is not None for new in every):
            self._plans = [plan if new is None else new for plan, new in zip(self._plans, every, strict=True)]
            self._index = index_of(self._plans)

    def _write(self, partial: Path) -> Files:
        """Write this rank's files, on its thread; the first rank also writes the index."""
        partial.mkdir(parents=True, exist_ok=True)
        files: Files = {}
        for name, items in files_of(self._group.rank(), self._items).items():
            files[name] = write_shard(partial / name, items, self._copies)
        if self._index:
            files[INDEX] = tensorfile.write_text(partial / INDEX, index_text(self._index))
        return files

    def _publish(self, pending: PendingSave, files: Files) -> Files:
        """On the thread of the first rank, publish a save and remove old checkpoints."""
        if not self._group.rank():
            manifest.publish(pending.partial, pending.target, pending.facts, files)
            manifest.prune(self._folder, keep=self._keep, keep_every=self._keep_every)
        return {}

    def _agreed(self, pending: PendingSave) -> Files:
        """Return the files of all ranks, once all have ended a phase. Raises WorldError if one failed."""
        every: list[Any] = [None] * self._group.size()
        mine = _outcome(pending, STALLED * self._timeout_s)
        self._on_wait()
        dist.all_gather_object(every, mine, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        failures = {
            rank: found for rank, found in zip(ranks, every, strict=True) if isinstance(found, Failure)
        }
        if failures:
            raise WorldError(_in_words(pending, failures))
        return {name: facts for files in every for name, facts in sorted(files.items())}


@contextlib.contextmanager
def open_saver(
    folder: Path,
    group: dist.ProcessGroup,
    *,
    keep: int,
    keep_every: int = 0,
    timeout_s: float = 600.0,
    on_phase: Callable[[str], None] = lambda _: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[Saver]:
    """Open the saver of a run's checkpoints in a folder. All ranks of `group` call it together.

    At the end it waits for the pending save; after a failure it gives that up. The newest `keep` checkpoints are kept,
    and those of steps that `keep_every` divides (0: no others).
    """
    if not group.rank():
        manifest.clear(folder)
    on_wait()
    dist.barrier(group)  # what follows may write where the first rank has just cleared
    saver = Saver(
        folder,
        group,
        keep=keep,
        keep_every=keep_every,
        timeout_s=timeout_s,
        on_phase=on_phase,
        on_wait=on_wait,
    )
    try:
        yield saver
        saver.wait_for_save()
    except BaseException:
        saver.abandon()
        raise


def save(
    folder: Path, slices: TensorSlices, facts: Mapping[str, Any], group: dist.ProcessGroup, *, keep: int
) -> None:
    """Write one checkpoint and wait for it. All ranks of `group` call it together."""
    with open_saver(folder, group, keep=keep) as saver:
        saver.begin(slices, facts)


def _in_thread(function: Callable[..., Files], *arguments: Any) -> "Future[Files]":
    """Run a phase beside training. A process may end while a file system keeps the thread waiting."""
    phase: Future[Files] = Future()

    def run() -> None:
        try:
            phase.set_result(function(*arguments))
        except BaseException as error:
            phase.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return phase


def _outcome(pending: PendingSave, limit_s: float) -> Files | Failure:
    """Wait for a phase; return its files, or why there are none."""
    try:
        return pending.phase.result(timeout=limit_s)
    except OSError as error:
        if not pending.phase.done():
            return Failure(str(pending.partial), errno.ETIMEDOUT, "the file system does not answer")
        return Failure(str(error.filename or pending.partial), error.errno or 0, str(error.strerror or error))


def _in_words(pending: PendingSave, failures: Mapping[int, Failure]) -> str:
    """Say once what is wrong and what to do about it, however many ranks have failed."""
    first = next(iter(failures.values()))
    same = ", ".join(str(rank) for rank, failure in failures.items() if failure.code == first.code)
    remedy = _REMEDIES.get(first.code, "Repair that")
    return (
        f"checkpoint '{pending.target.name}' was not saved: '{first.where}': {first.message} (ranks {same}).\n"
        f"    {remedy}, then continue with --resume {pending.target.parent.parent}. Earlier ones are still there."
    )


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or lower train.keep_checkpoints"),
    **dict.fromkeys(
        (errno.ETIMEDOUT, errno.EIO, errno.ENOTCONN, errno.ESTALE),
        "Look at the file system (dmesg, mount, df)",
    ),
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make the folder writable"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR), "Move away what is there"),
}
"""What a user can do about errors of the file system."""
