"""Builders: finds functions of the user's own, ``package.module:function``, without running their package.

`permission` says which functions a job may name. The search asks Python's import system folder by folder, and reads
the file as text. So a job with user modules can be checked on a machine without torch. The file itself runs only if
that does not import torch: its top level must not import it, and an import of torch further down is stopped.
"""

import ast
import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.base.text import printable
from mimogrid.former_names import current_path
from mimogrid.shell.job.permission import check_permission


TORCH = frozenset({"torch", "torchvision", "torchaudio", "megatron", "transformer_engine"})
"""Packages that are torch, or import it."""


class PlanWarning(UserWarning):
    """Something that the plan cannot know, and does without."""

    def __str__(self) -> str:
        return printable(super().__str__())


class NeedsTorch(Exception):  # noqa: N818 -- a fact about a file, not an error
    """A file runs with torch only, and torch is not to be loaded here."""


@attrs.frozen
class FoundFunction:
    """A function of the user's own that was found but not run.

    Attributes:
        path: ``package.module:function``.
        spec: The module's spec in Python's import system.
        names: The names that the file defines or imports at its top level; None if reading does not show them.
        imported: Those of the names that it imports.
        imports: The packages that its top level imports.
        where: The place in the job that names the function.
    """

    path: str
    spec: importlib.machinery.ModuleSpec
    names: frozenset[str] | None
    imported: frozenset[str]
    imports: frozenset[str]
    where: str

    @property
    def module(self) -> str:
        """The name of the Python module."""
        return self.path.partition(":")[0]

    @property
    def function(self) -> str:
        """The name of the function in it."""
        return self.path.partition(":")[2]

    @property
    def is_ours(self) -> bool:
        """Whether it is one of mimogrid's own."""
        return self.module.startswith("mimogrid.")

    @property
    def describes(self) -> bool:
        """Whether a `describe` may stand beside it."""
        return self.names is None or "describe" in self.names

    @property
    def torch_free(self) -> bool:
        """Whether its top level imports no torch."""
        return not self.imports & TORCH

    def load(self) -> Any:
        """Import the module with its packages, and return the function."""
        return self.function_in(importlib.import_module(self.module))

    def function_in(self, module: ModuleType) -> Any:
        """Return the function of the module once it has run.

        Raises PlanError where the module has it from elsewhere, from a place whose functions a job may not name.
        """
        function = getattr(module, self.function)
        home = getattr(function, "__module__", None) or self.module
        if (self.names is None or self.function in self.imported) and home != self.module:
            check_permission(_spec_of(home, self.where, self.path), self.path, self.where)
        return function

    def run_alone(self) -> ModuleType:
        """Run the file without its packages and without torch, and return it. Raises NeedsTorch if that fails.

        If torch is loaded already, the module is imported as usual.
        """
        if "torch" in sys.modules:
            return importlib.import_module(self.module)
        if not self.torch_free or self.spec.loader is None:
            raise NeedsTorch(f"{self.module} imports torch")
        module = importlib.util.module_from_spec(self.spec)
        with _without_torch(), _registered(module):
            self.spec.loader.exec_module(module)
        return module

    def describe(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the file's ``describe(options)`` returns; {} if there is no such function.

        Raises NeedsTorch if the file does not run without torch.
        """
        if not self.describes:
            return {}
        describe = getattr(self.run_alone(), "describe", None)
        described = describe(dict(options)) if describe else {}
        if not isinstance(described, Mapping):
            raise TypeError(f"describe returned {described!r}, not a mapping")
        return described


def find(path: str, *, where: str) -> FoundFunction:
    """Find ``package.module:function``. Raises PlanError with the place `where` if it is not there."""
    path = current_path(path)
    module, _, function = path.partition(":")
    spec = _spec_of(module, where, path)
    check_permission(spec, path, where)
    source = _source_of(spec)
    if source is None:
        return FoundFunction(path, spec, None, frozenset(), frozenset(), where)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the parser's own limits, too
        fact = f"{error.msg} (line {error.lineno})" if isinstance(error, SyntaxError) else str(error)
        message = f"'{path}': {spec.origin} is not Python: {fact}."
        raise PlanError([Problem(where, message, "Correct the file.")]) from None
    names, imports = _names(tree.body), frozenset(_imports(tree.body))
    found = FoundFunction(path, spec, names, _imported(tree.body), imports, where)
    if names is not None and function not in names:
        callables = sorted(name for name in names if not name.startswith("_"))
        remedy = nearest(function, callables) if callables else f"Define {function} there."
        message = f"'{path}': there is no '{function}' in {spec.origin}."
        raise PlanError([Problem(where, message, remedy)])
    return found


# -- finding -----------------------------------------------------------------------------------------------


def _spec_of(module: str, where: str, path: str) -> importlib.machinery.ModuleSpec:
    """Find a module through its packages, without importing them. Raises PlanError."""
    parts = module.split(".")
    importlib.invalidate_caches()
    spec = _top_spec(parts[0])
    for depth, part in enumerate(parts[1:], start=1):
        if spec is None or spec.submodule_search_locations is None:
            break
        name, folders = ".".join(parts[: depth + 1]), list(spec.submodule_search_locations)
        inner = importlib.machinery.PathFinder.find_spec(name, folders)
        if inner is None:
            remedy = nearest(part, _modules_in(folders)) if _modules_in(folders) else "Check the name."
            message = f"'{path}' cannot be imported: package {'.'.join(parts[:depth])} has no '{part}'."
            raise PlanError([Problem(where, message, remedy)])
        spec = inner
    if spec is None:
        message = f"'{path}' cannot be imported: there is no module '{parts[0]}'."
        remedy = "Install it, or run mimogrid in the folder that holds it; the job file's folder also counts."
        raise PlanError([Problem(where, message, remedy)])
    if spec.name != module:
        message = f"'{path}' cannot be imported: {spec.name} is a module, not a package."
        raise PlanError([Problem(where, message, f"Name '{spec.name}:function'.")])
    return spec


def _top_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        with warnings.catch_warnings():  # finders of installed packages may warn of themselves
            warnings.simplefilter("ignore")
            return importlib.util.find_spec(name)
    except ValueError:  # a module that runs without a spec, such as __main__
        return importlib.machinery.PathFinder.find_spec(name)


def _modules_in(folders: Sequence[str]) -> list[str]:
    entries = [entry for folder in folders if Path(folder).is_dir() for entry in Path(folder).iterdir()]
    return sorted({e.stem for e in entries if e.suffix == ".py" or (e.is_dir() and e.stem.isidentifier())})


def _source_of(spec: importlib.machinery.ModuleSpec) -> str | None:
    read = getattr(spec.loader, "get_source", None)
    try:
        text = read(spec.name) if read else None
    except (ImportError, SyntaxError):  # It cannot be decoded; Python's own error explains that better.
        return None
    return text if isinstance(text, str) else None


# -- reading a file as text --------------------------------------------------------------------------------


def _names(body: Sequence[ast.stmt]) -> frozenset[str] | None:
    """Return the names that a top level defines; None if reading does not show all of them."""
    names: set[str] = set()
    for node in _flat(body):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name.partition(".")[0] for alias in aliases}
            case ast.Assign(targets=targets):
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case _:
                pass
    return None if names & {"*", "__getattr__"} else frozenset(names)


def _imported(body: Sequence[ast.stmt]) -> frozenset[str]:
    """The names that a top level imports."""
    nodes = (node for node in _flat(body) if isinstance(node, ast.Import | ast.ImportFrom))
    return frozenset(a.asname or a.name.partition(".")[0] for node in nodes for a in node.names)


def _imports(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the top-level packages that a top level imports."""
    for node in _flat(body):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name.partition(".")[0] for alias in aliases)
            case ast.ImportFrom(module=str(name), level=0):
                yield name.partition(".")[0]
            case ast.ClassDef(body=inner):
                yield from _imports(inner)
            case _:
                pass


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield all statements of a top level, also under if, try and with, but not those for type checkers only."""
    for node in body:
        yield node
        match node:
            case ast.If(test=test, body=inner, orelse=others):
                checking = ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
                yield from _flat(others if checking else [*inner, *others])
            case ast.Try(body=inner, handlers=handlers, orelse=others, finalbody=last):
                caught = [statement for handler in handlers for statement in handler.body]
                yield from _flat([*inner, *caught, *others, *last])
            case ast.With(body=inner):
                yield from _flat(inner)
            case _:
                pass


# -- running a file without torch --------------------------------------------------------------------------


class _Barrier:
    """A finder that stops every import of torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in TORCH:
            raise NeedsTorch(f"running it imports {name}")


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    barrier = _Barrier()
    sys.meta_path.insert(0, barrier)
    try:
        yield
    finally:
        sys.meta_path.remove(barrier)


@contextlib.contextmanager
def _registered(module: ModuleType) -> Iterator[None]:
    """Register a module by name while it runs, because dataclasses look themselves up."""
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before
