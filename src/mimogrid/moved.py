"""Modules that have moved. Importing one by its former name gives the module itself, and a DeprecationWarning.

Users' own files hold such names: imports in modules and sources, and functions in job files
(``mimogrid.shell.host:module``). So do the job files in checkpoints.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


INTO: Mapping[str, str] = {
    "core.base": "errors experts grid hashing samples zigzag",
    "core.faults": "stragglers",
    "core.job": "changes costs graph models optimizers spec",
    "core.pricing": "accelerators flops footprint",
    "core.program": "digest verify",
    "core.simulate": "breakdown lockstep measured memory timeline",
    "core.step": "routes seeds traffic",
    "core.topology": "groups roles",
    "core.update": "decision",
    "shell.checkpoint": "manifest saving state tensorfile versions",
    "shell.cli": "arguments commands export output start",
    "shell.device": "place streams",
    "shell.job": "builders costfile hf host jobfile jobs sources tables",
    "shell.modules": "loss packing weights",
    "shell.run": "evaluate log metrics parity pictures preload probe progress report train",
    "shell.runtime": "agreement collect data execute gradients hosting optimizer profiles session stage transport",
    "shell.world": "failure groups launch preemption",
}
"""Modules that moved from `core` or `shell` into a package and kept their names."""
RENAMED: Mapping[str, str] = {
    "core.blame": "core.faults.diagnosis",
    "core.engines": "core.job.layer_engines",
    "core.fold": "core.simulate.rank_classes",
    "core.gradients": "core.update.reductions",
    "core.layout": "core.job.placement",
    "core.legality": "core.job.validation",
    "core.limit": "core.simulate.lower_bound",
    "core.misfits": "core.pricing.unknown_names",
    "core.pace": "core.simulate.unevenness",
    "core.plan.menu": "core.plan.search_space",
    "core.plan.options": "core.plan.configs",
    "core.rates": "core.update.learning_rate",
    "core.schedule.lines": "core.schedule.issue_policy",
    "core.schedule.lower": "core.program.lower",
    "core.schedule.program": "core.program.listing",
    "core.schedule.replay": "core.program.replay",
    "core.settle": "core.schedule.layer_split",
    "core.shards": "core.update.buckets",
    "core.simulate.tracks": "core.simulate.rank_timelines",
    "core.steps": "core.step.step",
    "core.thin": "core.simulate.collapse",
    "shell.banner": "shell.cli.roles",
    "shell.faults": "shell.world.fault_injection",
    "shell.inspection": "shell.cli.inspect",
    "shell.ledger": "shell.megatron.weight_grad_store",
    "shell.planning": "shell.cli.plan",
    "shell.pulse": "shell.world.heartbeat",
    "shell.runs": "shell.run.folders",
    "shell.simulation": "shell.cli.simulate",
    "shell.step": "shell.runtime.rank",
    "shell.verdict": "shell.cli.verify",
}
"""Modules that have other names now; what is in a package moved with it."""
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "core.faults": ("core.faults.injection",),
    "core.topology": ("core.topology.topology", "core.topology.parse"),
    "shell.checkpoint": ("shell.checkpoint.files",),
    "shell.cli": ("shell.cli.main",),
    "shell.device": ("shell.device.device",),
    "shell.world": ("shell.world.world",),
}
"""Packages that have the name of a former module, and where its contents are now."""
FUNCTIONS = frozenset({"core.topology.parse", "shell.cli.main"})
"""Modules that have the name of a function of such a former module."""

_ROOT = "mimogrid."
_MOVED = {
    **{
        f"{package.partition('.')[0]}.{name}": f"{package}.{name}"
        for package, names in INTO.items()
        for name in names.split()
    },
    **RENAMED,
}


def current_name(module: str) -> str:
    """Return the name that a module has today.

    >>> current_name("mimogrid.shell.host"), current_name("mimogrid.core.legality.ranks"), current_name("torch")
    ('mimogrid.shell.job.host', 'mimogrid.core.job.validation.ranks', 'torch')
    """
    name = module.removeprefix(_ROOT)
    if name == module:
        return module
    parent, _, child = name.rpartition(".")
    found = _MOVED.get(name) or (f"{_MOVED[parent]}.{child}" if parent in _MOVED else name)
    return f"{_ROOT}{found}"


def current_path(path: str) -> str:
    """Return ``package.module:function`` with the name that the module has today."""
    module, colon, function = path.partition(":")
    return f"{current_name(module)}{colon}{function}"


class _Finder:
    """Finds modules by former names, before other finders load a second copy by the path of a moved package."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module by a former name, or of one that stands for a former module or function."""
        if not name.startswith(_ROOT):
            return None
        current, local = current_name(name), name.removeprefix(_ROOT)
        if current != name:
            _warn(f"{name} is {current} now")
            return ModuleSpec(name, _Alias(current))  # type: ignore[arg-type]
        if local in PACKAGES:
            return _and_then(PathFinder.find_spec(name, path, target), _forward_names)
        if local in FUNCTIONS:
            return _and_then(PathFinder.find_spec(name, path, target), _forward_calls)
        return None


class _Alias:
    """A loader that puts the module itself in the place of one that is imported by a former name."""

    # It does not derive from importlib.abc.Loader, which takes a tenth of a second to import.

    def __init__(self, current: str) -> None:
        self.current = current

    def create_module(self, _: ModuleSpec) -> None:
        """Let the import system make a module that is thrown away."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the module itself; an import returns what is in `sys.modules` afterwards."""
        sys.modules[module.__name__] = importlib.import_module(self.current)


class _Function(ModuleType):
    """A module that can be called, as the function of its name could be when it was imported from where this is."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        _warn(f"{self.__name__} is a module now, and the function {self.__name__}.{name}")
        return getattr(self, name)(*arguments, **named)


def _forward_calls(module: ModuleType) -> None:
    module.__class__ = _Function


def _forward_names(package: ModuleType) -> None:
    """Let a package have the names that a module had in its place."""

    def find(name: str) -> Any:
        is_module = PathFinder.find_spec(f"{package.__name__}.{name}", package.__path__) is not None
        for place in (
            () if name.startswith("_") or is_module else PACKAGES[package.__name__.removeprefix(_ROOT)]
        ):
            module = importlib.import_module(f"{_ROOT}{place}")
            if hasattr(module, name):
                _warn(f"{package.__name__}.{name} is {module.__name__}.{name} now")
                return getattr(module, name)
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")

    package.__getattr__ = find  # type: ignore[method-assign]


def _and_then(spec: ModuleSpec | None, then: Callable[[ModuleType], None]) -> ModuleSpec | None:
    """Let something follow when a module is loaded."""
    if spec is not None and spec.loader is not None:
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _warn(message: str) -> None:
    warnings.warn(f"{message}.", DeprecationWarning, stacklevel=3)


def install() -> None:
    """Make former names importable."""
    sys.meta_path.insert(0, _Finder())
