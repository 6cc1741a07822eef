"""Tensor files: safetensors, written as a stream and opened without torch.

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": {...}, NAME: {"dtype": "F32", "shape": [...], "data_offsets": [...]}, ...}
    values    of all tensors, one after the other

Tensors with wider values come first, then names in order. So every tensor is aligned, and equal tensors make equal
files. `write` hashes what it writes, and returns when it is on the disk. Only one tensor at a time is in memory.
"""

import errno
import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.update.contents import is_count


CHUNK = 1 << 24
"""Bytes that are hashed and written at a time; other threads run in between."""

HEADER_MOST = 100_000_000
"""The largest header, in bytes, that other readers accept."""

SHARDING = "DCP_SHARDING_INFO"
"""The key of a header's metadata under which DCP keeps where each tensor begins in the full one."""

WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
"""Bytes of a value."""


@attrs.frozen(eq=False)
class TensorEntry:
    """A tensor to write; `values` returns its bytes, and is called when they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], memoryview]


def write(path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a file; return its ``bytes`` and ``sha256``. Raises OSError."""
    ordered = sorted(entries, key=lambda entry: (-WIDTHS[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
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
            del values  # before the next tensor is in memory
        flush(file.fileno(), file.flush)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


@attrs.frozen
class StoredTensor:
    """A tensor in a file; its values are the bytes `begin` to `end` of the file.

    `offsets` say where it begins in a full tensor, of which the file may hold a part.
    """

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    begin: int
    end: int


def header_of(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file, without reading their values.

    Raises ValueError, with what is wrong, where there is no header or the file does not match it: the values of all
    tensors must fill the rest of the file without a gap, and each must have as many bytes as its shape needs.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, HEADER_MOST):
            raise ValueError(f"says that its header has {length} bytes, of {size} in all")
        try:
            table = _object(file.read(length))
            offsets = _offsets(table.pop("__metadata__", {}))
            found = {name: _stored(name, entry, offsets, 8 + length) for name, entry in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"has no valid header: {error!r}") from None
    end = 8 + length
    for name, of in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if of.dtype not in WIDTHS:
            raise ValueError(f"has '{name}' in a dtype that is not known here, {reprlib.repr(of.dtype)}")
        if (of.begin, of.end) != (end, end + size_of(of.dtype, of.shape)):
            kind = f"{of.dtype} {list(of.shape)}"
            raise ValueError(f"says that '{name}', {kind}, has the bytes {of.begin} to {of.end}")
        end = of.end
    if end != size:
        raise ValueError(f"says that its tensors end at byte {end}; it has {size}")
    return found


def _object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object as other readers do: UTF-8, and nothing before its brace."""
    value = json.loads(text.decode("utf-8"))
    if not isinstance(value, dict) or text[:1] != b"{":
        raise ValueError("no JSON object")
    return value


def _offsets(metadata: Mapping[str, object]) -> dict[str, tuple[int, ...]] | None:
    """Return where the tensors of a file begin in the full ones; None where the file holds full tensors."""
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is no text")
    if SHARDING not in metadata:
        return None
    places = _object(str(metadata[SHARDING]).encode())
    return {name: tuple(map(_count, place["saved_offsets"])) for name, place in places.items()}


def _stored(
    name: str, entry: Mapping[str, Any], offsets: Mapping[str, tuple[int, ...]] | None, origin: int
) -> StoredTensor:
    """Return a tensor as its entry in a header describes it; values begin at `origin` in the file."""
    begin, end = map(_count, entry["data_offsets"])
    shape = tuple(map(_count, entry["shape"]))
    start = (0,) * len(shape) if offsets is None else offsets[name]
    return StoredTensor(str(entry["dtype"]), shape, start, origin + begin, origin + end)


def _count(value: object) -> int:
    if not isinstance(value, int) or not is_count(value):
        raise ValueError(f"{value!r} is no count")
    return value


def read_into(path: Path, stored: StoredTensor, values: memoryview, *, skip: int = 0) -> None:
    """Read a tensor's bytes into given memory, without the first `skip` and as many as there is room for.

    The file is not mapped, so that nothing else stays resident.
    """
    assert skip + len(values) <= stored.end - stored.begin, path
    with path.open("rb", buffering=0) as file:
        file.seek(stored.begin + skip)
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            if file.readinto(part) != len(part):
                raise OSError(errno.EIO, "ended before its tensor did", str(path))


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a text file in the same way; return its ``bytes`` and ``sha256``. Raises OSError."""
    content = text.encode()
    with path.open("wb") as file:
        file.write(content)
        flush(file.fileno(), file.flush)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def flush(descriptor: int, buffered: Callable[[], None]) -> None:
    """Wait until what was written is on the disk."""
    buffered()
    os.fsync(descriptor)


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor."""
    size = WIDTHS[dtype]
    for n in shape:
        size *= n
    return size


def checksum(path: Path, on_read: Callable[[int], None] = lambda _: None) -> str:
    """Return the checksum of a file; `on_read` is called with the bytes of each piece that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
            on_read(len(part))
    return digest.hexdigest()
