"""Permission: which functions a job file may name.

A job file is data, and may be anybody's: no line of it runs code that its reader has not put there. A job names
functions in files under its own folder or the current one, in modules that an installed distribution offers by an entry
point of `GROUPS`, and those of mimogrid that are made for it. Where a file is decides, not what it is called: links are
followed, and what is installed is under no folder of a job, even if the environment is.

    [project.entry-points."mimogrid.models"]
    zoo = "zoo.ears"                              # "zoo" alone: every module of the package
"""

import contextlib
import site
import sys
import sysconfig
from importlib.machinery import ModuleSpec
from pathlib import Path

from mimogrid.core.base.errors import PlanError, Problem


GROUPS = ("mimogrid.models", "mimogrid.sources")
OURS = ("mimogrid.shell.job.host", "mimogrid.shell.job.sources", "mimogrid.shell.modules.transformers_tower")
_folders: set[Path] = set()
"""The folders of the jobs that this process has opened."""
_files: set[Path] = set()
"""The files that jobs were found to name by right: they stay so wherever the process goes."""


def permit(folder: Path) -> None:
    """Let jobs name functions in files under a folder, and Python find them there and in the current folder."""
    _folders.add(folder.resolve())
    for each in map(str, (*_current(), folder.resolve())):
        if each not in sys.path:
            sys.path.append(each)


def _current() -> tuple[Path, ...]:
    """Return the current folder, unless it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return (Path.cwd().resolve(),)
    return ()


def check_permission(spec: ModuleSpec, path: str, where: str) -> None:
    """Raise PlanError, placed at `where`, unless a job may name `path`, a function in the module of `spec`."""
    if _is_ours(spec.name):
        if _is_in(spec.name, OURS):
            return
        message = f"'{path}' is a part of mimogrid that no job can name."
        raise PlanError([Problem(where, message, "Name a built-in one, or a function of your own.")])
    file = _file_of(spec)
    folders = [*_current(), *sorted(_folders)]
    if file is not None and (file in _files or any(_is_under(file, folder) for folder in folders)):
        _files.add(file)
        return
    if _is_offered(spec.name):
        return
    message = f"'{path}' is in {file or 'Python itself'}, and a job may not name what is there."
    listed = ", ".join(map(str, folders))
    remedy = (
        f"A job names functions in files under its own folder or the current one ({listed}), or of installed "
        f"packages with an entry point '{GROUPS[0]}' or '{GROUPS[1]}' (docs/security.md)."
    )
    raise PlanError([Problem(where, message, remedy)])


def _is_ours(module: str) -> bool:
    return _is_in(module, ("mimogrid",))


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _file_of(spec: ModuleSpec) -> Path | None:
    """Return the file of a module, or a folder of a package without one; None for what is built in or frozen."""
    if spec.has_location and spec.origin:
        return Path(spec.origin).resolve()
    folder = next(iter(spec.submodule_search_locations or ()), None)
    return Path(folder).resolve() if folder and spec.origin is None else None


def _is_under(file: Path, folder: Path) -> bool:
    """Whether a file is under a folder, and not installed in an environment that is under it."""
    if not file.is_relative_to(folder):
        return False
    homes = [home for home in _installed(file) if file.is_relative_to(home)]
    return all(folder.is_relative_to(home) and folder != home for home in homes)


def _installed(file: Path) -> list[Path]:
    """Return the folders that things are installed in."""
    known = [*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()]
    parents = [each for each in file.parents if each.name in {"site-packages", "dist-packages"}]
    roots = {
        Path(sys.prefix).resolve(),
        Path(sys.base_prefix).resolve(),
    }  # `data` of the paths: /usr, an environment
    return [*({Path(each).resolve() for each in known} - roots), *parents]


def _is_offered(module: str) -> bool:
    from importlib.metadata import entry_points  # noqa: PLC0415 -- slow, and seldom asked

    offered = (entry.module for group in GROUPS for entry in entry_points(group=group))
    return any(_is_in(module, (each,)) for each in offered)
