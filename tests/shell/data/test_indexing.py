"""An index is its store, as the processor reads it: whatever was there before, and whatever went wrong on the way."""

import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.data import indexing
from mimogrid.shell.data.index import (
    LEFT_OUT,
    PARTS,
    ROWS,
    Index,
    check_processor,
    check_store,
)
from mimogrid.shell.data.indexing import Making, build
from stores import Inline, image, indexed, record, write_lines


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "RECORDS", 4)


def left_out(index: Index) -> dict[int, str]:
    """Return why records were left out, by their number in the store."""
    lines = (index.folder / LEFT_OUT).read_text().splitlines()
    return {entry["number"]: entry["reason"] for entry in map(json.loads, lines)}


def test_what_cannot_be_a_sample_is_left_out_and_counted(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record of each kind among good ones; the good ones are there, in order."""
    good, huge = image(tmp_path, "a.png"), image(tmp_path, "huge.png", size=(80, 80))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 80)
    records = {
        "good": record(0, good),
        "text": record(1),
        "broken image": record(2, "cut.png"),
        "missing file": record(3, "none.png"),
        "path": record(4, "../a.png"),
        "huge image": record(5, huge),
        "duplicate id": record(0),
        "empty answer": record(6, answer=" "),
        "no counted token": {"id": "r7", "conversations": [{"from": "human", "value": "Read"}]},
        "too many tokens": record(8, good, good, good),
        "not UTF-8": json.dumps(record(9)).encode().replace(b"digits", b"\xff\xfe"),
        "no JSON": b'{"id": "r10", "conversations"',
        "no conversation": {"id": "r11"},
        "media": {**record(12), "image": good},
        "control token": record(13, question="Read </s>"),
        "two": record(14, good, good),
    }
    store = write_lines(tmp_path / "store.jsonl", list(records.values()))
    index, _ = indexed(store, llava, max_tokens=50)
    kept = {"good", "text", "two"}
    assert [index[row]["id"] for row in range(len(index))] == ["r0", "r1", "r14"]
    assert left_out(index) == {n: why for n, why in enumerate(records) if why not in kept}
    assert index.facts.left_out == Counter(set(records) - kept)
    two = index.record(2).described(0, "language")
    assert two.segments == {"vision": ((1, 4, 4), (1, 4, 4))}
    assert index.facts.longest == two.length + two.rows["vision"]
    assert (
        store.read_bytes()[index[2]["offset"] :][: index[2]["size"]]
        == json.dumps(records["two"]).encode() + b"\n"
    )


def test_what_is_there_already_is_not_read_again(llava: Path, tmp_path: Path) -> None:
    """Only what a store has more, or an image that is another; with other options all. The index is as if new."""
    names = [image(tmp_path, f"{n}.png", n) for n in range(12)]
    records = [record(n, name) for n, name in enumerate(names)]
    store = write_lines(tmp_path / "store.jsonl", records)
    made = [indexed(store, llava)[1], indexed(store, llava)[1]]
    write_lines(store, [*records, record(12), record(3)])
    made.append(indexed(store, llava)[1])
    image(tmp_path, "5.png", 99)
    made.append(indexed(store, llava)[1])
    made.append(indexed(store, llava, max_tokens=1000)[1])
    assert made == [3, 0, 1, 1, 4]
    index = Index(store.with_suffix(".index"))
    fresh, _ = indexed(store, llava, out=tmp_path / "fresh.index", max_tokens=1000)
    assert [index[row] for row in range(len(index))] == [fresh[row] for row in range(len(fresh))]
    assert left_out(index) == left_out(fresh) == {13: "duplicate id"}
    assert len(list((index.folder / PARTS).iterdir())) == 4


def test_an_index_holds_for_its_store_and_its_processor(llava: Path, tmp_path: Path) -> None:
    """Another text or another tokenizer would give other numbers; another time alone does not."""
    store = write_lines(tmp_path / "store.jsonl", [record(0)])
    index, _ = indexed(store, llava)
    os.utime(store, (1, 1))
    check_store(index)
    check_processor(index, llava)
    moved = shutil.copytree(llava, tmp_path / "moved")
    check_processor(index, moved)
    table = json.loads((moved / "processor_config.json").read_text())
    table["image_processor"]["image_mean"] = [0.5] * 3
    (moved / "processor_config.json").write_text(json.dumps(table))
    with pytest.raises(PlanError, match="another processor"):
        check_processor(index, moved)
    write_lines(store, [record(0, answer="1")])
    with pytest.raises(PlanError, match="has changed since"):
        check_store(index)
    store.unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        check_store(index)


def test_a_store_that_changes_while_it_is_read_gives_no_index(llava: Path, tmp_path: Path) -> None:
    """The index that was there stays."""
    store = write_lines(tmp_path / "store.jsonl", [record(n) for n in range(9)])
    before, _ = indexed(store, llava)
    making = Making(store=store, media=tmp_path, processor=llava, max_tokens=99)

    def change(*_: int) -> None:
        with store.open("ab") as file:
            file.write(b"\n")

    with pytest.raises(PlanError, match="has changed while it was read"):
        build(making, before.folder, Inline(), ahead=4, progress=change)
    assert len(Index(before.folder)) == 9
    assert Index(before.folder).facts.max_tokens == 0


def test_no_index_is_made_of_nothing(llava: Path, tmp_path: Path) -> None:
    """A store without samples, a store that is none, and an index that is made twice at once are refused."""
    store = write_lines(tmp_path / "store.jsonl", [record(n, "none.png") for n in range(5)])
    with pytest.raises(PlanError, match="5 missing file"):
        indexed(store, llava)
    with pytest.raises(PlanError, match="cannot be read"):
        indexed(tmp_path / "none.json", llava)
    with pytest.raises(PlanError, match="cannot be read"):
        Index(store.with_suffix(".index"))
    making = Making(store=write_lines(store, [record(0)]), media=tmp_path, processor=llava)
    out = tmp_path / "twice.index"
    with pytest.raises(PlanError, match="another process"):
        build(making, out, Inline(), ahead=4, progress=lambda *_: [build(making, out, Inline(), ahead=4)])


@pytest.mark.parametrize("harm", [b"", b"ARROW1", None])
def test_a_damaged_index_is_refused(llava: Path, tmp_path: Path, harm: bytes | None) -> None:
    """With the command that makes it again."""
    index, _ = indexed(write_lines(tmp_path / "store.jsonl", [record(0)]), llava)
    rows = index.folder / ROWS
    rows.write_bytes(rows.read_bytes()[:-9] if harm is None else harm)
    with pytest.raises(PlanError) as caught:
        Index(index.folder)
    assert "mimogrid data index" in caught.value.problems[0].remedy


def test_a_full_disk_leaves_the_index_that_was_there(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was being written is removed by the next run."""
    store = write_lines(tmp_path / "store.jsonl", [record(0)])
    before, _ = indexed(store, llava)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            indexed(store, llava, max_tokens=7)
    assert len(Index(before.folder)) == 1
    index, _ = indexed(store, llava)
    assert not list(index.folder.rglob("*.tmp"))


def test_a_killed_run_goes_on_where_it_was(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, nothing is made twice, and there is no index before it is whole."""
    store = write_lines(tmp_path / "store.jsonl", [record(n) for n in range(200)])
    out, make = store.with_suffix(".index"), indexing._make
    with monkeypatch.context() as patched:
        patched.setattr(indexing, "_make", lambda *arguments: (make(*arguments), time.sleep(0.05)))
        process = multiprocessing.get_context("fork").Process(target=indexed, args=(store, llava))
        process.start()
    while len(list(out.glob(f"{PARTS}/*.arrow"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    there = len(list(out.glob(f"{PARTS}/*.arrow")))
    assert 3 <= there < 50
    assert not (out / ROWS).exists()
    index, made = indexed(store, llava)
    assert made == 50 - there
    assert [index[row]["id"] for row in range(len(index))] == [f"r{n}" for n in range(200)]
