"""Throughput: what a run reaches in its steady state, and the share of it that ranks wait.

Steps are *measured* one by one, and measurements add up: of the last steps, of a whole run. The first step of a run is
left out of a sum as soon as there are others, because caches fill and kernels are chosen in it.

A rank waits while it computes nothing: in the bubble of the pipeline, for messages, for data. Of the last, the share is
known by itself: that of data that was not there when a forward read it (`[data] workers`). Model FLOPs are those of
the samples that the step really had, without padding and recomputation (`core.pricing.flops`); of them a GPU could do
so many a second (`peak_flops`), and the share that it does is the model FLOPs utilization, MFU.

>>> measured = Measured(steps=2, seconds=4.0, samples=64, tokens=800, flops=6e12, busy_s=3.0, data_s=1.0, of_s=8.0)
>>> found = throughput(measured, active=2, allocated=4, peak=1e12)
>>> found.step_s, found.tokens_per_s, found.tokens_per_s_per_gpu, found.mfu, found.waiting, found.waiting_for_data
(2.0, 200.0, 50.0, 0.375, 0.625, 0.125)
"""

from collections.abc import Mapping

import attrs

from mimogrid.core.pricing.accelerators import ACCELERATORS
from mimogrid.core.topology.topology import Topology


DEVICES: Mapping[str, str] = {
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "NVIDIA B200": "b200",
    "A100-SXM4-80GB": "a100",
    "A100-PCIE-80GB": "a100",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-PCIE-40GB": "a100-40gb",
    "L40S": "l40s",
    "MI300X": "mi300x",
}
"""Part of the name that a driver gives a device, and the accelerator that it is. Other H100s have other peaks."""


@attrs.frozen(kw_only=True)
class Measured:
    """What steps took.

    Attributes:
        steps: how many there were.
        seconds: from the end of the step before to the end of each.
        samples, tokens, flops: what was in them; FLOPs of the model alone.
        encoder_flops: those of its encoders.
        busy_s: seconds that ranks computed, added over ranks.
        data_s: seconds that they waited for data, likewise.
        of_s: the seconds of ranks that these are a part of.
    """

    steps: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    encoder_flops: float = 0.0
    busy_s: float = 0.0
    data_s: float = 0.0
    of_s: float = 0.0

    def __add__(self, other: "Measured") -> "Measured":
        mine, others = attrs.astuple(self), attrs.astuple(other)
        names = attrs.fields_dict(Measured)
        return Measured(**{name: a + b for name, a, b in zip(names, mine, others, strict=True)})


@attrs.frozen(kw_only=True)
class Throughput:
    """What is reached in a second; None where it is not known.

    Attributes:
        step_s: the mean time of a step.
        samples_per_s, tokens_per_s: of the whole job.
        tokens_per_s_per_gpu: for each allocated rank, idle ones included.
        tokens_per_s_per_active_gpu: for each rank that hosts a module.
        flops_per_s_per_gpu: model FLOPs for each allocated rank; modules of the user's count as none.
        mfu: these as a share of the device's peak.
        encoder_share: the share of model FLOPs that encoders have.
        waiting: the share of time in which ranks that host a module compute nothing.
        waiting_for_data: the share of time, a part of this, in which they wait for what they read from the source.
    """

    step_s: float
    samples_per_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_active_gpu: float
    flops_per_s_per_gpu: float
    mfu: float | None
    encoder_share: float | None
    waiting: float | None
    waiting_for_data: float | None


def throughput(measured: Measured, *, active: int, allocated: int, peak: float | None) -> Throughput | None:
    """Return what steps reached on so many ranks; `peak`: FLOPs a second of a device. None without steps."""
    if not measured.steps or not measured.seconds:
        return None
    tokens_per_s = measured.tokens / measured.seconds
    flops_per_s = measured.flops / measured.seconds / allocated
    return Throughput(
        step_s=measured.seconds / measured.steps,
        samples_per_s=measured.samples / measured.seconds,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / allocated,
        tokens_per_s_per_active_gpu=tokens_per_s / active,
        flops_per_s_per_gpu=flops_per_s,
        mfu=flops_per_s / peak if peak else None,
        encoder_share=measured.encoder_flops / measured.flops if measured.flops else None,
        waiting=1 - measured.busy_s / measured.of_s if measured.of_s else None,
        waiting_for_data=measured.data_s / measured.of_s if measured.of_s else None,
    )


def is_encoder(topology: Topology, module: str) -> bool:
    """Whether a module makes rows for another, and is no language model."""
    return bool(topology.modules[module].outputs) and module not in topology.graph.texts


def peak_flops(device: str, precision: str) -> float | None:
    """Return the peak of a device by its driver's name; None for devices that nobody has looked up.

    >>> peak_flops("NVIDIA H200", "bf16"), peak_flops("NVIDIA H100 PCIe", "bf16"), peak_flops("AMD EPYC", "fp32")
    (989400000000000.0, None, None)
    """
    names = [name for part, name in DEVICES.items() if part in device]
    return ACCELERATORS[names[0]].flops.get(precision) if names else None
