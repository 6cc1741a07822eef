"""The world: processes that have found each other and agree on the plan.

A world is joined once, compares the digest of the plan before any group is made, creates the planned groups,
and closes whatever it opened. The store that brought the ranks together also tells a failure from its echoes:
the first rank to fail says so there, and the others know that they were only cut off.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator

import attrs
import torch.distributed as dist

from mimogrid.core.errors import EchoError, PlanError, WorldError


@attrs.frozen(eq=False)
class World:
    """A joined world: this process's place in it, and the store that all share."""

    rank: int
    size: int
    store: dist.Store
    timeout: datetime.timedelta

    def agree_on(self, digest: str) -> None:
        """Compare the plan's digest over the world. Raises WorldError where a rank planned another job."""
        self.store.set(f"digest/{self.rank}", digest)
        first = self.store.get("digest/0").decode()
        if digest != first:
            raise WorldError(
                f"rank {self.rank} planned another job than rank 0: digest {digest[:12]} against "
                f"{first[:12]}. Start every rank with the same job file, overrides and version."
            )

    def first_decides(self, key: str, decide: Callable[[], str]) -> str:
        """Return what rank 0 decides; the other ranks hear it."""
        if self.rank == 0:
            self.store.set(key, decide())
        return str(self.store.get(key).decode())

    def wait_for_all(self, what: str) -> None:
        """Wait until every rank is this far; one that left before would break the others' connecting."""
        if self.store.add(f"{what}/count", 1) == self.size:
            self.store.set(f"{what}/all", "")
        self.store.wait([f"{what}/all"])

    def fails_first(self) -> bool:
        """Whether this rank is the first of the world to fail; others that fail only echo it."""
        try:
            first: bytes = self.store.compare_set("failed", "", str(self.rank))
        except RuntimeError:  # the store is gone with whoever kept it: somebody else failed before
            return False
        return first.decode() == str(self.rank)


@contextlib.contextmanager
def one_report(world: World) -> Iterator[None]:
    """Let the first failure of the world through as it is, and turn those that it causes into `EchoError`."""
    try:
        yield
    except PlanError:
        raise
    except Exception as error:
        if world.fails_first():
            raise
        raise EchoError(f"rank {world.rank} was cut off: another rank failed first") from error


@contextlib.contextmanager
def join(
    *, store: dist.Store, rank: int, size: int, backend: str, timeout_s: float, digest: str
) -> Iterator[World]:
    """Enter a world over a store that all its ranks share; leave it on exit.

    Raises WorldError, before any group is made, where the digests of the plan differ.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    world = World(rank, size, store, timeout)
    world.agree_on(digest)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("world", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()
