"""Versions: what computed something, as reports and checkpoints record it: the software, and the kind of machine.

A resumed run is bitwise the one that never stopped only with the same software on the same kind of machine: other CPUs
run other kernels, which round differently.
"""

import importlib.metadata
import platform
from collections.abc import Mapping

import torch

from mimogrid.shell.device.machine import processor


def versions() -> dict[str, str]:
    """Return the versions of the software that a run computes with, by name.

    A package can be importable without being installed: mimogrid in a checkout, on the path of Python.
    """
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("mimogrid", "torch", "megatron-core")
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: torch.device) -> dict[str, str]:
    """Return the kind of machine that computes, and the kernels that torch chooses on its CPU."""
    name = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": device.type,
        "processor": name,
        "architecture": platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def differences(facts: Mapping[str, Mapping[str, str]], device: torch.device) -> list[str]:
    """Return how this machine and its torch differ from those that wrote a manifest; old ones name no machine."""
    now = machine(device) | {"torch": versions()["torch"]}
    written = {**facts.get("machine", {}), "torch": facts.get("versions", {}).get("torch", now["torch"])}
    return [
        f"{key} {now[key]} instead of {written[key]}" for key in now if written.get(key, now[key]) != now[key]
    ]
