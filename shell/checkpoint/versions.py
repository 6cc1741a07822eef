"""Versions: with what something was computed, as reports and checkpoints say it."""

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Return the versions of what a run computes with, by name.

    A package may be there and not installed: mimogrid in a checkout, on the path of Python.
    """
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("mimogrid", "torch", "megatron-core")
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
