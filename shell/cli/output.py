"""Output: what commands write: one JSON value on standard output, or files that the user named.

Whatever is printed is made harmless here: names and messages may come from files that somebody else has written, and a
terminal may lack characters.
"""

import codecs
import contextlib
import json
import locale
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.text import printable


PLAIN = {"·": ".", "─": "-", "━": "-", "…": "..."}
"""What stands for a character that a terminal lacks; any other is written out."""


def print_json(value: object) -> None:
    """Print one JSON value."""
    print(json.dumps(value))


def terminal(stream: TextIO | None = None) -> TextIO:
    """Return a stream, standard output by default, for those who write escapes of their own, and `printable` texts."""
    return _unescaped(sys.stdout if stream is None else stream)


def terminal_width(otherwise: int) -> int:
    """Return the columns of the terminal, or `otherwise` where standard output is none."""
    return shutil.get_terminal_size((otherwise, 0)).columns if sys.stdout.isatty() else otherwise


def write(path: Path, parts: Iterable[str]) -> None:
    """Write a file that the user named, part after part. Raises PlanError where that fails."""
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(parts)
    except (OSError, ValueError) as error:
        remedy = "Name a file in a folder that exists."
        fact = error.strerror if isinstance(error, OSError) else error
        raise PlanError([Problem(str(path), f"cannot be written: {fact}.", remedy)]) from None


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what is written for characters that an encoding lacks, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in lacking), error.end


codecs.register_error("mimogrid.plain", _plain)


def encode_plainly() -> None:
    """Let standard output and error write whatever they are given, also where they have only ASCII.

    Ranks run in the UTF-8 mode of Python there: torch reads files of its own in the encoding of the locale.
    """
    if codecs.lookup(locale.getencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="mimogrid.plain")


@contextlib.contextmanager
def escaped() -> Iterator[None]:
    """Make all that is printed `printable`."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Escaped(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def unescaped() -> Iterator[None]:
    """Print as it is what runs while open: a bar of progress, and the user's own code."""
    with (
        contextlib.redirect_stdout(_unescaped(sys.stdout)),
        contextlib.redirect_stderr(_unescaped(sys.stderr)),
    ):
        yield


def _unescaped(stream: TextIO) -> TextIO:
    return stream.stream if isinstance(stream, _Escaped) else stream


class _Escaped:
    """A stream whose texts are made `printable`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
