"""Indexing: a store read once, in parallel, into an index.

The records of a store are cut into stretches. A part holds the rows of a stretch, and its name is a digest of all that
it is made of: the bytes of the records, the sizes and times of the images, the processor and the options. So a part
that is there already is right, whoever made it: a run that was killed goes on where it was, and of a store that has
grown only the new part is read. The rows of all parts become one file at the end, whole or not at all.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TextIO

import attrs
import pyarrow as pa
import torch

from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.core.data.record import LANGUAGE
from mimogrid.shell.data.conversations import (
    LeftOutError,
    conversation,
    image_bytes,
    image_file,
    raw_records,
)
from mimogrid.shell.data.encoding import Encoder, decoded
from mimogrid.shell.data.index import (
    LEFT_OUT,
    PARTS,
    ROWS,
    SCHEMA,
    VERSION,
    Facts,
    StoreFacts,
    processor_digest,
    read_part,
    row_of,
    store_facts,
    write_rows,
)


RECORDS = 256
"""Records of a stretch."""

Progress = Callable[[int, int], None]
"""Is told of records that were read, and of the bytes of the store up to there."""


@attrs.frozen(kw_only=True)
class Making:
    """What an index is made of: the store, its images, the folder of the processor, and the options."""

    store: Path
    images: Path
    processor: Path
    max_tokens: int = 0


@attrs.frozen
class _Record:
    """A record: its number in the store, where it begins, its bytes, and whether an earlier one has its id."""

    number: int
    offset: int
    raw: bytes
    is_duplicate: bool


@attrs.frozen
class _Stretch:
    """Neighbouring records, and the name of their part."""

    records: tuple[_Record, ...]
    part: str

    @property
    def end(self) -> int:
        """Where the store goes on."""
        last = self.records[-1]
        return last.offset + len(last.raw)


def build(
    making: Making, out: Path, pool: Executor, *, ahead: int, progress: Progress = lambda *_: None
) -> Facts:
    """Make an index in a folder, or renew the one that is there; return its facts.

    Args:
        making: what it is made of.
        out: the folder.
        pool: where stretches become parts.
        ahead: how many stretches may wait for the pool.
        progress: is told what has been read.

    Raises PlanError if the store or the processor cannot be read, or if no record is a sample, and WorldError if a
    process is killed.
    """
    _encoder(making.processor)  # It raises here what it would raise in every process.
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    with _locked(out):
        for unfinished in (*out.glob("*.tmp"), *(out / PARTS).glob("*.tmp")):
            unfinished.unlink()
        store = _facts_of_store(making, out)
        digest = processor_digest(making.processor)
        parts: list[str] = []
        for stretch in _made(making, digest, out / PARTS, pool, ahead):
            parts.append(stretch.part)
            progress(len(stretch.records), stretch.end)
        _check_unchanged(making.store, store)
        facts = Facts(
            store=store,
            processor=os.path.relpath(making.processor, out),
            processor_digest=digest,
            max_tokens=making.max_tokens,
            versions=_versions(),
            digest=_digest(out / PARTS, parts),
            **_counted(out / PARTS, parts),
        )
        _publish(out, parts, facts)
    return facts


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("transformers", "pillow")}


def _facts_of_store(making: Making, out: Path) -> StoreFacts:
    try:
        return store_facts(making.store, making.images, out)
    except OSError as error:
        remedy = "Name a JSON file of conversations; see docs/data.md."
        raise PlanError([Problem(str(making.store), f"cannot be read: {error.strerror}.", remedy)]) from None


def _check_unchanged(store: Path, before: StoreFacts) -> None:
    status = store.stat()
    if (status.st_size, status.st_mtime_ns) != (before.size, before.mtime_ns):
        remedy = "Run it again when nobody writes there: parts that are still right are kept."
        raise PlanError([Problem(str(store), "has changed while it was read.", remedy)])


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes from making the same index. Raises PlanError if one does."""
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            remedy = "Wait for it, or name another folder with --out."
            raise PlanError([Problem(str(out), "another process is making this index.", remedy)]) from None
        yield


# -- the stretches -----------------------------------------------------------------------------------------


def _stretches(making: Making, digest: str) -> Iterator[_Stretch]:
    """Yield the stretches of a store."""
    config = hashlib.blake2b((making.processor / "config.json").read_bytes()).hexdigest()
    made_by = [VERSION, _versions(), digest, config, making.max_tokens, str(making.images)]
    seen: set[bytes] = set()
    records: list[_Record] = []
    key = hashlib.blake2b(digest_size=16)
    for number, (offset, raw) in enumerate(raw_records(making.store)):
        if not records:
            key = hashlib.blake2b(json.dumps([*made_by, offset]).encode(), digest_size=16)
        name, images = _looked_at(raw, number, making.images)
        records.append(_Record(number, offset, raw, name in seen))
        seen.add(name)
        key.update(json.dumps([number, len(raw), records[-1].is_duplicate, images]).encode() + raw)
        if len(records) == RECORDS:
            yield _Stretch(tuple(records), f"{key.hexdigest()}.arrow")
            records.clear()
    if records:
        yield _Stretch(tuple(records), f"{key.hexdigest()}.arrow")


def _looked_at(raw: bytes, number: int, folder: Path) -> tuple[bytes, list[tuple[int, int] | None]]:
    """Return a digest of a record's id, and the size and time of each of its images."""
    try:
        found = conversation(raw, f"#{number}")
    except LeftOutError:
        return str(number).encode(), []
    return hashlib.blake2b(found.id.encode("utf-8", "surrogatepass"), digest_size=12).digest(), [
        _size_and_time(folder, name) for name in found.images
    ]


def _size_and_time(folder: Path, name: str) -> tuple[int, int] | None:
    try:
        status = image_file(folder, name).stat()
    except (LeftOutError, OSError):
        return None
    return status.st_size, status.st_mtime_ns


# -- the processes -----------------------------------------------------------------------------------------


def processes(workers: int) -> Executor:
    """Return a pool of processes for `build`. They end with this one, whatever ends it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # The processes are forked when transformers is imported.
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin)


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _made(making: Making, digest: str, parts: Path, pool: Executor, ahead: int) -> Iterator[_Stretch]:
    """Make the part of each stretch that has none; yield each stretch, in order, when it has its part."""
    waiting: deque[tuple[_Stretch, concurrent.futures.Future[None] | None]] = deque()
    try:
        for stretch in _stretches(making, digest):
            there = (parts / stretch.part).exists()
            waiting.append((stretch, None if there else pool.submit(_make, making, stretch, parts)))
            while len(waiting) > ahead or (waiting and waiting[0][1] is None):
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()


def _finished(stretch: _Stretch, future: "concurrent.futures.Future[None] | None") -> _Stretch:
    try:
        if future is not None:
            future.result()
    except BrokenProcessPool:
        message = (
            "a process that read the store was killed. Is the memory full? What is done is kept: run it again"
        )
        raise WorldError(f"{message}, with fewer --workers.") from None
    return stretch


@functools.lru_cache(maxsize=1)
def _encoder(processor: Path) -> Encoder:
    return Encoder.of(processor)


def _make(making: Making, stretch: _Stretch, parts: Path) -> None:
    """Write the part of a stretch."""
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for record in stretch.records:
        name = f"#{record.number}"
        try:
            found = conversation(record.raw, name)
            name = found.id
            rows.append(_row(making, record, found))
        except LeftOutError as error:
            left_out.append({"number": record.number, "id": name, "reason": error.reason, "fact": error.fact})
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    longest = max((len(row["tokens"]) + sum(row["runs"][1::2]) for row in rows), default=0)
    write_rows(parts / stretch.part, [batch], {"left_out": left_out, "longest": longest})


def _row(making: Making, record: _Record, found: Any) -> dict[str, Any]:
    """Return the row of a record. Raises LeftOutError."""
    if record.is_duplicate:
        raise LeftOutError("duplicate id", f"an earlier record has the id {found.id!r}")
    raw = [(image, image_bytes(making.images, image)) for image in found.images]
    encoded = _encoder(making.processor).encode(found, [decoded(content, image) for image, content in raw])
    positions = len(encoded.tensors[LANGUAGE]["tokens"])
    if making.max_tokens and positions > making.max_tokens:
        raise LeftOutError("too many tokens", f"it takes {positions} positions")
    return row_of(encoded, name=found.id, offset=record.offset, size=len(record.raw), images=raw)


# -- the whole ---------------------------------------------------------------------------------------------


def _counted(folder: Path, parts: list[str]) -> dict[str, Any]:
    """Return the length of the longest sample, and how many records are left out by reason. Raises PlanError."""
    samples = longest = 0
    reasons: Counter[str] = Counter()
    for part in parts:
        batch, facts = read_part(folder / part)
        samples += batch.num_rows
        longest = max(longest, facts["longest"])
        reasons.update(entry["reason"] for entry in facts["left_out"])
    if not samples:
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "it is empty"
        remedy = "Check the store and its images; docs/data.md says what each reason means."
        raise PlanError(
            [Problem(str(folder.parent), f"no record of the store is a sample: {found}.", remedy)]
        )
    return {"longest": longest, "left_out": dict(reasons.most_common())}


def _digest(folder: Path, parts: list[str]) -> str:
    """Return a digest of the rows of parts."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(read_part(folder / part)[0].serialize())
    return hashed.hexdigest()


def _publish(out: Path, parts: list[str], facts: Facts) -> None:
    """Write the index from its parts, and remove parts that are of no use any more."""
    unfinished = out / f"{LEFT_OUT}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        _write_left_out(file, out / PARTS, parts)
    unfinished.replace(out / LEFT_OUT)
    batches = (read_part(out / PARTS / part)[0] for part in parts)
    write_rows(out / ROWS, batches, {"version": VERSION, **attrs.asdict(facts)})
    for path in (out / PARTS).glob("*.arrow"):
        if path.name not in set(parts):
            path.unlink()


def _write_left_out(file: TextIO, folder: Path, parts: list[str]) -> None:
    for part in parts:
        entries: list[Mapping[str, Any]] = read_part(folder / part)[1]["left_out"]
        file.writelines(f"{json.dumps(entry)}\n" for entry in entries)
