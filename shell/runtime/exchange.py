"""Exchange: what the ranks of a job give each other outside of the messages of a step."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mimogrid.shell.runtime.rank import RankRuntime


T = TypeVar("T")


def gather_values(runtime: RankRuntime, values: torch.Tensor) -> torch.Tensor:
    """Gather a vector of each rank that hosts a module into [ranks, values], the same on every rank."""
    every = [torch.empty_like(values) for _ in runtime.topology.ranks]
    runtime.heartbeat.wait_for_others()
    dist.all_gather(every, values, group=runtime.group)
    return torch.stack(every)


def gather_objects(runtime: RankRuntime, value: T) -> list[T]:
    """Gather a value of every rank on the first rank of the job; the others get nothing."""
    group = runtime.group
    every: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, every, group=group, group_dst=0)
    return every or []


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory with storage of its own: a view pickles all of the storage that it is a part of."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
