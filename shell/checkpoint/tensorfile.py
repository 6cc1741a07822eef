"""Tensor files: safetensors, written as a stream and opened without torch.

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": {...}, NAME: {"dtype": "F32", "shape": [...], "data_offsets": [...]}, ...}
    values    of all tensors, one after the other

Wider values come first, then names in order, so every tensor is aligned, and equal tensors make equal files. What
is written is hashed on its way and is on the disk when `write` returns. No more than one tensor is held.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs


CHUNK = 1 << 24
"""Bytes that are hashed and written at a time: other threads run meanwhile."""

HEADER_MOST = 100_000_000
"""Bytes of a header that other readers take, too."""

WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
"""Bytes of a value."""


@attrs.frozen(eq=False)
class Entry:
    """A tensor to write. `values` gives its bytes, when they are wanted."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], memoryview]


def write(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a file; return its size and checksum. Raises OSError."""
    ordered = sorted(entries, key=lambda entry: (-WIDTHS[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for entry in ordered:
        begin, end = end, end + size_of(entry.dtype, entry.shape)
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(values: memoryview) -> None:
            for start in range(0, len(values), CHUNK):
                part = values[start : start + CHUNK]
                digest.update(part)
                file.write(part)

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for entry in ordered:
            values = entry.values()
            assert len(values) == size_of(entry.dtype, entry.shape), entry.name
            put(values)
            del values  # before there are others
        flush(file.fileno(), file.flush)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


@attrs.frozen
class Found:
    """A tensor in a file: what it is, and which bytes are its values."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_of(path: Path) -> dict[str, Found]:
    """Return the tensors of a file, without reading their values.

    Raises ValueError, which says what is wrong, where the header is none or is not true of the file: values must
    follow each other without a gap, to the end, each tensor with as many bytes as its shape takes.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, HEADER_MOST):
            raise ValueError(f"says that its header has {length} bytes, of {size} in all")
        try:
            table = json.loads(file.read(length))
            table.pop("__metadata__", None)
            found = {name: _found(of, 8 + length) for name, of in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"has a header that is none: {error!r}") from None
    end = 8 + length
    for name, of in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if of.dtype not in WIDTHS or (of.begin, of.end) != (end, end + size_of(of.dtype, of.shape)):
            told = f"{of.dtype} {list(of.shape)}"
            raise ValueError(f"says that '{name}', {told}, has the bytes {of.begin} to {of.end}")
        end = of.end
    if end != size:
        raise ValueError(f"says that its tensors end at byte {end}; it has {size}")
    return found


def _found(told: Mapping[str, Any], origin: int) -> Found:
    begin, end = map(_count, told["data_offsets"])
    return Found(str(told["dtype"]), tuple(map(_count, told["shape"])), origin + begin, origin + end)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def read_into(path: Path, found: Found, values: memoryview) -> None:
    """Read a tensor's bytes into memory that is there; the file is not mapped, so nothing else stays resident."""
    assert len(values) == size_of(found.dtype, found.shape), path
    with path.open("rb", buffering=0) as file:
        file.seek(found.begin)
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            if file.readinto(part) != len(part):
                raise OSError(errno.EIO, "ended before its tensor did", str(path))


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a text beside tensor files, in the same way. Raises OSError."""
    content = text.encode()
    with path.open("wb") as file:
        file.write(content)
        flush(file.fileno(), file.flush)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def flush(descriptor: int, buffered: Callable[[], None]) -> None:
    """Return when what was written is on the disk."""
    buffered()
    os.fsync(descriptor)


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor."""
    size = WIDTHS[dtype]
    for n in shape:
        size *= n
    return size


def checksum(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
