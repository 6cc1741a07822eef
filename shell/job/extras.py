"""Extras: the packages that some commands need beyond those of planning, and how to get them.

An extra of the package is a list of requirements in its metadata. Here stands by what name Python imports each.
"""

import importlib.util
from collections.abc import Iterable, Mapping

from mimogrid.core.base.errors import PlanError, Problem


TRAIN: Mapping[str, str] = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "einops": "einops",
    "psutil": "psutil",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
}
HF: Mapping[str, str] = {"transformers": "transformers"}
DATA: Mapping[str, str] = {
    "transformers": "transformers",
    "jinja2": "jinja2",
    "pillow": "PIL",
    "pyarrow": "pyarrow",
}
RAY: Mapping[str, str] = {"ray": "ray"}
GPU: Mapping[str, str] = {"transformer-engine": "transformer_engine"}
TRACKERS: Mapping[str, str] = {name: name for name in ("trackio", "wandb", "mlflow")}
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "train": TRAIN,
    "hf": HF,
    "data": DATA,
    "ray": RAY,
    "gpu": GPU,
    **{extra: {extra: name} for extra, name in TRACKERS.items()},
}
"""By extra the import names of its packages."""


def is_installed(name: str) -> bool:
    """Return whether Python finds a module; nothing but its parent packages runs."""
    top, _, inner = name.partition(".")
    try:
        return importlib.util.find_spec(top) is not None and (
            not inner or importlib.util.find_spec(name) is not None
        )
    except (ImportError, ValueError):
        return False


def missing(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed."""
    return [package for package, name in EXTRAS[extra].items() if not is_installed(name)]


def remedy(extra: str) -> str:
    """Return how to get an extra."""
    return f"pip install 'mimogrid[{extra}]'"


def require(extra: str, command: str) -> None:
    """Raise PlanError where a command lacks packages of an extra."""
    if lacking := missing(extra):
        raise PlanError([lack(command, lacking, extra)])


def lack(where: str, packages: Iterable[str], extra: str) -> Problem:
    """Return the problem that packages are not installed."""
    named = list(packages)
    verb = "is" if len(named) == 1 else "are"
    return Problem(where, f"needs {', '.join(named)}, which {verb} not installed.", f"{remedy(extra)}")
