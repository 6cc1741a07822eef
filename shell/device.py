"""The device: chosen once per process, and named nowhere else.

`cuda` with NCCL where a GPU is there, else `cpu` with gloo. The third choice, `host`, computes on CUDA and
sends through pinned host memory with gloo, so that many ranks can share one GPU in a rehearsal.
"""

import attrs
import torch


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


def choose(*, local_rank: int, transport: str | None = None) -> Device:
    """Return this process's device; `transport="host"` asks for gloo beside CUDA."""
    if not torch.cuda.is_available():
        return Device(torch.device("cpu"), "gloo")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return Device(device, "gloo" if transport == "host" else "nccl")
