"""Columns: a store of Parquet or Arrow files as `datasets` writes them, one or a folder of them, with media in columns.

A cell of an image or a sound is a struct of `bytes` and `path`, the bytes alone, the name of a file in the folder of
the media, or a list of these. A place is the row and the column of a cell (``data.parquet#17/image/0``). Arrow files
are memory-mapped; of a Parquet file the row group is read that has the row, and the last one is kept.
"""

import bisect
import functools
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pyarrow as pa
import pyarrow.parquet as pq

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.data.conversations import LISTS, LeftOutError, Medium
from mimogrid.shell.data.store import Raw, Stamp, media_bytes, media_file, stamp_of


ENDINGS = (".parquet", ".arrow")
TEXTS = ("id", "conversations", "messages", "question", "answer")
"""What a record says; columns may have these names, or `columns` says which does."""
ROLES = (*TEXTS, *(name for names in LISTS.values() for name in names))
_PLACE = re.compile(r"(.+)#(\d+)/([^/]+)/(\d+)")


@attrs.frozen
class Columns:
    """Tables of records.

    Attributes:
        folder: where the files are.
        names: the files, in order.
        media: the folder of images and sounds that only have a name.
        columns: the column of each of `ROLES`, where it is called otherwise.
    """

    folder: Path
    names: tuple[str, ...]
    media: Path
    columns: Mapping[str, str]
    holds_media = True

    @property
    def files(self) -> Sequence[Path]:
        """The files, in the order of their names."""
        return tuple(self.folder / name for name in self.names)

    def records(self) -> Iterator[Raw]:
        """Yield the rows. One without an id is called by its number, counted over all files."""
        number = before = 0
        for name in self.names:
            path = self.folder / name
            table = _open(path, path.stat().st_mtime_ns)
            columns, size = self._chosen(path, table.schema), path.stat().st_size
            for piece in range(len(table.starts) - 1):
                try:
                    rows = _rows(table.piece(piece, tuple(columns.values())))
                except (pa.ArrowException, OSError) as error:
                    raise _broken(path, error) from None
                for row, values in enumerate(rows, table.starts[piece]):
                    end = before + size * (row + 1) // table.starts[-1]
                    if isinstance(values, bytes):
                        yield Raw(name, row, 0, end, values, f"#{number}")
                    else:
                        said = {role: values[column] for role, column in columns.items()}
                        yield self._record(name, row, end, f"#{number}", said)
                    number += 1
            before += size

    def stamp(self, place: str) -> Stamp | None:
        """Return the stamp of the file of a table, or of a file in the folder."""
        found = _PLACE.fullmatch(place)
        try:
            return stamp_of(self.folder / found[1] if found else media_file(self.media, place))
        except LeftOutError:
            return None

    def read(self, place: str) -> bytes:
        """Return the bytes of a cell, or of a file in the folder. Raises LeftOutError."""
        found = _PLACE.fullmatch(place)
        if found is None:
            return media_bytes(self.media, place)
        name, row, column, number = found[1], int(found[2]), found[3], int(found[4])
        if name not in self.names:
            raise LeftOutError("missing file", f"{place!r} is in no file of the store")
        path = self.folder / name
        try:
            table = _open(path, path.stat().st_mtime_ns)
            piece = bisect.bisect_right(table.starts, row) - 1
            with _READING:
                cell = _kept(table, piece, column)[row - table.starts[piece]].as_py()
            found_bytes = _bytes((cell if isinstance(cell, list) else [cell])[number])
        except (OSError, PlanError, pa.ArrowException, IndexError, KeyError) as error:
            raise LeftOutError("missing file", f"{place!r}: {error}"[:200]) from None
        if found_bytes is None:
            raise LeftOutError("missing file", f"{place!r}: the cell has no bytes")
        return found_bytes

    def _chosen(self, path: Path, schema: pa.Schema) -> dict[str, str]:
        """Return the column of each role that a table has one for. Raises PlanError if it can have no records."""
        there = ", ".join(schema.names)
        for role, column in self.columns.items():
            if column not in schema.names:
                message = f"has no column '{column}' for '{role}'; it has {there}."
                raise PlanError([Problem(str(path), message, "Name another with --columns ROLE=COLUMN.")])
        chosen = {role: self.columns.get(role, role) for role in ROLES}
        chosen = {role: column for role, column in chosen.items() if column in schema.names}
        if not {"conversations", "messages", "answer"} & set(chosen):
            message = f"has no column 'messages', 'conversations' or 'answer'; it has {there}."
            remedy = "Say which column is what: --columns question=COLUMN,answer=COLUMN."
            raise PlanError([Problem(str(path), message, remedy)])
        return chosen

    def _record(self, name: str, row: int, end: int, called: str, values: Mapping[str, Any]) -> Raw:
        offered: list[Medium] = []
        places: dict[str, str] = {}
        for kind, role in ((kind, role) for kind, roles in LISTS.items() for role in roles):
            column, cells = self.columns.get(role, role), values.get(role)
            if not isinstance(cells, list):
                cells = [] if _bytes(cells) is None and _path(cells) is None else [cells]
            for number, cell in enumerate(cells):
                place = f"{name}#{row}/{column}/{number}" if _bytes(cell) is not None else _path(cell)
                alias = _path(cell) or place
                # Rows of `datasets` may use one name for several images.
                called_so = place if alias in places else alias
                offered.append(Medium(kind, called_so or "\N{REPLACEMENT CHARACTER}"))
                places[offered[-1].name or ""] = place or ""
        said = {role: _said(values[role]) for role in TEXTS if values.get(role) is not None}
        text = json.dumps(said, default=str).encode()
        return Raw(name, row, 0, end, text, called, tuple(offered), places)


def _rows(piece: pa.Table) -> list[dict[str, Any] | bytes]:
    """Return rows as Python values; of a row with a cell that has no such value bytes that are no record, either."""
    try:
        rows: list[dict[str, Any] | bytes] = piece.to_pylist()
    except pa.ArrowException:
        raise
    except (ValueError, OverflowError) as error:  # a text that is no UTF-8, a time beyond the calendar
        if piece.num_rows == 1:
            return [error.object if isinstance(error, UnicodeDecodeError) else b"null"]
        half = piece.num_rows // 2
        return [*_rows(piece.slice(0, half)), *_rows(piece.slice(half))]
    return rows


def _said(value: Any) -> Any:
    """Return a cell without what is null; a struct of lists becomes a list of structs."""
    if isinstance(value, Mapping):
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        if value and len(lists) == len(value) and len({len(item) for item in lists.values()}) == 1:
            return [
                _said(dict(zip(lists, items, strict=True))) for items in zip(*lists.values(), strict=True)
            ]
        return {key: _said(item) for key, item in value.items() if item is not None}
    return [_said(item) for item in value] if isinstance(value, list) else value


def _bytes(cell: Any) -> bytes | None:
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    return content if isinstance(content, bytes) else None


def _path(cell: Any) -> str | None:
    name = cell.get("path") if isinstance(cell, Mapping) else cell
    return name if isinstance(name, str) and name else None


# -- a file ------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Table:
    """An open file in pieces: row groups of Parquet, batches of Arrow; `starts` are their first rows, and the end."""

    schema: pa.Schema
    starts: tuple[int, ...]
    groups: pq.ParquetFile | None = None
    batches: tuple[pa.RecordBatch, ...] = ()

    def piece(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of a piece."""
        if self.groups is not None:
            return self.groups.read_row_group(number, columns=list(columns), use_threads=False)
        return pa.Table.from_batches([self.batches[number]]).select(list(columns))


@functools.lru_cache(maxsize=16)
def _open(path: Path, _mtime_ns: int) -> _Table:
    """Open a file; what changes is opened anew. Raises PlanError if it is neither Parquet nor Arrow."""
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            return _Table(file.schema_arrow, tuple(itertools.accumulate(counts, initial=0)), groups=file)
        mapped = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_file(mapped)
            batches = tuple(reader.get_batch(number) for number in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # `datasets` writes streams.
            mapped.seek(0)
            reader = pa.ipc.open_stream(mapped)
            batches = tuple(reader)
        counts = [batch.num_rows for batch in batches]
        return _Table(reader.schema, tuple(itertools.accumulate(counts, initial=0)), batches=batches)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> PlanError:
    fact = next(iter(str(error).splitlines()), type(error).__name__)
    return PlanError([Problem(str(path), f"is no whole Parquet or Arrow file: {fact}", "Copy it again.")])


_READING = threading.Lock()
"""Threads that load share an open file of Parquet, which one at a time may read."""


@functools.lru_cache(maxsize=2)
def _kept(table: _Table, piece: int, column: str) -> pa.ChunkedArray:
    return table.piece(piece, (column,)).column(column)
