"""Saving: checkpoints that are written while training goes on.

At a save point a rank copies what it writes to host memory, which is all that a step waits for. Then one thread of
each rank goes two legs, and between them the ranks agree:

    write      every rank its own files, in a folder under a temporary name
    publish    the first rank the manifest, then the folder's name; then it lets go of old checkpoints

The threads touch files and copies, and no process group: those belong to training. Whether all have ended a leg the
ranks see in the record that they exchange in each step anyway (`shell.runtime.agreement`), and so all go on in the same
step, or all learn in the same step that one could not. Until a checkpoint is published the one before is kept. One
save is in flight at a time. What is written does not depend on when: waiting for the thread at once gives the same
files.
"""

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from mimogrid.core.base.errors import WorldError
from mimogrid.shell.checkpoint import manifest, tensorfile
from mimogrid.shell.checkpoint.files import files_of, index_of, items_of, write_shard
from mimogrid.shell.checkpoint.manifest import Stored, folder_of
from mimogrid.shell.runtime.pieces import TensorPieces
from mimogrid.shell.world.phases import PUBLISHED, PUBLISHING, SAVING, WRITING


Files = dict[str, dict[str, Any]]
"""Size and checksum of files, by name."""


@attrs.frozen(eq=False)
class Flight:
    """A save under way: where it is written and published, its leg on this rank, and whether that is the last."""

    target: Path
    facts: Mapping[str, Any]
    partial: Path
    leg: "Future[Files]"
    is_last: bool = False


@attrs.frozen
class Failure:
    """What a rank could not do: with which file, and the error of the system."""

    where: str
    code: int
    message: str


class Saver:
    """The checkpoints of a run, as one of its ranks writes them. `open_saver` makes one."""

    def __init__(
        self,
        folder: Path,
        group: dist.ProcessGroup,
        thread: ThreadPoolExecutor,
        *,
        keep: int,
        keep_every: int,
        at: Callable[[str], None],
        waits: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._group = group
        self._thread = thread
        self._keep = keep
        self._keep_every = keep_every
        self._at = at
        self._waits = waits
        self._flight: Flight | None = None
        self._copies: dict[MetadataIndex, torch.Tensor] = {}
        self._items: list[WriteItem] = []
        self._plans: list[list[WriteItem]] = [[] for _ in range(group.size())]
        self._index: dict[str, Stored] = {}

    @property
    def is_ready(self) -> bool:
        """Whether this rank has ended its leg of the save in flight, if there is one."""
        return self._flight is None or self._flight.leg.done()

    def begin(self, pieces: TensorPieces, facts: Mapping[str, Any]) -> None:
        """Begin to save the step that `facts` names, after the save before; joint over the group.

        The pieces may change as soon as it returns. Raises WorldError where the save before failed.
        """
        self.settle()
        self._at(SAVING)
        items = items_of(pieces)
        self._plan(items)
        every = (piece for of_name in pieces.values() for piece in of_name)
        for item, piece in zip(items, every, strict=True):
            copy = self._copies.get(item.index)
            if copy is None or copy.shape != piece.tensor.shape or copy.dtype != piece.tensor.dtype:
                copy = torch.empty(
                    piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=not piece.tensor.is_cpu
                )
                self._copies[item.index] = copy
            copy.copy_(piece.tensor)
        self._at(WRITING)
        target = folder_of(self._folder, facts["step"])
        partial = target.with_name(target.name + manifest.PARTIAL)
        self._flight = Flight(target, facts, partial, self._thread.submit(self._write, partial))

    def advance(self) -> Path | None:
        """Go on with the save in flight; joint over the group. Waits for those that are not ready.

        Returns the checkpoint that was published with it, if one was. Raises WorldError where any rank failed.
        """
        flight = self._flight
        if flight is None:
            return None
        files = self._agreed(flight)
        if flight.is_last:
            self._flight = None
            if not self._group.rank():
                self._at(PUBLISHED)
            return flight.target
        if not self._group.rank():
            self._at(PUBLISHING)
        publishing = self._thread.submit(self._publish, flight, files)
        self._flight = attrs.evolve(flight, leg=publishing, is_last=True)
        return None

    def settle(self) -> Path | None:
        """Wait until nothing is in flight; joint over the group. Returns what was published meanwhile."""
        target = None
        while self._flight is not None:
            target = self.advance()
        return target

    def abandon(self) -> None:
        """Give up what is in flight, with no other rank; what is being published is published."""
        flight, self._flight = self._flight, None
        self._thread.shutdown(cancel_futures=True)
        if flight is not None and not self._group.rank():
            manifest.remove([flight.partial])

    def _plan(self, items: list[WriteItem]) -> None:
        """Tell the first rank what this one writes, where that has changed; as the layout does not, it hardly does."""
        news = None if items == self._items else items
        self._items = items
        first = not self._group.rank()
        every: list[Any] | None = [None] * self._group.size() if first else None
        self._waits()
        dist.gather_object(news, every, group=self._group, group_dst=0)
        if every and any(told is not None for told in every):
            self._plans = [
                plan if told is None else told for plan, told in zip(self._plans, every, strict=True)
            ]
            self._index = index_of(self._plans)

    def _write(self, partial: Path) -> Files:
        partial.mkdir(parents=True, exist_ok=True)
        files: Files = {}
        for name, items in files_of(self._group.rank(), self._items).items():
            files[name] = write_shard(partial / name, items, self._copies)
        if self._index:
            index = manifest.index_text(self._index)
            files[manifest.INDEX] = tensorfile.write_text(partial / manifest.INDEX, index)
        return files

    def _publish(self, flight: Flight, files: Files) -> Files:
        if not self._group.rank():
            manifest.publish(flight.partial, flight.target, flight.facts, files)
            manifest.prune(self._folder, keep=self._keep, keep_every=self._keep_every)
        return {}

    def _agreed(self, flight: Flight) -> Files:
        """Return the files of all ranks, once they have ended a leg. Raises WorldError where one failed at it."""
        every: list[Any] = [None] * self._group.size()
        mine = _outcome(flight)
        self._waits()
        dist.all_gather_object(every, mine, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        failures = {rank: said for rank, said in zip(ranks, every, strict=True) if isinstance(said, Failure)}
        if failures:
            raise WorldError(_in_words(flight, failures))
        return {name: facts for files in every for name, facts in sorted(files.items())}


@contextlib.contextmanager
def open_saver(
    folder: Path,
    group: dist.ProcessGroup,
    *,
    keep: int,
    keep_every: int = 0,
    at: Callable[[str], None] = lambda _: None,
    waits: Callable[[], None] = lambda: None,
) -> Iterator[Saver]:
    """Open what writes the checkpoints of a run into a folder; joint over `group`.

    At the end, the save in flight is waited for; after a failure, given up. `at` hears of the moments, and `waits`
    whenever this rank has done its part and waits for the others.
    """
    if not group.rank():
        manifest.clear(folder)
    waits()
    dist.barrier(group)  # What follows may write where the first rank has just cleared.
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as thread:
        saver = Saver(folder, group, thread, keep=keep, keep_every=keep_every, at=at, waits=waits)
        try:
            yield saver
            saver.settle()
        except BaseException:
            saver.abandon()
            raise


def save(
    folder: Path, pieces: TensorPieces, facts: Mapping[str, Any], group: dist.ProcessGroup, *, keep: int
) -> None:
    """Write one checkpoint and wait for it; joint over `group`."""
    with open_saver(folder, group, keep=keep) as saver:
        saver.begin(pieces, facts)


def _outcome(flight: Flight) -> Files | Failure:
    """Wait for a leg; return its files, or why there are none."""
    try:
        return flight.leg.result()
    except OSError as error:
        return Failure(str(error.filename or flight.partial), error.errno or 0, str(error.strerror or error))


def _in_words(flight: Flight, failures: Mapping[int, Failure]) -> str:
    """Say once what is wrong and what can be done, however many ranks met it."""
    first = next(iter(failures.values()))
    same = ", ".join(str(rank) for rank, failure in failures.items() if failure.code == first.code)
    remedy = _REMEDIES.get(first.code, "Repair that")
    return (
        f"checkpoint '{flight.target.name}' was not saved: '{first.where}': {first.message} (ranks {same}).\n"
        f"    {remedy}, then go on with --resume {flight.target.parent.parent}. What was saved before is there."
    )


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or lower train.keep_checkpoints"),
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make the folder writable"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR), "Put aside what is there"),
}
"""What a user can do about an error of the file system."""
