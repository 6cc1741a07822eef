"""Stores: what every kind of store of conversations gives, whatever its files are.

A store has records, each as JSON, and images and sounds by name. A name is that of a file in the folder of the media,
or says where the bytes lie within a file of the store. No name leads out of the folders of the store.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import attrs

from mimogrid.shell.data.conversations import LeftOutError, Medium


Stamp = tuple[int, int]
"""The bytes of a file, and when it was written."""


@attrs.frozen
class Raw:
    """A record as it lies in a store.

    Attributes:
        file: the file that it is in, from the folder of the store.
        offset: where it begins: a byte of the file, or a row of a table.
        size: its bytes; 0 for a row of a table.
        end: the bytes of the store up to its end, as far as they are known.
        text: the record as JSON.
        name: the id of a record that has none.
        offered: its images and sounds, for a record that lists none.
        places: for names that the record may use, where the bytes lie; None: names are files in the folder.
    """

    file: str
    offset: int
    size: int
    end: int
    text: bytes
    name: str
    offered: tuple[Medium, ...] = ()
    places: Mapping[str, str] | None = None

    def place(self, name: str) -> str:
        """Return where an image or a sound of the record lies. Raises LeftOutError."""
        if self.places is None:
            return name
        if name not in self.places:
            raise LeftOutError("missing file", f"{name!r} is not with the record")
        return self.places[name]


class Store(Protocol):
    """Files of records, with their images and sounds."""

    @property
    def files(self) -> Sequence[Path]:
        """The files of the records, in order."""
        ...

    @property
    def holds_media(self) -> bool:
        """Whether images and sounds lie in the files of the records."""
        ...

    def records(self) -> Iterator[Raw]:
        """Yield the records in order. Raises PlanError if a file is none of the store's kind."""
        ...

    def stamp(self, place: str) -> Stamp | None:
        """Return the stamp of the file of an image or a sound; None if there is none."""
        ...

    def read(self, place: str) -> bytes:
        """Return the bytes of an image or a sound. Raises LeftOutError."""
        ...


# -- files in a folder -------------------------------------------------------------------------------------


def media_file(folder: Path, name: str) -> Path:
    """Return where a file is. Raises LeftOutError if that is not within the folder."""
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name that is too long
        raise LeftOutError("path", f"{name!r}: {error}"[:200]) from None
    if not inside:
        raise LeftOutError("path", f"{name!r} is not in the folder of the media")
    return path


def media_bytes(folder: Path, name: str) -> bytes:
    """Return the bytes of a file of a folder. Raises LeftOutError."""
    path = media_file(folder, name)
    try:
        if not path.is_file():  # A pipe would wait, a device have no end.
            raise LeftOutError("missing file", f"{name!r}: there is no such file")
        return path.read_bytes()
    except OSError as error:
        raise LeftOutError("missing file", f"{name!r}: {error.strerror}") from None


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
