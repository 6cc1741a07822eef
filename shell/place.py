"""Places: where this process stands in its world, and how it finds the others."""

import os

import attrs


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
