"""Indexing: a store read once, in parallel, into an index.

The records of a store are cut into stretches. A part holds the rows of a stretch, and its name is a digest of all that
it is made of: the bytes of the records, the sizes and times of the media, the processor and the options. So a part
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
from mimogrid.shell.data.conversations import Conversation, LeftOutError, conversation
from mimogrid.shell.data.encoding import Encoder
from mimogrid.shell.data.index import (
    LEFT_OUT,
    PARTS,
    ROWS,
    SCHEMA,
    VERSION,
    Facts,
    StoreFacts,
    digest_of_store,
    processor_digest,
    read_part,
    row_of,
    stamp_of_store,
    write_rows,
)
from mimogrid.shell.data.store import Raw, Store
from mimogrid.shell.data.stores import open_store


RECORDS = 256
"""Records of a stretch."""

Progress = Callable[[int, int], None]
"""Is told of records that were read, and of the bytes of the store up to there."""


@attrs.frozen(kw_only=True)
class Making:
    """What an index is made of: the store, its images and sounds, the folder of the processor, and the options."""

    store: Path
    media: Path
    processor: Path
    max_tokens: int = 0
    columns: tuple[tuple[str, str], ...] = ()

    def open(self) -> Store:
        """Return the store. Raises PlanError."""
        try:
            return open_store(self.store, self.media, dict(self.columns))
        except OSError as error:
            raise _unreadable(self.store, error) from None


@attrs.frozen
class _Record:
    """A record: its number in the store, and whether an earlier one has its id."""

    number: int
    raw: Raw
    is_duplicate: bool


@attrs.frozen
class _Stretch:
    """Neighbouring records, and the name of their part."""

    records: tuple[_Record, ...]
    part: str

    @property
    def end(self) -> int:
        """The bytes of the store up to here."""
        return self.records[-1].raw.end


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
        opened = making.open()
        store = _facts_of_store(making, opened, out)
        digest = processor_digest(making.processor)
        parts: list[str] = []
        for stretch in _made(making, opened, digest, out / PARTS, pool, ahead=ahead):
            parts.append(stretch.part)
            progress(len(stretch.records), stretch.end)
        _check_unchanged(making.store, opened, store)
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


def _facts_of_store(making: Making, store: Store, out: Path) -> StoreFacts:
    try:
        return StoreFacts(
            path=os.path.relpath(making.store, out),
            media=os.path.relpath(making.media, out),
            columns=dict(making.columns),
            size=sum(file.stat().st_size for file in store.files),
            stamp=stamp_of_store(store),
            digest=digest_of_store(store),
        )
    except OSError as error:
        raise _unreadable(making.store, error) from None


def _unreadable(store: Path, error: OSError) -> PlanError:
    remedy = "Name a store of conversations; see docs/data.md."
    return PlanError([Problem(str(store), f"cannot be read: {error.strerror}.", remedy)])


def _check_unchanged(path: Path, store: Store, before: StoreFacts) -> None:
    try:
        changed = stamp_of_store(store) != before.stamp
    except OSError as error:
        raise _unreadable(path, error) from None
    if changed:
        remedy = "Run it again when nobody writes there: parts that are still right are kept."
        raise PlanError([Problem(str(path), "has changed while it was read.", remedy)])


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


def _stretches(making: Making, store: Store, digest: str) -> Iterator[_Stretch]:
    """Yield the stretches of a store."""
    config = hashlib.blake2b((making.processor / "config.json").read_bytes()).hexdigest()
    made_by = [VERSION, _versions(), digest, config, making.max_tokens, str(making.media), making.columns]
    seen: set[bytes] = set()
    records: list[_Record] = []
    key = hashlib.blake2b(digest_size=16)
    for number, raw in enumerate(store.records()):
        if not records:
            key = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=16)
        name, places = _looked_at(raw, number)
        records.append(_Record(number, raw, name in seen))
        seen.add(name)
        stamps = [(place, store.stamp(place)) for place in places]
        where = [number, raw.name, raw.file, raw.offset, len(raw.text), records[-1].is_duplicate, stamps]
        key.update(json.dumps(where).encode() + raw.text)
        if len(records) == RECORDS:
            yield _Stretch(tuple(records), f"{key.hexdigest()}.arrow")
            records.clear()
    if records:
        yield _Stretch(tuple(records), f"{key.hexdigest()}.arrow")


def _looked_at(raw: Raw, number: int) -> tuple[bytes, list[str]]:
    """Return a digest of a record's id, and where its images and sounds lie."""
    try:
        found = conversation(raw.text, raw.name, raw.offered)
    except LeftOutError:
        return str(number).encode(), []
    places: list[str] = []
    for medium in found.media:
        with contextlib.suppress(LeftOutError):
            places.append(raw.place(medium.name or ""))
    return hashlib.blake2b(found.id.encode(), digest_size=12).digest(), places


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


def _made(
    making: Making, store: Store, digest: str, parts: Path, pool: Executor, *, ahead: int
) -> Iterator[_Stretch]:
    """Make the part of each stretch that has none; yield each stretch, in order, when it has its part."""
    waiting: deque[tuple[_Stretch, concurrent.futures.Future[None] | None]] = deque()
    try:
        for stretch in _stretches(making, store, digest):
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
    store = making.open()
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for record in stretch.records:
        name = record.raw.name
        try:
            found = conversation(record.raw.text, name, record.raw.offered)
            name = found.id
            rows.append(_row(making, store, record, found))
        except LeftOutError as error:
            left_out.append({"number": record.number, "id": name, "reason": error.reason, "fact": error.fact})
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    longest = max((len(row["tokens"]) + sum(row["runs"][1::2]) for row in rows), default=0)
    write_rows(parts / stretch.part, [batch], {"left_out": left_out, "longest": longest})


def _row(making: Making, store: Store, record: _Record, found: Conversation) -> dict[str, Any]:
    """Return the row of a record. Raises LeftOutError."""
    if record.is_duplicate:
        raise LeftOutError("duplicate id", f"an earlier record has the id {found.id!r}")
    encoder = _encoder(making.processor)
    media = [(m.kind, m.name or "", record.raw.place(m.name or "")) for m in found.media]
    read = [(kind, place, store.read(place)) for kind, _, place in media]
    objects = [
        encoder.decoded(kind, content, name)
        for (kind, name, _), (_, _, content) in zip(media, read, strict=True)
    ]
    encoded = encoder.encode(found, objects)
    positions = len(encoded.tensors[LANGUAGE]["tokens"])
    if making.max_tokens and positions > making.max_tokens:
        raise LeftOutError("too many tokens", f"it takes {positions} positions")
    return row_of(encoded, name=found.id, raw=record.raw, media=read)


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
        remedy = "Check the store, its images and sounds; docs/data.md says what each reason means."
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
