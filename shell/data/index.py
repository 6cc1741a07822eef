"""Indexes: what a processor made of a store, memory-mapped, one row for each sample.

    INDEX/index.arrow       a row for each sample, and the facts of the whole in its metadata
    INDEX/left_out.jsonl    a line for each record that is no sample: its number, its id, the reason and the fact
    INDEX/parts/            rows of stretches of the store, from which the next index of a changed store begins

A row has the sample's tokens, so a language model opens no media; images have a digest of their bytes. Numbers of
neighbouring positions are kept as runs.
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


if TYPE_CHECKING:
    from mimogrid.shell.data.batches import Encoded


VERSION = 1
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
        ("offset", pa.int64()),  # where the record begins in the store, and its bytes
        ("size", pa.int64()),
        ("tokens", _INTS),  # without placeholders
        ("runs", _INTS),  # of placeholders: first, count, first, count ...
        ("counted", _INTS),  # of positions that predict a token that counts
        ("modules", pa.list_(pa.string())),  # for each image, the module that reads it and its grid
        ("grids", pa.list_(_INTS)),
        ("images", pa.list_(pa.string())),
        ("digests", pa.list_(pa.binary(8))),
    ]
)


@attrs.frozen(kw_only=True)
class StoreFacts:
    """A store as it was indexed; paths are from the folder of the index."""

    path: str
    images: str
    size: int
    mtime_ns: int
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

    def images(self, row: int) -> tuple[tuple[str, bytes], ...]:
        """Return the name and the digest of each image of a sample."""
        names, digests = self._value(row, "images").as_py(), self._value(row, "digests").as_py()
        return tuple(zip(names, digests, strict=True))

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
    encoded: "Encoded", *, name: str, offset: int, size: int, images: Sequence[tuple[str, bytes]]
) -> dict[str, Any]:
    """Return the row of a sample: its id, where its record is in the store, and its images with their bytes."""
    sample, text = encoded.sample, encoded.tensors[LANGUAGE]
    counted = text["loss_weights"].nonzero().flatten().tolist()
    segments = [(module, list(grid)) for module, grids in sample.segments.items() for grid in grids]
    return {
        "id": name,
        "offset": offset,
        "size": size,
        "tokens": text["tokens"][text["tokens"] >= 0].tolist(),
        "runs": _flat(runs_of(sample.placeholders.get(LANGUAGE, ()))),
        "counted": _flat(runs_of(counted)),
        "modules": [module for module, _ in segments],
        "grids": [grid for _, grid in segments],
        "images": [image for image, _ in images],
        "digests": [digest(raw) for _, raw in images],
    }


def _flat(runs: Sequence[Run]) -> list[int]:
    return [number for run in runs for number in run]


def digest(raw: bytes) -> bytes:
    """Return a digest of the bytes of an image."""
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


def store_facts(store: Path, images: Path, folder: Path) -> StoreFacts:
    """Return the facts of a store as it is now, for an index in a folder."""
    status = store.stat()
    hashed = hashlib.blake2b(digest_size=16)
    with store.open("rb") as file:
        while piece := file.read(1 << 20):
            hashed.update(piece)
    return StoreFacts(
        path=os.path.relpath(store, folder),
        images=os.path.relpath(images, folder),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        digest=hashed.hexdigest(),
    )


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
    then = index.facts.store
    store = (index.folder / then.path).resolve()
    remedy = f"Index it again: mimogrid data index {store} --out {index.folder}."
    try:
        status = store.stat()
        if (status.st_size, status.st_mtime_ns) == (then.size, then.mtime_ns):
            return
        now = store_facts(store, (index.folder / then.images).resolve(), index.folder)
    except OSError as error:
        message = f"cannot be read: {error.strerror}; {index.folder} is an index of it."
        raise PlanError(
            [Problem(str(store), message, "Put it back where it was, or index it again.")]
        ) from None
    if now.digest != then.digest:
        message = f"has changed since {index.folder} was made of it: {now.size} bytes now, {then.size} then."
        raise PlanError([Problem(str(store), message, remedy)])
