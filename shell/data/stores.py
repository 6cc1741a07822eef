"""Stores: which kind of store files are, by the endings of their names."""

from collections.abc import Mapping
from pathlib import Path

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.data.columns import ENDINGS, ROLES, Columns
from mimogrid.shell.data.lines import Lines
from mimogrid.shell.data.store import Store
from mimogrid.shell.data.tars import Tars


PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


def open_store(path: Path, media: Path, columns: Mapping[str, str]) -> Store:
    """Return the store of a file or a folder; raises PlanError if it is of no known kind.

    Args:
        path: a JSON file, a tar, a file of Parquet or Arrow, or a folder of tars, Parquet or Arrow files.
        media: the folder of images and sounds that are files of their own.
        columns: the columns of a table by what they are for (`ROLES`), where they are called otherwise.
    """
    names = (
        sorted(each.name for each in path.iterdir() if not each.name.startswith("."))
        if path.is_dir()
        else [path.name]
    )
    folder = path if path.is_dir() else path.parent
    found = {ending: tuple(n for n in names if n.endswith(ending)) for ending in (".tar", *ENDINGS)}
    kinds = [ending for ending, own in found.items() if own]
    if packed := [name for name in names if name.endswith(PACKED)]:
        message = f"is compressed, so that nothing in it has a place: {packed[0]}."
        raise PlanError([Problem(str(path), message, "Unpack it: gunzip FILE.")])
    if len(kinds) > 1 or (path.is_dir() and not kinds):
        has = f"has files of the kinds {', '.join(kinds)}" if kinds else "has no .tar, .parquet or .arrow"
        message = f"{has}; the folder of a store has files of one kind."
        raise PlanError([Problem(str(path), message, "Name a file, or a folder with one kind of them.")])
    if columns and kinds not in ([".parquet"], [".arrow"]):
        message = "has no columns; only Parquet and Arrow files have."
        raise PlanError([Problem(str(path), message, "Leave --columns out.")])
    if unknown := sorted(set(columns) - set(ROLES)):
        message = f"'{unknown[0]}' is nothing that a record has."
        raise PlanError([Problem("--columns", message, f"Use one of {', '.join(ROLES)}.")])
    if not kinds:
        return Lines(path, media)
    if kinds == [".tar"]:
        return Tars(folder, found[".tar"], alone=not path.is_dir())
    return Columns(folder, found[kinds[0]], media, columns)
