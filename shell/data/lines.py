"""Lines: a store that is a JSON list, or a file of JSON lines, with images and sounds in a folder.

A record is addressed by its bytes in the file, so one is read without the others.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.data.conversations import LeftOutError
from mimogrid.shell.data.store import Raw, Stamp, media_bytes, media_file, stamp_of


_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]|[^\s,:\[\]{}"]+', re.DOTALL)
"""Strings, whose brackets do not count, brackets, and what else is a value: numbers, null, true, false."""


@attrs.frozen
class Lines:
    """A file of records, and the folder of their images and sounds."""

    path: Path
    media: Path
    holds_media = False

    @property
    def files(self) -> Sequence[Path]:
        """The file."""
        return (self.path,)

    def records(self) -> Iterator[Raw]:
        """Yield the records; one without an id is called by its number."""
        for number, (offset, raw) in enumerate(raw_records(self.path)):
            yield Raw("", offset, len(raw), offset + len(raw), raw, f"#{number}")

    def stamp(self, place: str) -> Stamp | None:
        """Return the stamp of a file in the folder."""
        try:
            return stamp_of(media_file(self.media, place))
        except LeftOutError:
            return None

    def read(self, place: str) -> bytes:
        """Return the bytes of a file in the folder. Raises LeftOutError."""
        return media_bytes(self.media, place)


def raw_records(store: Path) -> Iterator[tuple[int, bytes]]:
    """Yield where each record of a store begins, and its bytes. Raises PlanError if the file is no store.

    A list is read whole; of lines, one after the other.
    """
    try:
        with store.open("rb") as file:
            first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            file.seek(0)
            if first != b"[":
                yield from _lines(file)
                return
            yield from _list(store, file.read())
    except OSError as error:
        remedy = "Name a JSON file of conversations; see docs/data.md."
        raise PlanError([Problem(str(store), f"cannot be read: {error.strerror}.", remedy)]) from None


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in file:
        if line.strip():
            yield offset, line
        offset += len(line)


def _list(store: Path, content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the values of a JSON list: what is in strings does not count, and brackets are counted."""
    depth = start = 0
    for found in _STRUCTURE.finditer(content):
        match found.group():
            case b"{" | b"[":
                start = found.start() if depth == 1 else start
                depth += 1
            case b"}" | b"]":
                depth -= 1
                if depth == 1:
                    yield start, content[start : found.end()]
                if not depth:
                    return
            case text:
                if depth == 1:
                    yield found.start(), text
    remedy = "Copy it again: it is cut off, or is no JSON."
    raise PlanError([Problem(str(store), f"ends {depth} brackets deep.", remedy)])
