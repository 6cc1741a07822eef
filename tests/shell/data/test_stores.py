"""Tars and tables give the samples that a file of lines gives, and what is wrong with them is said."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomlkit
import torch

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.data import indexing
from mimogrid.shell.data.index import LEFT_OUT, Index, check_store
from mimogrid.shell.job.jobs import open_job
from stores import image, indexed, record, write_lines


Content = Mapping[str, bytes]


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "RECORDS", 4)


def tar(path: Path, content: Content) -> Path:
    """Write a tar of files."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, raw in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            file.addfile(member, io.BytesIO(raw))
    return path


def pictures(folder: Path) -> dict[str, bytes]:
    """Return the bytes of six images, which are also in a folder."""
    return {name: (folder / name).read_bytes() for name in (image(folder, f"{n}.png", n) for n in range(6))}


RECORDS = [
    record(0, "0.png"),
    record(1),
    record(2, "1.png", "2.png"),
    record(3, answer=""),
    record(4, "3.png"),
]


def as_tars(folder: Path, images: Content) -> Path:
    """Write the records as two tars; images have the names of the records, or are offered by their order."""
    shards: tuple[dict[str, bytes], ...] = ({}, {})
    for number, each in enumerate(RECORDS):
        shard, said = shards[number // 3], dict(each)
        named = said.pop("image", [])
        for place, name in enumerate([named] if isinstance(named, str) else named):
            shard[f"data/{number:04}.{place}.png"] = images[name]
        shard[f"data/{number:04}.json"] = json.dumps(said).encode()
    for number, shard in enumerate(shards):
        tar(folder / "tars" / f"shard-{number}.tar", shard)
    return folder / "tars"


def rows_of(images: Content) -> list[dict[str, Any]]:
    """Return the records as rows with images in a column, as `datasets` casts them; a name occurs twice in a row."""
    rows = []
    for each in RECORDS:
        named = each.get("image", [])
        cells = [
            {"bytes": images[name], "path": "x.png"}
            for name in ([named] if isinstance(named, str) else named)
        ]
        turns = [
            {"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]}
            for turn in each["conversations"]
        ]
        rows.append({"name": each["id"], "images": cells, "messages": turns})
    return rows


def as_parquet(folder: Path, images: Content) -> Path:
    """Write the records as two files of Parquet with row groups of two."""
    (folder / "parquet").mkdir()
    for number, rows in enumerate((rows_of(images)[:3], rows_of(images)[3:])):
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, folder / "parquet" / f"part-{number}.parquet", row_group_size=2)
    return folder / "parquet"


def as_arrow(folder: Path, images: Content) -> Path:
    """Write the records as a stream of Arrow, as `datasets` saves them."""
    path, table = folder / "table.arrow", pa.Table.from_pylist(rows_of(images), schema=SCHEMA)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("name", pa.string()), ("images", pa.list_(IMAGE)), ("messages", pa.list_(TURN))])


def source_of(folder: Path, llava: Path, index: Index) -> Any:
    """Return the source of an index, in the order of the store."""
    path = folder / "job.toml"
    vision = {"model": "vit", "weights": str(llava), "feeds": ["language"]}
    tables = {
        "modules": {
            "vision": {**vision, "projector": {"language": {"kind": "mlp", "ffn": 16}}},
            "language": {"model": "gpt", "weights": str(llava)},
        },
        "data": {"source": "conversations", "options": {"index": str(index.folder), "shuffle": False}},
        "batch": {"global_size": 4},
    }
    path.write_text(tomlkit.dumps(tables))
    return open_job(path).source


@pytest.mark.parametrize(
    ("write", "columns"), [(as_tars, {}), (as_parquet, {"id": "name"}), (as_arrow, {"id": "name"})]
)
def test_every_kind_of_store_gives_the_same_samples(
    write: Callable[[Path, Content], Path], columns: Mapping[str, str], llava: Path, tmp_path: Path
) -> None:
    """Descriptions, tokens and rows, and what is left out; renewed, no part is made twice."""
    images = pictures(tmp_path)
    lines, _ = indexed(write_lines(tmp_path / "store.jsonl", RECORDS), llava)
    store = write(tmp_path, images)
    other, made = indexed(store, llava, columns=columns)
    assert indexed(store, llava, columns=columns)[1] == 0
    assert made == 2
    assert [other[row]["id"] for row in range(len(other))] == ["r0", "r1", "r2", "r4"]
    assert lines.facts.left_out == other.facts.left_out == {"empty answer": 1}
    sources = [source_of(tmp_path, llava, index) for index in (lines, other)]
    for row in range(4):
        assert sources[0].describe(row) == sources[1].describe(row)
        for module in ("language", "vision") if sources[0].describe(row).rows else ("language",):
            first, second = (source.load(row, module) for source in sources)
            assert all(torch.equal(first[name], second[name]) for name in first)
    check_store(other)


@pytest.mark.parametrize("cut", [20, 700, 2560, 2900, 11_776])
def test_a_tar_that_is_cut_off_is_refused(cut: int, llava: Path, tmp_path: Path) -> None:
    """In a header, in a file, or between two: it must not pass for a shorter one."""
    content = {f"{n}.json": json.dumps(record(n)).encode() for n in range(9)}
    path = tar(tmp_path / "a.tar", {"0.png": bytes(2000), **content})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(PlanError, match=r"cut off|no whole tar"):
        indexed(path, llava)


def test_what_is_wrong_in_a_tar_is_left_out(llava: Path, tmp_path: Path) -> None:
    """A record sees no file but its own; a key that comes again is a second record with that id."""
    picture = pictures(tmp_path)["0.png"]
    good = json.dumps({"answer": "7"}).encode()
    content = {
        "a.png": picture, "a.json": good,
        "b.txt": b"3 1 4", "b.png": picture,
        "c.txt": b"\xff\xfe", "c.png": picture,
        "d.png": picture,
        "e.json": json.dumps({"image": "a.png", "answer": "7"}).encode(),
        "f.json": json.dumps({"image": "a.tar@512+100", "answer": "7"}).encode(),
        "g.png": picture[:50], "g.json": good,
        "h.left.png": picture, "h.right.png": picture, "h.json": good[:-1] + b', "image": "right.png"}',
        "i.png": picture, "i.json": json.dumps({"conversations": record(1)["conversations"]}).encode(),
        "j/a.png": picture, "j/a.json": good,
    }  # fmt: skip
    path = tar(tmp_path / "a.tar", content)
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("k.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
        member = tarfile.TarInfo("k.json")
        member.size = len(good)
        file.addfile(member, io.BytesIO(good))
    index, _ = indexed(path, llava)
    assert [index[row]["id"] for row in range(len(index))] == ["a", "b", "h", "j/a"]
    lines = map(json.loads, (index.folder / LEFT_OUT).read_text().splitlines())
    assert {line["id"]: line["reason"] for line in lines} == {
        "c": "not UTF-8",
        "d": "no conversation",
        "e": "missing file",
        "f": "missing file",
        "g": "broken image",
        "i": "media",
        "k": "no conversation",
    }
    place = index.media(2)[0][1]
    assert index.store().read(place) == picture
    assert int(place.partition("@")[2].partition("+")[0]) > path.read_bytes().index(b"h.right.png")


def test_tables_have_null_cells_and_names_of_files(llava: Path, tmp_path: Path) -> None:
    """A row without an image is a text; one whose image is a file takes it from the folder, and from nowhere else."""
    picture = pictures(tmp_path)["0.png"]
    rows = [
        {"q": "Read", "a": "1", "img": {"bytes": picture, "path": None}},
        {"q": "Read", "a": "2", "img": {"bytes": None, "path": None}},
        {"q": "Read", "a": "3", "img": None},
        {"q": None, "a": "4", "img": {"bytes": None, "path": "1.png"}},
        {"q": "Read", "a": "5", "img": {"bytes": None, "path": "../1.png"}},
        {"q": "Read", "a": None, "img": None},
        {"q": "Read", "a": "6", "img": {"bytes": picture[:60], "path": "1.png"}},
    ]
    schema = pa.schema([("q", pa.string()), ("a", pa.string()), ("img", IMAGE)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    columns = {"question": "q", "answer": "a", "image": "img"}
    index, _ = indexed(path, llava, columns=columns)
    assert [index[row]["id"] for row in range(len(index))] == ["#0", "#1", "#2", "#3"]
    assert [[place for _, place, _ in index.media(row)] for row in range(4)] == [
        ["a.parquet#0/img/0"],
        [],
        [],
        ["1.png"],
    ]
    assert index.facts.left_out == {"path": 1, "no conversation": 1, "broken image": 1}
    image(tmp_path, "1.png", 99)
    assert indexed(path, llava, columns=columns)[1] == 1
    for wrong, why in (
        ({}, "no column 'messages'"),
        ({"answer": "b"}, "no column 'b'"),
        ({"reply": "a"}, "nothing that a record has"),
    ):
        with pytest.raises(PlanError, match=why):
            indexed(path, llava, columns=wrong)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PlanError, match="no whole Parquet"):
        indexed(path, llava, columns=columns)


def test_a_row_with_a_cell_that_is_no_value_is_left_out(llava: Path, tmp_path: Path) -> None:
    """Text that is no UTF-8, and a time beyond the calendar; the rows beside them are samples."""
    answers = pa.array([b"1", b"\xff\xfe", b"3", b"4", b"5"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 5, answers.buffers())
    times = pa.array([0, 1, 2**62, 3, 4], pa.timestamp("us"))
    pq.write_table(pa.table({"id": times, "question": ["Read"] * 5, "answer": texts}), tmp_path / "a.parquet")
    index, _ = indexed(tmp_path / "a.parquet", llava)
    assert len(index) == 3
    assert index.facts.left_out == {"not UTF-8": 1, "no conversation": 1}
    said = [json.loads(line) for line in (index.folder / LEFT_OUT).read_text().splitlines()]
    assert [(entry["number"], entry["id"]) for entry in said] == [(1, "#1"), (2, "#2")]


def test_what_is_no_store_is_refused(llava: Path, tmp_path: Path) -> None:
    """A folder without files of a store, or with two kinds, and compressed files."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(PlanError, match=r"has no \.tar"):
        indexed(folder, llava)
    tar(folder / "a.tar", {})
    with pytest.raises(PlanError, match="it is empty"):
        indexed(folder, llava)
    (folder / "a.parquet").touch()
    with pytest.raises(PlanError, match="files of one kind"):
        indexed(folder, llava)
    for name in ("a.tar.gz", "a.jsonl.zst"):
        (tmp_path / name).touch()
        with pytest.raises(PlanError, match="is compressed"):
            indexed(tmp_path / name, llava)
    (tmp_path / "a.arrow").write_bytes(b"ARROW1")
    with pytest.raises(PlanError, match="no whole Parquet or Arrow"):
        indexed(tmp_path / "a.arrow", llava)


def test_a_store_that_holds_its_media_may_be_copied(llava: Path, tmp_path: Path) -> None:
    """Other times alone do not matter; another image, a missing file and one more do."""
    images = pictures(tmp_path)
    store = as_tars(tmp_path, images)
    index, _ = indexed(store, llava)
    shard = store / "shard-0.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw)
    check_store(index)
    place = index.media(0)[0][1]
    offset = int(place.partition("@")[2].partition("+")[0])
    shard.write_bytes(raw[: offset + 60] + b"?" + raw[offset + 61 :])
    with pytest.raises(Exception, match="is another image"):
        source_of(tmp_path, llava, index).load(0, "vision")
    shard.write_bytes(raw)
    shutil.copy(shard, store / "shard-2.tar")
    with pytest.raises(PlanError, match="has changed since"):
        check_store(index)
    shutil.rmtree(store)
    with pytest.raises(PlanError, match="cannot be read"):
        check_store(index)
