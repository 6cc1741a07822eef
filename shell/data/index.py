"""Indexes: what a processor made of a store, memory-mapped, one row for each sample.

    INDEX/index.arrow       a row for each sample, and the facts of the whole in its metadata
    INDEX/left_out.jsonl    a line for each record that is no sample: its number, its id, the reason and the fact
    INDEX/parts/            rows of stretches of the store, from which the next index of a changed store begins

A row has the sample's tokens, so a language model opens no media; images and sounds have a digest of their bytes.
Numbers of neighbouring positions are kept as runs.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pyarrow as pa

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.data.record import LANGUAGE, Record, Run, runs_of
from mimogrid.shell.data.store import Raw, Store
from mimogrid.shell.data.stores import open_store


if TYPE_CHECKING:
    from mimogrid.shell.data.batches import Encoded


VERSION = 2
ROWS, LEFT_OUT, PARTS = "index.arrow", "left_out.jsonl", "parts"
FACTS = b"mimogrid"
PROCESSOR = (
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
"""What a processor is read from."""
_INTS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.string()),  # of a store of several
        ("offset", pa.int64()),  # where the record begins in it, and its bytes; a row of a table, and 0
        ("size", pa.int64()),
        ("tokens", _INTS),  # without placeholders
        ("runs", _INTS),  # of placeholders: first, count, first, count ...
        ("counted", _INTS),  # of positions that predict a token that counts
        ("modules", pa.list_(pa.string())),  # for each segment, the module that reads it and its grid
        ("grids", pa.list_(_INTS)),
        ("kinds", pa.list_(pa.string())),  # of images and sounds, where they lie, and digests of their bytes
        ("places", pa.list_(pa.string())),
        ("digests", pa.list_(pa.binary(8))),
    ]
)


@attrs.frozen(kw_only=True)
class StoreFacts:
    """A store as it was indexed.

    Attributes:
        path: of the file or the folder, from the folder of the index.
        media: the folder of its images and sounds, from that of the index.
        columns: the columns of tables, by what they are for.
        size: the bytes of its files.
        stamp: a digest of the names, sizes and times of its files.
        digest: of the bytes of its files; where they hold the media, which have digests of their own, of the names and
            sizes.
    """

    path: str
    media: str
    columns: Mapping[str, str]
    size: int
    stamp: str
    digest: str


@attrs.frozen(kw_only=True)
class Facts:
    """What an index is of.

    Attributes:
        store: the store.
        processor: the folder of the processor, from that of the index.
        processor_digest: of the processor's files.
        max_tokens: more positions are left out; 0: no limit.
        longest: the positions of the longest sample.
        left_out: how many records are no samples, by reason.
        versions: of the libraries that read the store.
        digest: of all rows.
    """

    store: StoreFacts
    processor: str
    processor_digest: str
    max_tokens: int
    longest: int
    left_out: Mapping[str, int]
    versions: Mapping[str, str]
    digest: str


class Index:
    """An open index. Rows are read where they lie in the file."""

    def __init__(self, folder: Path) -> None:
        """Raise PlanError if there is no index in the folder."""
        self.folder = folder
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
            table = json.loads((reader.schema.metadata or {}).get(FACTS, b"{}"))
            if table.get("version") != VERSION:
                raise _no_index(
                    folder, f"is of version {table.pop('version', None)}, and {VERSION} is read here."
                )
            del table["version"]
            self.facts = Facts(**{**table, "store": StoreFacts(**table["store"])})
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            for batch in self._batches:
                batch.validate()
        except OSError as error:
            raise _no_index(folder, f"cannot be read: {error.strerror or error}.") from None
        except (pa.ArrowInvalid, ValueError, KeyError, TypeError) as error:
            raise _no_index(folder, f"is no index: {error}.") from None
        counts = (batch.num_rows for batch in self._batches)
        self._starts: list[int] = list(itertools.accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row as Python values."""
        return {name: self._value(row, name).as_py() for name in SCHEMA.names}

    def record(self, row: int) -> Record:
        """Return what a description needs."""
        modules, grids = self._value(row, "modules").as_py(), self._value(row, "grids").as_py()
        by_module: dict[str, tuple[tuple[int, ...], ...]] = {}
        for module, grid in zip(modules, grids, strict=True):
            by_module[module] = (*by_module.get(module, ()), tuple(grid))
        return Record(
            id=self._value(row, "id").as_py(),
            length=len(self._value(row, "tokens").values),
            units=float(sum(self._value(row, "counted").as_py()[1::2])),
            runs=self.runs(row, "runs"),
            segments=by_module,
        )

    def tokens(self, row: int) -> list[int]:
        """Return the text tokens of a sample."""
        tokens: list[int] = self._value(row, "tokens").as_py()
        return tokens

    def runs(self, row: int, name: str) -> tuple[Run, ...]:
        """Return runs of positions: `runs` of placeholders, or those that are `counted`."""
        flat = self._value(row, name).as_py()
        return tuple(zip(flat[::2], flat[1::2], strict=True))

    def media(self, row: int) -> tuple[tuple[str, str, bytes], ...]:
        """Return the kind, the place and the digest of each image and sound of a sample."""
        kinds, places, digests = (self._value(row, name).as_py() for name in ("kinds", "places", "digests"))
        return tuple(zip(kinds, places, digests, strict=True))

    def store(self) -> Store:
        """Return the store that the index is of. Raises PlanError if it is gone."""
        then = self.facts.store
        return open_store(self._at(then.path), self._at(then.media), then.columns)

    def _at(self, path: str) -> Path:
        return Path(os.path.normpath(self.folder.resolve() / path))

    def find(self, sample: str) -> int:
        """Return the row of a sample. Raises PlanError where there is none of that id."""
        for batch, start in zip(self._batches, self._starts, strict=False):
            found = batch.column("id").index(sample).as_py()
            if found >= 0:
                return start + int(found)
        message = f"has no sample '{sample}'."
        remedy = f"{self.folder / LEFT_OUT} says which records were left out, and why."
        raise PlanError([Problem(str(self.folder), message, remedy)])

    def _value(self, row: int, name: str) -> Any:
        batch = bisect.bisect_right(self._starts, row) - 1
        return self._batches[batch].column(name)[row - self._starts[batch]]


def _no_index(folder: Path, message: str) -> PlanError:
    remedy = "Make it: mimogrid data index STORE --processor CHECKPOINT --out INDEX."
    return PlanError([Problem(str(folder), message, remedy)])


# -- rows --------------------------------------------------------------------------------------------------


def row_of(
    encoded: "Encoded", *, name: str, raw: Raw, media: Sequence[tuple[str, str, bytes]]
) -> dict[str, Any]:
    """Return the row of a sample: its id, where its record is, and its images and sounds: kinds, places and bytes."""
    sample, text = encoded.sample, encoded.tensors[LANGUAGE]
    counted = text["loss_weights"].nonzero().flatten().tolist()
    segments = [(module, list(grid)) for module, grids in sample.segments.items() for grid in grids]
    return {
        "id": name,
        "file": raw.file,
        "offset": raw.offset,
        "size": raw.size,
        "tokens": text["tokens"][text["tokens"] >= 0].tolist(),
        "runs": _flat(runs_of(sample.placeholders.get(LANGUAGE, ()))),
        "counted": _flat(runs_of(counted)),
        "modules": [module for module, _ in segments],
        "grids": [grid for _, grid in segments],
        "kinds": [kind for kind, _, _ in media],
        "places": [place for _, place, _ in media],
        "digests": [digest(content) for _, _, content in media],
    }


def _flat(runs: Sequence[Run]) -> list[int]:
    return [number for run in runs for number in run]


def digest(raw: bytes) -> bytes:
    """Return a digest of the bytes of an image or a sound."""
    return hashlib.blake2b(raw, digest_size=8).digest()


# -- files -------------------------------------------------------------------------------------------------


def write_rows(path: Path, batches: Any, facts: Mapping[str, Any]) -> None:
    """Write rows and facts to a file, which is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        schema = SCHEMA.with_metadata({FACTS: json.dumps(facts).encode()})
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_part(path: Path) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Return the rows of a part and its facts."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return reader.get_batch(0), json.loads(reader.schema.metadata[FACTS])


# -- whether it still holds --------------------------------------------------------------------------------


def digest_of_store(store: Store) -> str:
    """Return the digest of a store as it is now (`StoreFacts`). Raises OSError."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in store.files:
        if store.holds_media:
            hashed.update(json.dumps([path.name, path.stat().st_size]).encode())
            continue
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
    return hashed.hexdigest()


def stamp_of_store(store: Store) -> str:
    """Return the stamp of a store as it is now. Raises OSError."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in store.files:
        status = path.stat()
        hashed.update(json.dumps([path.name, status.st_size, status.st_mtime_ns]).encode())
    return hashed.hexdigest()


def processor_digest(folder: Path) -> str:
    """Return a digest of the files of a processor."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in PROCESSOR for path in folder.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        hashed.update(f"{path.name}\0{len(content)}\0".encode())
        hashed.update(content)
    return hashed.hexdigest()


def check_processor(index: Index, folder: Path) -> None:
    """Raise PlanError if a folder holds another processor than that of an index."""
    if processor_digest(folder) != index.facts.processor_digest:
        message = (
            f"has another processor than {index.folder} was made with (tokenizer, template or image sizes)."
        )
        remedy = f"Index the store with it: mimogrid data index STORE --processor {folder}."
        raise PlanError([Problem(str(folder), message, remedy)])


def check_store(index: Index) -> None:
    """Raise PlanError if the store of an index is gone or another; its bytes are read only if its times differ."""
    then, path = index.facts.store, index.folder / index.facts.store.path
    try:
        store = index.store()
        if stamp_of_store(store) == then.stamp or digest_of_store(store) == then.digest:
            return
        size = sum(file.stat().st_size for file in store.files)
    except OSError as error:
        message = f"cannot be read: {error.strerror}; {index.folder} is an index of it."
        remedy = "Put it back where it was, or index it again."
        raise PlanError([Problem(os.path.normpath(path), message, remedy)]) from None
    message = f"has changed since {index.folder} was made of it: {size} bytes now, {then.size} then."
    remedy = f"Index it again: mimogrid data index {os.path.normpath(path)} --out {index.folder}."
    raise PlanError([Problem(os.path.normpath(path), message, remedy)])
