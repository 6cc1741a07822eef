"""Output: what commands leave behind: one JSON value on standard output, or files."""

import json
from pathlib import Path

from mimogrid.core.errors import PlanError, Problem


def print_json(value: object) -> None:
    """Print one JSON value."""
    print(json.dumps(value))


def write(path: Path, text: str) -> None:
    """Write a file that the user named. Raises PlanError where it cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        remedy = "Name a file in a folder that exists."
        raise PlanError([Problem(str(path), f"cannot be written: {error.strerror}.", remedy)]) from None
