"""The environment: what a bug report needs, and what is missing for which commands.

Nothing of it fails: what cannot be found out is None, and a package that cannot be imported says why.
"""

import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import attrs

import mimogrid
from mimogrid.core.base.errors import Problem
from mimogrid.core.base.units import in_bytes
from mimogrid.shell.cli.arguments import EnvArgs
from mimogrid.shell.cli.output import print_json
from mimogrid.shell.device import machine
from mimogrid.shell.job import extras
from mimogrid.shell.world.secrets import without_secrets


PLANNING = ("attrs", "cattrs", "structlog", "rich", "tomlkit", "shtab")
PREFIXES = ("CUDA_", "GLOO_", "MASTER_", "MIMOGRID_", "NCCL_", "OMP_", "PYTORCH_", "SLURM_", "TORCH")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Variables of the environment that change what a run does."""


def run(args: EnvArgs) -> int:
    """Print the environment."""
    facts = environment()
    problems = list(lacks(facts))
    if args.json:
        print_json({**facts, "problems": [attrs.asdict(problem) for problem in problems]})
        return 0
    for name, of in facts.items():
        print(name)
        for key, value in of.items():
            print(f"    {key:20} {_shown(key, value)}")
    for problem in problems:
        print(problem)
    return 0


def environment() -> dict[str, dict[str, Any]]:
    """Return what is there, by kind."""
    packages = dict.fromkeys((*PLANNING, *(name for extra in extras.EXTRAS.values() for name in extra)))
    names = {*NAMES, *(name for name in os.environ if name.startswith(PREFIXES))} & set(os.environ)
    return {
        "mimogrid": {
            "version": mimogrid.__version__,
            "folder": os.path.dirname(mimogrid.__file__),
            "python": f"{platform.python_version()} ({sys.executable})",
        },
        "machine": {
            "system": platform.platform(),
            "processor": machine.processor(),
            "cores": machine.cores(),
            "memory_bytes": machine.available_bytes(),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        },
        "packages": {package: _version(package) for package in packages},
        "torch": _torch(),
        "variables": {name: without_secrets(os.environ[name]) for name in sorted(names)},
    }


def lacks(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield what is missing, and how to get it."""
    commands = {
        "train": "train, parity, probe, export",
        "hf": "parity --reference transformers",
        "data": "data",
    }
    for extra, used_by in commands.items():
        if lacking := extras.missing(extra):
            yield extras.lack(used_by, lacking, extra)
    if facts["torch"].get("devices") and (lacking := extras.missing("gpu")):
        yield extras.lack("fp8, and the fastest layers on these GPUs", lacking, "gpu")
    if "error" in facts["torch"]:
        yield Problem("torch", f"cannot be imported: {facts['torch']['error']}.", "Install it again.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """Return what torch can use here."""
    if not extras.is_installed("torch"):
        return {}
    try:
        import torch  # noqa: PLC0415 -- slow, and may be missing
        import torch.distributed as dist  # noqa: PLC0415
    except Exception as error:  # a library that does not fit the system may raise anything
        return {"error": str(error)}
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cuda": torch.version.cuda,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if there and dist.is_nccl_available() else None,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "devices": [_device(torch.cuda.get_device_properties(index)) for index in range(there)],
    }


def _device(properties: Any) -> str:
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {in_bytes(properties.total_memory)}, capability {capability}"


def _shown(key: str, value: Any) -> str:
    """Return a fact for people."""
    if value is None or value == []:
        return "none"
    if key.endswith("_bytes"):
        return f"{in_bytes(value)} available"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
