"""Tars: a store of WebDataset, one tar or a folder of them, read by place.

Neighbouring files whose names are the same up to the first dot of the last part are a record. `.json` is the record in
one of the forms of `conversations`, or `.txt` is what an assistant says of the images and sounds. The place of an image
is where its bytes are in the tar (``shard-0.tar@1536+2048``), so one is read without the others. Nothing is unpacked.
"""

import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.data.conversations import Kind, LeftOutError, Medium
from mimogrid.shell.data.store import Raw, Stamp, stamp_of


KINDS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"),
    "audio": ("flac", "mp3", "ogg", "opus", "wav"),
}
"""The kinds of files that are images and sounds, by their last ending."""
_PLACE = re.compile(r"(.+)@(\d+)\+(\d+)")


@attrs.frozen
class _File:
    """A file of a tar: its name, its key and its ending, and where its bytes are."""

    name: str
    key: str
    ending: str
    offset: int
    size: int

    @property
    def kind(self) -> Kind | None:
        """What it is, if it is an image or a sound."""
        last = self.ending.rpartition(".")[2]
        return next((kind for kind, endings in KINDS.items() if last in endings), None)


@attrs.frozen
class Tars:
    """Tars of records: one, or all of a folder."""

    folder: Path
    names: tuple[str, ...]
    alone: bool
    holds_media = True

    @property
    def files(self) -> Sequence[Path]:
        """The tars, in the order of their names."""
        return tuple(self.folder / name for name in self.names)

    def records(self) -> Iterator[Raw]:
        """Yield the records. One without an id is called by its key, behind its tar where there are several."""
        before = 0
        for name in self.names:
            path = self.folder / name
            for key, files in itertools.groupby(_files(path), key=lambda file: file.key):
                yield _record(path, name, key if self.alone else f"{name}/{key}", tuple(files), before)
            before += path.stat().st_size

    def stamp(self, place: str) -> Stamp | None:
        """Return the stamp of the tar."""
        found = _PLACE.fullmatch(place)
        return stamp_of(self.folder / found[1]) if found else None

    def read(self, place: str) -> bytes:
        """Return the bytes at a place of a tar. Raises LeftOutError."""
        found = _PLACE.fullmatch(place)
        if found is None or found[1] not in self.names:
            raise LeftOutError("missing file", f"{place!r} is no place in a tar of the store")
        offset, size = int(found[2]), int(found[3])
        try:
            with (self.folder / found[1]).open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise LeftOutError("missing file", f"{place!r}: {error.strerror}") from None
        if len(content) < size:
            raise LeftOutError("missing file", f"{place!r}: the tar ends before")
        return content


def _files(path: Path) -> Iterator[_File]:
    """Yield the files of a tar. Raises PlanError if it is none, or is cut off."""
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # It would keep all of them.
                blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
                if member.isreg() and not member.issparse():
                    folder, slash, last = member.name.rpartition("/")
                    first, _, ending = last.partition(".")
                    key = folder + slash + first
                    yield _File(member.name, key, ending.lower(), member.offset_data, member.size)
        with path.open("rb") as file:
            file.seek(end)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        remedy = "Copy it again; a compressed tar must be unpacked, because its files have no places."
        raise PlanError([Problem(str(path), f"is no whole tar: {error}.", remedy)]) from None
    if not whole:
        message = f"has no end after byte {end}: it is cut off or damaged there."
        raise PlanError([Problem(str(path), message, "Copy it again.")])


def _record(path: Path, name: str, key: str, files: Sequence[_File], before: int) -> Raw:
    texts = [file for file in files if file.ending in {"json", "txt"}]
    text = next((file for file in texts if file.ending == "json"), texts[0] if texts else None)
    content = _content(path, text) if text is not None else b"{}"
    media = [(file, file.kind) for file in files]
    names = Counter(
        alias for file in files for alias in {file.name, file.name.rpartition("/")[2], file.ending}
    )
    return Raw(
        file=name,
        offset=files[0].offset - tarfile.BLOCKSIZE,
        size=files[-1].offset + files[-1].size - files[0].offset + tarfile.BLOCKSIZE,
        end=before + files[-1].offset + files[-1].size,
        text=content,
        name=key,
        offered=tuple(Medium(kind, file.name) for file, kind in media if kind is not None),
        places={
            alias: f"{name}@{file.offset}+{file.size}"
            for file, kind in media
            for alias in (file.name, file.name.rpartition("/")[2], file.ending)
            if kind is not None and names[alias] == 1
        },
    )


def _content(path: Path, file: _File) -> bytes:
    with path.open("rb") as opened:
        opened.seek(file.offset)
        content = opened.read(file.size)
    if file.ending == "json":
        return content
    # What is no UTF-8 becomes half a character here, and has its reason there.
    return json.dumps({"answer": content.decode("utf-8-sig", "surrogateescape")}).encode()
