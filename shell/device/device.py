"""The device: chosen once per process, and named nowhere else.

Under a launcher it is `cuda` with NCCL if there is a GPU, else `cpu` with gloo. A world of local processes is on the
CPU. With the transport `host` ranks compute on CUDA and send through host memory with gloo, so many ranks can share a
GPU. With `nccl` each process of a local world gets a GPU of its own.
"""

import os
import resource

import attrs
import torch

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.device.machine import processor
from mimogrid.shell.device.place import QUEUES, RankPlace
from mimogrid.shell.device.streams import CudaStreams, Streams


DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


SHARES_KEPT = 16
"""How many index tensors of recent shares a cache keeps on the device: shares of ragged samples seldom repeat."""


@attrs.frozen
class Device:
    """Where tensors are, what carries them between ranks, and in which order the device works.

    Attributes:
        torch: the device of tensors.
        backend: the backend of process groups.
        streams: the order of the device's work.
        stages_through_host: whether messages leave the device through host memory.
        is_asynchronous: whether the device works after the call that asks for it has returned.
        has_tags: whether the backend keeps messages apart that share a group.
        connects_lazily: whether the backend connects a group when it is first used.
    """

    torch: torch.device
    backend: str
    streams: Streams = attrs.field(eq=False)
    stages_through_host: bool = False
    is_asynchronous: bool = False
    has_tags: bool = True
    connects_lazily: bool = False

    def finish(self) -> None:
        """Wait until the device has done all of its work."""
        if self.is_asynchronous:
            torch.cuda.synchronize(self.torch)

    @property
    def name(self) -> str:
        """The name that the driver, or the system, gives the device."""
        return processor() if self.torch.type == "cpu" else torch.cuda.get_device_name(self.torch)

    @property
    def memory_bytes(self) -> int | None:
        """The memory of a device of its own; None where tensors are in the memory of the host."""
        return None if self.torch.type == "cpu" else torch.cuda.get_device_properties(self.torch).total_memory

    def peak_bytes(self) -> int:
        """Return the most memory that tensors took on the device so far; on a CPU, that the process took."""
        if self.torch.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return torch.cuda.max_memory_allocated(self.torch)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a host tensor on a device; the host does not wait for it.

    CUDA copies without the host only from pinned memory. A copy from other memory may block the host until the device
    has come to it. Torch reuses pinned memory when the copy is over.
    """
    if device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def of(where: torch.device, *, transport: str | None = None) -> Device:
    """Return a device as the job sees it; `transport="host"` means gloo beside CUDA.

    Raises PlanError where all streams of NCCL would share one queue.
    """
    if where.type == "cpu":
        return Device(where, "gloo", Streams())
    through_host = transport == "host"
    if not through_host:
        _check_queues()
    return Device(
        where,
        "gloo" if through_host else "nccl",
        CudaStreams(where),
        stages_through_host=through_host,
        is_asynchronous=True,
        has_tags=through_host,
        connects_lazily=not through_host,
    )


def _check_queues() -> None:
    """Refuse one queue: receives are posted ahead, and computing must not wait behind one whose sender waits for it."""
    if os.environ.get(QUEUES) == "1":
        fact = "is 1: all streams of CUDA share one queue, in which a receive that is posted ahead stops computing."
        remedy = "Set it to 32, or leave it out, before anything uses CUDA."
        raise PlanError([Problem(f"environment.{QUEUES}", fact, remedy)])


def choose(place: RankPlace, transport: str | None = None) -> Device:
    """Return this process's device for a transport: "host", "nccl", or None for the default of the world.

    Raises PlanError where NCCL is asked for more ranks of a host than it has GPUs.
    """
    is_local = place.meeting is not None
    if is_local and transport is None:
        return of(torch.device("cpu"))
    assert not torch.cuda._is_in_bad_fork(), "a local world on CUDA needs a pool that may use it"
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there and transport != "nccl":
        return of(torch.device("cpu"))
    if transport == "nccl" and place.local_rank >= there:
        fact = f"gives each rank a GPU of its own; this host has {there}, and a rank {place.local_rank}."
        raise PlanError([Problem("--transport nccl", fact, "Start fewer ranks, or use --transport host.")])
    device = torch.device("cuda", place.local_rank % there)
    torch.cuda.set_device(device)
    return of(device, transport=transport)
