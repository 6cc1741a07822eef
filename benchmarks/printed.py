"""Printed: lines of a benchmark on the terminal and in a file, as they come."""

from collections.abc import Callable
from pathlib import Path


def printer(out: Path | None) -> Callable[[str], None]:
    """Return what prints a line, and adds it to a new file if one is named: a run that is stopped leaves its lines."""
    if out:
        out.write_text("", encoding="utf-8")

    def say(line: str) -> None:
        print(line, flush=True)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    return say
