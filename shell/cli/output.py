"""Output: what commands write: one JSON value on standard output, or files that the user named."""

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from mimogrid.core.base.errors import PlanError, Problem


def print_json(value: object) -> None:
    """Print one JSON value."""
    print(json.dumps(value))


def terminal_width(otherwise: int) -> int:
    """Return the columns of the terminal, or `otherwise` where standard output is none."""
    return shutil.get_terminal_size((otherwise, 0)).columns if sys.stdout.isatty() else otherwise


def write(path: Path, parts: Iterable[str]) -> None:
    """Write a file that the user named, part after part. Raises PlanError where that fails."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(parts)
    except OSError as error:
        remedy = "Name a file in a folder that exists."
        raise PlanError([Problem(str(path), f"cannot be written: {error.strerror}.", remedy)]) from None
