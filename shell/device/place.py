"""Places: a process's rank in its world, how it finds the other ranks, and what it sets before it computes."""

import os

import attrs


QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


@attrs.frozen
class RankPlace:
    """A rank of a world; `meeting` is the file over which a local world meets (None: torchrun's store)."""

    rank: int
    size: int
    meeting: str | None = None
    local_rank: int = 0


def under_torchrun() -> RankPlace | None:
    """Return the place from the variables of torchrun, or of a launcher that sets the same ones, if they are set."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    return RankPlace(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def prepare() -> None:
    """Set what CUDA reads at its first use in this process; what the user has set stays.

    NCCL has a stream for each group. CUDA maps streams to this many queues, 8 by default. Streams that share a queue
    wait for each other's earlier work, even for a receive whose sender waits for this rank in turn.
    """
    os.environ.setdefault(QUEUES, "32")
