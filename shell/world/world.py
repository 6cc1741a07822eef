"""The world: processes that have found each other and agree on the plan.

A world meets over a store, compares the digest of the plan before any group is made, creates the planned groups, and
closes what it opened. `join` joins processes that were started for the job. `visit` makes a world inside a process
group that belongs to a host program, and leaves nothing behind there. The first rank to fail notes that in the store,
so the others know that their own failures follow from it.
"""

import contextlib
import datetime
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.errors import EchoError, PlanError, Problem, WorldError
from mimogrid.core.faults.diagnosis import DiagnosedError
from mimogrid.core.topology.groups import Ranks, Slot
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.world.hosts import (
    ClockBounds,
    HostRecord,
    clock_problem,
    first_other,
    record_of,
    version_problem,
)


POLL_S, ANSWER_S = 0.02, 5.0
"""How often a rank asks a store, and how long a rank that has failed waits for an answer."""
FAILED = "failed"
"""The mark of a world in which a rank has failed; its value is the rank that failed first."""


class AbsentError(WorldError):
    """Ranks did not reach a point in time that all the others reached."""

    def __init__(self, ranks: tuple[int, ...], what: str) -> None:
        self.ranks = ranks
        super().__init__(f"waited for '{what}', to which ranks {list(ranks)} had not come")


@attrs.frozen(eq=False)
class World:
    """A joined world: this process's place in it, and the store that all ranks share.

    Attributes:
        rank, size: this process's rank, and how many ranks there are.
        store: the store of this world.
        timeout: how long a rank waits for others.
        outside: for each rank of this world its rank in torch's default process group. They are the same, unless a host
            program puts the job on other ranks.
        is_visited: whether the process group belongs to a host program. Then every rank makes every group. Where only
            members make a group, torch names it by how many groups its members have, and the ranks of a host program
            may have different numbers of them.
        name: distinguishes worlds that met over the store of one launcher.
    """

    rank: int
    size: int
    store: dist.Store
    timeout: datetime.timedelta
    outside: Sequence[int]
    is_visited: bool = False
    name: str = ""

    def make_groups(self, slot: Slot, *, backend: str, purpose: str) -> Mapping[Ranks, dist.ProcessGroup]:
        """Make the groups of a slot; return the group that this rank is in, by its ranks.

        A rank for which the slot has no group gets a group of its own; in a visited world, only in the empty slot.
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

    def agree_on(self, digest: str, mine: HostRecord | None = None) -> None:
        """Compare the versions of all hosts and the digest of the plan over the world; None: those of this process.

        Raises WorldError on the first rank with other versions than rank 0, and EchoError on all others; WorldError
        where a rank has another digest than rank 0.
        """
        self.store.set(f"digest/{self.rank}", digest)
        records = self.hosts(mine)

        def decided() -> str:
            problem = version_problem(records)
            return json.dumps([first_other(records), str(problem)]) if problem else ""

        if verdict := self.first_decides("versions", decided):
            rank, text = json.loads(verdict)
            if rank == self.rank:
                raise WorldError(text.removeprefix("hosts: "))
            raise EchoError(f"rank {rank} has other versions than rank 0")
        first = self._value_of_first("digest/0")
        if digest != first:
            raise WorldError(
                f"rank {self.rank} planned another job than rank 0: digest {digest[:12]} against "
                f"{first[:12]}. Start every rank with the same job file, overrides and version."
            )

    def hosts(self, mine: HostRecord | None = None) -> tuple[HostRecord, ...]:
        """Return the records of all hosts by rank, on rank 0, and nothing on others; all ranks call it once.

        None: the record of this process.
        """
        self.store.set(f"host/{self.rank}", (mine or record_of(torch.__version__)).as_text())
        self.wait_for_all("met")
        ranks = range(self.size) if self.rank == 0 else ()
        return tuple(HostRecord.parse(self.store.get(f"host/{rank}").decode()) for rank in ranks)

    def first_decides(self, key: str, decide: Callable[[], str]) -> str:
        """Return what rank 0 decides, on every rank. Raises AbsentError where rank 0 does not decide in time."""
        if self.rank == 0:
            self.store.set(key, decide())
        return self._value_of_first(key)

    def wait_for_all(self, what: str) -> None:
        """Wait until every rank is this far: a rank that left earlier would break the connections of the others.

        Raises AbsentError for ranks that do not come in time.
        """
        self.store.set(f"{what}/{self.rank}", "")
        if self.store.add(f"{what}/count", 1) == self.size:
            self.store.set(f"{what}/all", str(time.time()))
        self._wait_for(
            f"{what}/all", lambda: (r for r in range(self.size) if not self.store.check([f"{what}/{r}"]))
        )

    def compare_clocks(self, what: str) -> None:
        """Wait as `wait_for_all` does, and note how this rank's clock differs from the last rank's.

        The closer together the ranks come, the smaller a difference is noticed.
        """
        before_s = time.time()
        self.wait_for_all(what)
        last_s, after_s = float(self.store.get(f"{what}/all")), time.time()
        self.store.set(f"clock/{self.rank}", json.dumps([before_s - last_s, after_s - last_s]))

    def clock_problem(self) -> Problem | None:
        """Return how clocks differ, after all ranks have compared them; asked on rank 0."""
        hosts = [HostRecord.parse(self.store.get(f"host/{rank}").decode()).host for rank in range(self.size)]
        firsts = {host: rank for rank, host in reversed([*enumerate(hosts)])}.values()
        clocks = {rank: ClockBounds(*json.loads(self.store.get(f"clock/{rank}"))) for rank in firsts}
        return clock_problem(hosts, clocks)

    def _value_of_first(self, key: str) -> str:
        """Return the value that rank 0 sets for a key."""
        self._wait_for(key, lambda: (0,))
        return str(self.store.get(key).decode())

    def _wait_for(self, key: str, absent: Callable[[], Iterable[int]]) -> None:
        """Wait for a key; `absent` returns the ranks that have not done their part of it."""
        try:
            # The store may belong to a host program, and keeps the time limit that it has.
            self.store.wait([key], self.timeout)
        except RuntimeError as error:  # Which of its kinds depends on the store.
            raise AbsentError(tuple(absent()), key) from error

    def mark(self, what: str) -> None:
        """Leave a mark in the store; one that is gone, or belongs to a rank that is, is passed over."""
        with contextlib.suppress(RuntimeError):
            self.store.set(what, "")

    def is_marked(self, what: str) -> bool:
        """Whether a rank has left a mark."""
        return bool(self.store.check([what]))

    def first_to_fail(self, folder: Path | None) -> int | None:
        """Return which rank of the world failed first: this one if none did before.

        If the store is gone with the rank that kept it, or hangs with it, the first rank to make a file in a shared
        folder is the first. None is another rank, which is not known.
        """
        first = _answer(lambda: self.store.compare_set(FAILED, "", str(self.rank)))
        if first is None:
            if folder is None:
                return None
            try:
                (folder / f"failed-{self.name}").touch(exist_ok=False)
            except FileExistsError:
                return None
            return self.rank
        return int(first)


def _answer(ask: Callable[[], bytes]) -> bytes | None:
    """Return what a store answers; None if it does not in `ANSWER_S`.

    The rank that keeps it may be gone, or be the one that hangs: then torch waits for the answer without a limit.
    """
    answers: list[bytes] = []

    def call() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return answers[0] if answers else None


@contextlib.contextmanager
def first_failure(world: World, folder: Callable[[], Path | None] = lambda: None) -> Iterator[None]:
    """Let the first failure of the world through as it is, and turn failures that follow from it into `EchoError`.

    `folder` returns a folder that all ranks share, if there is one by the time of the failure.
    """
    try:
        yield
    except PlanError:
        # If only some ranks have it, the others fail because of it.
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


def meet(place: RankPlace, timeout: datetime.timedelta) -> World:
    """Return the world of a place, over its file or over torchrun's store."""
    if place.meeting:
        store: dist.Store = dist.FileStore(place.meeting, place.size)
        store.set_timeout(timeout)
        return World(place.rank, place.size, store, timeout, range(place.size))
    return rendezvous(next(dist.rendezvous("env://", timeout=timeout))[0], place.rank, place.size, timeout)


def rendezvous(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> World:
    """Return a world in a fresh part of a launcher's store, where ranks of earlier attempts have left their keys.

    torchrun keeps its store when it restarts ranks, and nodes do not number the attempts alike. So each process sets an
    id of its own, and rank 0 answers each id with the prefix of the part (`serve_rendezvous`).
    """
    store.set_timeout(timeout)
    me = uuid.uuid4().hex
    store.set(f"rendezvous/id/{rank}", me)
    if rank == 0:
        return World(rank, size, dist.PrefixStore(me, store), timeout, range(size), name=me)
    try:
        prefix = store.get(f"rendezvous/prefix/{me}").decode()
    except RuntimeError as error:
        absent = AbsentError((0,), "rendezvous")
        raise absent if rank == 1 else EchoError(str(absent)) from error  # One rank reports it.
    return World(rank, size, dist.PrefixStore(prefix, store), timeout, range(size), name=prefix)


def serve_rendezvous(world: World) -> None:
    """Give every other rank the prefix of the world's part of the store, on rank 0; the others confirm it.

    An id of an earlier attempt gets an answer, too, which no process reads. Raises AbsentError for ranks that do not
    confirm in time.
    """
    if world.rank != 0:
        world.store.set(f"confirmed/{world.rank}", "")
        return
    assert isinstance(world.store, dist.PrefixStore)
    store, deadline = world.store.underlying_store, time.monotonic() + world.timeout.total_seconds()
    answered, missing = set[str](), set(range(1, world.size))
    while missing := {rank for rank in missing if not world.store.check([f"confirmed/{rank}"])}:
        for rank in missing:
            if store.check([f"rendezvous/id/{rank}"]):
                other = store.get(f"rendezvous/id/{rank}").decode()
                if other not in answered:
                    answered.add(other)
                    store.set(f"rendezvous/prefix/{other}", world.name)
        if time.monotonic() > deadline:
            raise AbsentError(tuple(sorted(missing)), "rendezvous")
        time.sleep(POLL_S)


@contextlib.contextmanager
def join(world: World, *, backend: str, digest: str) -> Iterator[None]:
    """Join a world that has met; leave it on exit.

    Raises WorldError before any group is made, if the digests of the plan differ.
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
    """Enter a world of some ranks of the default process group, which a host program has initialized and keeps.

    Every rank of the host program calls it. Ranks that are not among `ranks` come after the others and idle. The ranks
    must ascend, because torch sorts the ranks of a group. Raises WorldError if the digests of the plan differ, or if
    there is no process group.
    """
    if not dist.is_initialized():
        raise WorldError("there is no process group: the host calls torch.distributed.init_process_group.")
    size = dist.get_world_size()
    if list(ranks) != sorted(set(ranks)) or any(rank not in range(size) for rank in ranks):
        message = f"{list(ranks)} are not ascending ranks of the host's world 0..{size - 1}."
        raise PlanError([Problem("ranks", message, "Name each rank of the host's once, in ascending order.")])
    outside = (*ranks, *(rank for rank in range(size) if rank not in set(ranks)))
    # No public function returns the store of a process group that another program initialized.
    shared = dist.distributed_c10d._get_default_store()
    me = dist.get_rank()
    # Each visit has keys of its own: the n-th visit of one rank is the n-th visit of all.
    nth = shared.add(f"mimogrid/visits/{me}", 1)
    store = dist.PrefixStore(f"mimogrid/{nth}", shared)
    timeout = datetime.timedelta(seconds=timeout_s)
    world = World(outside.index(me), size, store, timeout, outside, is_visited=True)
    world.agree_on(digest)
    return world
