"""The device: chosen once per process, and named nowhere else.

Under a launcher `cuda` with NCCL where a GPU is there, else `cpu` with gloo; a world of local processes is on
the CPU. The third choice, `host`, computes on CUDA and sends through host memory with gloo, so that many ranks
can share one GPU in a rehearsal.
"""

import attrs
import torch

from mimogrid.shell.place import Place


DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@attrs.frozen
class Device:
    """Where tensors live, and what carries them between ranks."""

    torch: torch.device
    backend: str

    @property
    def stages_through_host(self) -> bool:
        """Whether messages leave the device through host memory."""
        return self.torch.type == "cuda" and self.backend == "gloo"

    @property
    def is_asynchronous(self) -> bool:
        """Whether what is asked of the device is done later than the asking returns."""
        return self.torch.type == "cuda"

    def finish(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.is_asynchronous:
            torch.cuda.synchronize(self.torch)


def choose(place: Place, transport: str | None = None) -> Device:
    """Return this process's device; `transport="host"` asks for gloo beside CUDA."""
    is_local = place.meeting is not None
    if not torch.cuda.is_available() or (is_local and transport != "host"):
        return Device(torch.device("cpu"), "gloo")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return Device(device, "gloo" if transport == "host" else "nccl")
