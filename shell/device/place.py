"""Places: where this process stands in its world, how it finds the others, and what it sets before it computes."""

import os

import attrs


QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


@attrs.frozen
class Place:
    """A rank of a world; `meeting` is the file over which a local world meets (None: torchrun's store)."""

    rank: int
    size: int
    meeting: str | None = None
    local_rank: int = 0


def under_torchrun() -> Place | None:
    """Return the place that torchrun (or any launcher that sets its variables) gave, if one did."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    return Place(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def prepare() -> None:
    """Set what CUDA reads when a process of ours first uses it; what the user has set stays.

    Messages and sums have streams of their own, one for each group. CUDA lays streams on this many queues, and
    on 8 where nothing is said; whatever shares a queue waits for what was asked for before, even for a receive whose
    sender waits for it in turn.
    """
    os.environ.setdefault(QUEUES, "32")
