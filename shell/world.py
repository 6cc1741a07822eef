"""The world: processes that have found each other and agree on the plan.

A world is joined once, compares the digest of the plan before any group is made, creates the planned groups,
and closes whatever it opened. The store that brought the ranks together also carries failures: the first rank
to fail writes its report there, so that the others know why they were cut off.
"""

import contextlib
import datetime
from collections.abc import Iterator

import attrs
import torch.distributed as dist

from mimogrid.core.errors import WorldError


FAILURE = "failure"


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

    def claim_failure(self, report: str) -> bool:
        """Publish this rank's failure; False where another rank failed first."""
        mine = f"{self.rank}\n{report}"
        with contextlib.suppress(RuntimeError):  # the store may be gone with the rank that kept it
            return self.store.compare_set(FAILURE, "", mine).decode() == mine
        return False

    def failure(self) -> str | None:
        """Return the report of the rank that failed first, if one did."""
        with contextlib.suppress(RuntimeError):
            if self.store.check([FAILURE]):
                return self.store.get(FAILURE).decode().split("\n", 1)[1]
        return None


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
