"""Hosts with another release than rank 0 are named when the world meets."""

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mimogrid.core.base.errors import WorldError
from mimogrid.shell.world.world import World


@pytest.mark.parametrize("theirs", ["mimogrid 0.1.0, torch 2.13.0", "mimogrid 0.0.9, torch 2.13.0"])
def test_another_release_is_told_from_another_job(theirs: str) -> None:
    """Before the plans are compared, which may well have the same digest."""
    ours = "mimogrid 0.1.0, torch 2.13.0"
    store, timeout = dist.HashStore(), datetime.timedelta(seconds=20)
    first, second = (World(rank, 2, store, timeout, range(2)) for rank in range(2))
    with ThreadPoolExecutor() as threads:
        met = threads.submit(first.agree_on, "digest", ours)
        if theirs == ours:
            second.agree_on("digest", theirs)
        else:
            with pytest.raises(WorldError, match=f"rank 1 on host .* runs {theirs}, rank 0 runs {ours}"):
                second.agree_on("digest", theirs)
        met.result()
