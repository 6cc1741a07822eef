"""Former names that users' files may hold. An import by one gives what it named, and a DeprecationWarning.

Sources and modules of a user import some of them, job files name functions in them
(``mimogrid.shell.host:module``), and checkpoints keep such job files.
"""

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


FORMER: Mapping[str, str] = {
    "mimogrid.core.costs": "mimogrid.core.job.costs",
    "mimogrid.core.errors": "mimogrid.core.base.errors",
    "mimogrid.core.experts": "mimogrid.core.base.experts",
    "mimogrid.core.graph": "mimogrid.core.job.graph",
    "mimogrid.core.grid": "mimogrid.core.base.grid",
    "mimogrid.core.hashing": "mimogrid.core.base.hashing",
    "mimogrid.core.roles": "mimogrid.core.topology.roles",
    "mimogrid.core.routes": "mimogrid.core.step.routes",
    "mimogrid.core.samples": "mimogrid.core.base.samples",
    "mimogrid.core.schedule.program": "mimogrid.core.program.listing",
    "mimogrid.core.spec": "mimogrid.core.job.spec",
    "mimogrid.core.steps": "mimogrid.core.step.step",
    "mimogrid.core.verify": "mimogrid.core.program.verify",
    "mimogrid.core.zigzag": "mimogrid.core.base.zigzag",
    "mimogrid.shell.host": "mimogrid.shell.job.host",
    "mimogrid.shell.jobfile": "mimogrid.shell.job.jobfile",
    "mimogrid.shell.jobs": "mimogrid.shell.job.jobs",
    "mimogrid.shell.sources": "mimogrid.shell.job.sources.source",
}

PACKAGES: Mapping[str, str] = {
    "mimogrid.core.models": "mimogrid.core.job.models",
    "mimogrid.core.topology": "mimogrid.core.topology.topology",
    "mimogrid.shell.job.sources": "mimogrid.shell.job.sources.source",
}
"""Packages that were modules, each with the module that has its names now."""


def current_path(path: str) -> str:
    """Return ``package.module:function`` with the name that the module has now.

    >>> current_path("mimogrid.shell.host:module"), current_path("zoo.ears:listen")
    ('mimogrid.shell.job.host:module', 'zoo.ears:listen')
    """
    module, colon, function = path.partition(":")
    return f"{FORMER.get(module, module)}{colon}{function}"


class _Finder:
    """Finds modules by their former names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module by its former name, or of a package that was a module."""
        if name in PACKAGES:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.origin is not None:
                spec.loader = _Package(name, spec.origin)
            return spec
        current = FORMER.get(name)
        if current is None:
            return None
        warnings.warn(f"{name} is {current} now", DeprecationWarning, stacklevel=2)
        return ModuleSpec(name, _Alias(current))  # type: ignore[arg-type]


class _Alias:
    """A loader that gives an import of a former name the module itself."""

    # importlib.abc.Loader is no base of it, because that takes a tenth of a second to import.

    def __init__(self, current: str) -> None:
        self.current = current

    def create_module(self, _: ModuleSpec) -> None:
        """Let the import system make a module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module itself into `sys.modules`, where an import finds its result."""
        sys.modules[module.__name__] = importlib.import_module(self.current)


class _Package(SourceFileLoader):
    """A loader of a package that still gives the names of the module that it was."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the file of the package, and let it look for names where they are now."""
        super().exec_module(module)

        def former(name: str) -> object:
            current = PACKAGES[module.__name__]
            if name.startswith("__") or PathFinder.find_spec(f"{module.__name__}.{name}", module.__path__):
                raise AttributeError(name)  # a file of the package, which the import system imports
            found = getattr(importlib.import_module(current), name)
            warnings.warn(
                f"{module.__name__}.{name} is {current}.{name} now", DeprecationWarning, stacklevel=2
            )
            return found

        module.__dict__["__getattr__"] = former


def install() -> None:
    """Let imports find modules and names by their former names."""
    sys.meta_path.insert(0, _Finder())
