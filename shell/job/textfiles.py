"""Text files that a user names: read whole, but only regular files of a bounded size, as UTF-8, TOML or JSON.

What is nested too deeply, and integers beyond the 64 bits of TOML, are refused here, so nothing behind can run out of
stack or of digits.
"""

import json
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimogrid.core.base.errors import PlanError, Problem


MEGABYTES_MOST = 16
DEPTH_MOST = 32
"""How deeply tables and lists may be nested; a job needs 5."""
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_LONG_KEY = re.compile(f"(?:{_PART}){{{DEPTH_MOST}}}")
_INTEGERS = range(-(2**63), 2**63)


class TooMuch(ValueError):  # noqa: N818 -- of a text that is well formed
    """A text that is nested too deeply or has an integer of too many digits; the message says which."""


def read_bytes(path: Path, remedy: str) -> bytes:
    """Return what is in a file. Raises PlanError, with a remedy for a path that leads to none."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # A pipe would wait, a device have no end.
            raise _error(path, "is no regular file.", "Name a file, not a pipe or a device.")
        with path.open("rb") as file:
            content = file.read(MEGABYTES_MOST * 2**20 + 1)
    except FileNotFoundError:
        raise _error(path, "there is no such file.", remedy) from None
    except IsADirectoryError:
        raise _error(path, "is a folder.", "Name a file in it.") from None
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}.", remedy) from None
    except ValueError as error:  # a null byte
        raise _error(path, f"is no path: {error}.", remedy) from None
    if len(content) > MEGABYTES_MOST * 2**20:
        raise _error(path, f"has more than {MEGABYTES_MOST} MiB.", "Name another file, or make it smaller.")
    return content


def read_text(path: Path, remedy: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark. Raises PlanError."""
    try:
        return read_bytes(path, remedy).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _error(path, f"is not a text file in UTF-8 (line {line}).", "Save it as UTF-8.") from None


def toml_of(text: str) -> dict[str, Any]:
    """Return the tables of a text. Raises TOMLDecodeError, and TooMuch."""
    if _LONG_KEY.search(text):  # The parser takes a time that grows with the square of a key's parts.
        raise TooMuch(f"a key has more than {DEPTH_MOST} parts")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # an integer of more digits than Python reads, or a date such as 2000-13-13
        raise _unreadable(error) from None
    _check(table)
    return table


def json_of(text: str) -> Any:
    """Return the value of a text. Raises JSONDecodeError, and TooMuch."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise _unreadable(error) from None
    _check(value)
    return value


def _check(value: object) -> None:
    """Raise TooMuch for what is nested too deeply or does not fit into 64 bits."""
    level: list[object] = [value]
    for _ in range(DEPTH_MOST):
        if any(type(each) is int and each not in _INTEGERS for each in level):
            raise TooMuch("an integer has more than 64 bits")
        level = [inner for each in level for inner in _within(each)]
    if level:
        raise _too_deep()


def _within(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _too_deep() -> TooMuch:
    return TooMuch(f"tables and lists are nested more than {DEPTH_MOST} deep")


def _unreadable(error: ValueError) -> TooMuch:
    return TooMuch("an integer has more than 64 bits" if "digits" in str(error) else str(error))


def _error(path: Path, message: str, remedy: str) -> PlanError:
    return PlanError([Problem(str(path), message, remedy)])
