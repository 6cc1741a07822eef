"""The world: processes that have found each other and agree on the plan.

A world meets over a store, compares the digest of the plan before any group is made, creates the planned groups,
and closes whatever it opened. `join` makes one of processes that were started for the job; `visit` makes one inside a
process group that belongs to a host, and leaves nothing behind there. The store that brought the ranks
together also tells a failure from its echoes: the first rank to fail says so there, and the others know that
they were only cut off.
"""

import contextlib
import datetime
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch.distributed as dist

from mimogrid.core.base.errors import EchoError, PlanError, Problem, WorldError
from mimogrid.core.faults.diagnosis import DiagnosedError
from mimogrid.core.topology.groups import Ranks, Slot


POLL_S = 0.02


class AbsentError(WorldError):
    """Ranks that did not come to where all the others are."""

    def __init__(self, ranks: tuple[int, ...], what: str) -> None:
        self.ranks = ranks
        super().__init__(f"waited for '{what}', to which ranks {list(ranks)} had not come")


@attrs.frozen(eq=False)
class World:
    """A joined world: this process's place in it, and the store that all share.

    `outside` says, of every rank of this world, which rank of torch's default process group it is: the same
    one, unless a host put the job elsewhere. In a visited world every rank calls for every group: where only
    members call, torch names a group by how many its members have, and a host's may have different numbers.
    `name` tells a world from others that met over the same launcher's store.
    """

    rank: int
    size: int
    store: dist.Store
    timeout: datetime.timedelta
    outside: Sequence[int]
    is_visited: bool = False
    name: str = ""

    def make_groups(self, slot: Slot, *, backend: str, purpose: str) -> Mapping[Ranks, dist.ProcessGroup]:
        """Make the groups of a slot; return the one that this rank is in, by its ranks.

        Where the slot has none for it, the rank is alone in a group; in a visited world, only in the empty slot.
        """
        mine = next((ranks for ranks in slot if self.rank in ranks), (self.rank,))
        wanted: Sequence[Ranks] = (mine,)
        if self.is_visited:
            wanted = slot or tuple((rank,) for rank in range(self.size))
        made = {
            ranks: dist.new_group(
                [self.outside[rank] for rank in ranks],
                timeout=self.timeout,
                backend=backend,
                use_local_synchronization=not self.is_visited,
                group_desc=purpose,
            )
            for ranks in wanted
        }
        return {ranks: group for ranks, group in made.items() if self.rank in ranks}

    def agree_on(self, digest: str) -> None:
        """Compare the plan's digest over the world. Raises WorldError where a rank planned another job."""
        self.store.set(f"digest/{self.rank}", digest)
        self.wait_for_all("met")
        first = self._hear("digest/0")
        if digest != first:
            raise WorldError(
                f"rank {self.rank} planned another job than rank 0: digest {digest[:12]} against "
                f"{first[:12]}. Start every rank with the same job file, overrides and version."
            )

    def first_decides(self, key: str, decide: Callable[[], str]) -> str:
        """Return what rank 0 decides; the other ranks hear it. Raises AbsentError where it does not in time."""
        if self.rank == 0:
            self.store.set(key, decide())
        return self._hear(key)

    def wait_for_all(self, what: str) -> None:
        """Wait until every rank is this far; one that left before would break the others' connecting.

        Raises AbsentError where some do not come in time.
        """
        self.store.set(f"{what}/{self.rank}", "")
        if self.store.add(f"{what}/count", 1) == self.size:
            self.store.set(f"{what}/all", "")
        self._await(
            f"{what}/all", lambda: (r for r in range(self.size) if not self.store.check([f"{what}/{r}"]))
        )

    def _hear(self, key: str) -> str:
        """Return what rank 0 says."""
        self._await(key, lambda: (0,))
        return str(self.store.get(key).decode())

    def _await(self, key: str, owing: Callable[[], Iterable[int]]) -> None:
        """Wait for a key; `owing` tells who has not come with it."""
        try:
            # The store may be a host's, with a time limit of its own that is not ours to change.
            self.store.wait([key], self.timeout)
        except RuntimeError as error:  # Which of its kinds depends on the store.
            raise AbsentError(tuple(owing()), key) from error

    def first_to_fail(self, folder: Path | None) -> int | None:
        """Return which rank of the world failed first, this one if none did before; others only echo it.

        Where the store is gone with the rank that kept it, the first is the first to say so in a folder of all; None
        is another one, which nobody can name.
        """
        try:
            first: bytes = self.store.compare_set("failed", "", str(self.rank))
        except RuntimeError:
            if folder is None:
                return None
            try:
                (folder / f"failed-{self.name}").touch(exist_ok=False)
            except FileExistsError:
                return None
            return self.rank
        return int(first)


@contextlib.contextmanager
def first_failure(world: World, folder: Callable[[], Path | None] = lambda: None) -> Iterator[None]:
    """Let the first failure of the world through as it is, and turn those that it causes into `EchoError`.

    `folder` names one that all ranks share, if there is one by the time of the failure.
    """
    try:
        yield
    except PlanError:
        # Where only some ranks meet it, the others are to know that they echo it.
        world.first_to_fail(folder())
        raise
    except (EchoError, DiagnosedError):
        raise
    except Exception as error:
        first = world.first_to_fail(folder())
        if first == world.rank:
            raise
        who = "another rank" if first is None else f"rank {first}"
        raise EchoError(f"rank {world.rank} was cut off: {who} failed first") from error


def ask(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> World:
    """Return a world in a fresh part of a launcher's store, where the ranks of earlier attempts have left their keys.

    torchrun keeps its store when it restarts ranks, and does not number the attempts alike on all nodes. So each
    process leaves an id that is its own, and rank 0 answers each id with the name of the part (`answer`).
    """
    store.set_timeout(timeout)
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    if rank == 0:
        return World(rank, size, dist.PrefixStore(me, store), timeout, range(size), name=me)
    try:
        part = store.get(f"answer/{me}").decode()
    except RuntimeError as error:
        absent = AbsentError((0,), "rendezvous")
        raise absent if rank == 1 else EchoError(str(absent)) from error  # one of them tells
    return World(rank, size, dist.PrefixStore(part, store), timeout, range(size), name=part)


def answer(world: World) -> None:
    """On rank 0, tell every other rank the part of the store; a stale id is answered too, and nobody hears."""
    if world.rank != 0:
        world.store.set(f"heard/{world.rank}", "")
        return
    assert isinstance(world.store, dist.PrefixStore)
    store, deadline = world.store.underlying_store, time.monotonic() + world.timeout.total_seconds()
    answered, missing = set[str](), set(range(1, world.size))
    while missing := {rank for rank in missing if not world.store.check([f"heard/{rank}"])}:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                other = store.get(f"hello/{rank}").decode()
                if other not in answered:
                    answered.add(other)
                    store.set(f"answer/{other}", world.name)
        if time.monotonic() > deadline:
            raise AbsentError(tuple(sorted(missing)), "rendezvous")
        time.sleep(POLL_S)


@contextlib.contextmanager
def join(world: World, *, backend: str, digest: str) -> Iterator[None]:
    """Join a world that has met; leave it on exit.

    Raises WorldError, before any group is made, where the digests of the plan differ.
    """
    world.agree_on(digest)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("world", world.store),
        rank=world.rank,
        world_size=world.size,
        timeout=world.timeout,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def visit(*, ranks: Sequence[int], timeout_s: float, digest: str) -> World:
    """Enter a world of some ranks of the default process group, which a host has initialized and keeps.

    Every rank of the host's calls it, those that are not among `ranks` too: they come after the others and
    idle. The ranks must ascend, because torch sorts the ranks of a group. Raises WorldError where the digests
    of the plan differ, and where there is no process group.
    """
    if not dist.is_initialized():
        raise WorldError("there is no process group: the host calls torch.distributed.init_process_group.")
    size = dist.get_world_size()
    if list(ranks) != sorted(set(ranks)) or any(rank not in range(size) for rank in ranks):
        message = f"{list(ranks)} are not ascending ranks of the host's world 0..{size - 1}."
        raise PlanError([Problem("ranks", message, "Name each rank of the host's once, in ascending order.")])
    outside = (*ranks, *(rank for rank in range(size) if rank not in set(ranks)))
    # Public functions do not lead to the store of a process group that somebody else initialized.
    shared = dist.distributed_c10d._get_default_store()
    me = dist.get_rank()
    # Each visit has keys of its own: the n-th of a rank is the n-th of all.
    nth = shared.add(f"mimogrid/visits/{me}", 1)
    store = dist.PrefixStore(f"mimogrid/{nth}", shared)
    timeout = datetime.timedelta(seconds=timeout_s)
    world = World(outside.index(me), size, store, timeout, outside, is_visited=True)
    world.agree_on(digest)
    return world
