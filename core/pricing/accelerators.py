"""Accelerators: the peaks of GPUs by name, from the datasheets of their makers.

Peak operations are for dense matrix products in a precision, without sparsity; fp32 is plain fp32, as tf32 is off here.
Bandwidths are bytes per second in one direction of one GPU. For links, datasheets add both directions up, so these are
half of their numbers. No datasheet has latencies: these are common times of messages of a few bytes, over a link of the
node and over a network adapter. `per_node` is how many GPUs the maker's usual server has.

>>> ACCELERATORS["h100"].flops["bf16"] / 1e12, ACCELERATORS["h100"].memory_bytes / 1e9
(989.4, 80.0)
"""

from collections.abc import Mapping

import attrs


@attrs.frozen
class Source:
    """Where the numbers of an accelerator come from, number by number."""

    flops: str
    memory: str
    link: str
    network: str


@attrs.frozen(kw_only=True)
class Accelerator:
    """One GPU in its usual server."""

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    per_node: int
    source: Source
    link_latency_s: float = 5e-6
    network_latency_s: float = 1e-5


def _peaks(**tera: float) -> Mapping[str, float]:
    return {precision: value * 1e12 for precision, value in tera.items()}


def _of(sheet: str, *, link: str, network: str) -> Source:
    """Return sources of which peaks and memory are in one data sheet."""
    return Source(flops=sheet, memory=sheet, link=f"{sheet}: {link}", network=network)


_HOPPER = _peaks(fp64=67.0, fp32=67.0, bf16=989.4, fp16=989.4, fp8=1978.9)
_AMPERE = _peaks(fp64=19.5, fp32=19.5, bf16=312.0, fp16=312.0)
_NVLINK_4, _NVLINK_5 = "NVLink 900 GB/s both ways", "NVLink 1.8 TB/s both ways"
_ADAPTER = "one 400 Gb/s adapter per GPU"

_ALL = (
    Accelerator(
        name="h100",
        flops=_HOPPER,
        memory_bytes=80e9,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        per_node=8,
        source=_of("NVIDIA H100 datasheet, SXM5", link=_NVLINK_4, network=f"DGX H100 datasheet: {_ADAPTER}"),
    ),
    Accelerator(
        name="h200",
        flops=_HOPPER,
        memory_bytes=141e9,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        per_node=8,
        source=_of("NVIDIA H200 datasheet, SXM", link=_NVLINK_4, network=f"DGX H200 datasheet: {_ADAPTER}"),
    ),
    Accelerator(
        name="b200",
        flops=_peaks(fp64=40.0, fp32=80.0, bf16=2250.0, fp16=2250.0, fp8=4500.0),
        memory_bytes=180e9,
        memory_bytes_per_s=8e12,
        link_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
        per_node=8,
        source=_of(
            "NVIDIA DGX B200 and HGX datasheets, an eighth of the node; fp32 and fp64 of a GPU with 1,000 W",
            link=_NVLINK_5,
            network=f"DGX B200 datasheet: {_ADAPTER}",
        ),
    ),
    Accelerator(
        name="gb200",
        flops=_peaks(fp64=45.0, fp32=90.0, bf16=2500.0, fp16=2500.0, fp8=5000.0),
        memory_bytes=186e9,
        memory_bytes_per_s=8e12,
        link_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
        per_node=72,
        source=_of(
            "NVIDIA GB200 NVL72 datasheet, a 72nd of the rack; fp32 and fp64 of a GPU with 1,200 W",
            link=_NVLINK_5,
            network=f"assumed: {_ADAPTER}",
        ),
    ),
    Accelerator(
        name="a100",
        flops=_AMPERE,
        memory_bytes=80e9,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
        per_node=8,
        source=_of(
            "NVIDIA A100 datasheet, 80 GB SXM4",
            link="NVLink 600 GB/s both ways",
            network="DGX A100 datasheet: one 200 Gb/s adapter per GPU",
        ),
    ),
    Accelerator(
        name="a100-40gb",
        flops=_AMPERE,
        memory_bytes=40e9,
        memory_bytes_per_s=1.555e12,
        link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
        per_node=8,
        source=_of(
            "NVIDIA A100 datasheet, 40 GB SXM4",
            link="NVLink 600 GB/s both ways",
            network="DGX A100 datasheet: one 200 Gb/s adapter per GPU",
        ),
    ),
    Accelerator(
        name="l40s",
        flops=_peaks(fp64=1.43, fp32=91.6, bf16=362.05, fp16=362.05, fp8=733.0),
        memory_bytes=48e9,
        memory_bytes_per_s=864e9,
        link_bytes_per_s=32e9,
        network_bytes_per_s=12.5e9,
        per_node=8,
        source=_of(
            "NVIDIA L40S datasheet",
            link="PCIe 4.0 x16, 64 GB/s both ways, no NVLink",
            network="assumed: 100 Gb/s per GPU",
        ),
    ),
    Accelerator(
        name="mi300x",
        flops=_peaks(fp64=163.4, fp32=163.4, bf16=1307.4, fp16=1307.4, fp8=2614.9),
        memory_bytes=192e9,
        memory_bytes_per_s=5.3e12,
        link_bytes_per_s=448e9,
        network_bytes_per_s=50e9,
        per_node=8,
        source=_of(
            "AMD Instinct MI300X datasheet",
            link="7 Infinity Fabric links of 128 GB/s both ways",
            network=f"assumed: {_ADAPTER}",
        ),
    ),
)

ACCELERATORS: Mapping[str, Accelerator] = {accelerator.name: accelerator for accelerator in _ALL}
"""Every accelerator that is known, by name."""
