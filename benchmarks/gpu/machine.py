"""Machine: on what, and with which versions, something was measured."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from mimogrid.shell.device.place import RankPlace


PACKAGES = ("torch", "megatron-core", "transformer-engine")


def facts(_: RankPlace, on_gpu: bool) -> dict[str, Any]:
    """Return machine and versions, by name; None is what is not there, or not known."""
    there = on_gpu and torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(0) if there else None
    return {
        "device": gpu.name if gpu else None if on_gpu else f"CPU, {platform.machine()}",
        "device_bytes": gpu.total_memory if gpu else None,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package.replace("-", "_"): version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "commit": said_by("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }


def version(package: str) -> str | None:
    """Return the version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said_by(program: str, *arguments: str) -> str | None:
    """Return what a program says, asked in this folder."""
    if shutil.which(program) is None:
        return None
    asked = subprocess.run(
        [program, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None
