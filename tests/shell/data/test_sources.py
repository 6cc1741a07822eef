"""Sources of indexes: what is described is what is loaded, in an order of its own for every epoch, alone or mixed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch

from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.core.job.changes import refused
from mimogrid.shell.data.conversations import conversation
from mimogrid.shell.data.encoding import Encoder, decoded
from mimogrid.shell.data.index import Index
from mimogrid.shell.job.jobs import Job, open_job
from stores import image, indexed, record, write_lines


Opens = Callable[..., Job]


@pytest.fixture
def index(llava: Path, tmp_path: Path) -> Index:
    """Return the index of a store of texts, images, and two images in a sample."""
    names = [image(tmp_path, f"{n}.png", n) for n in range(4)]
    records = [record(0, names[0]), record(1), record(2, names[1], names[2]), record(3, names[3], answer="2")]
    return indexed(write_lines(tmp_path / "store.jsonl", records), llava)[0]


@pytest.fixture
def opens(llava: Path, tmp_path: Path) -> Opens:
    """Return what opens a job of the tiny LLaVA with a table of data."""

    def open_data(data: Mapping[str, Any], **modules: Mapping[str, Any]) -> Job:
        vision: dict[str, Any] = {"model": "vit", "weights": str(llava), "feeds": ["language"]}
        vision |= {"projector": {"language": {"kind": "mlp", "ffn": 16}}}
        both = {"vision": vision, "language": {"model": "gpt", "weights": str(llava)}, **modules}
        path = tmp_path / "job.toml"
        tables = {"modules": {k: v for k, v in both.items() if v}, "data": data, "batch": {"global_size": 4}}
        path.write_text(tomlkit.dumps(tables))
        return open_job(path)

    return open_data


def test_what_is_described_is_loaded_as_the_processor_has_it(
    index: Index, opens: Opens, llava: Path, tmp_path: Path
) -> None:
    """Every sample, over two epochs; and the step that is planned of them."""
    job = opens({"source": "conversations", "options": {"index": "store.index"}})
    encoder, seen = Encoder.of(llava), list[str]()
    assert job.source is not None
    for sample_id in range(8):
        described = job.source.describe(sample_id)
        row = index[job.source.order.at(sample_id)]  # type: ignore[attr-defined]
        raw = (tmp_path / "store.jsonl").read_bytes()[row["offset"] :][: row["size"]]
        images = [decoded((tmp_path / name).read_bytes(), name) for name in row["places"]]
        truth = encoder.encode(conversation(raw, ""), images)
        assert described.id == sample_id
        assert (described.length, described.rows, described.segments) == (
            truth.sample.length,
            truth.sample.rows,
            truth.sample.segments,
        )
        assert described.units == truth.sample.units
        assert described.placeholders.get("language", ()) == truth.sample.placeholders["language"]
        for module, tensors in truth.tensors.items():
            loaded = job.source.load(sample_id, module)
            assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
            assert loaded.keys() == tensors.keys()
        seen.append(row["id"])
    assert sorted(seen[:4]) == sorted(seen[4:]) == ["r0", "r1", "r2", "r3"]
    assert job.step(0).samples[0].id == 0


def test_an_image_that_is_another_one_is_an_error(index: Index, opens: Opens, tmp_path: Path) -> None:
    """It would give other numbers; one that is gone none."""
    source = opens({"source": "conversations", "options": {"index": "store.index", "shuffle": False}}).source
    assert source is not None
    image(tmp_path, "0.png", 99)
    with pytest.raises(WorldError, match=r"sample 'r0' .* '0.png' is another image"):
        source.load(0, "vision")
    (tmp_path / "3.png").unlink()
    with pytest.raises(WorldError, match=r"sample 'r3' .* no such file"):
        source.load(3, "vision")
    assert len(source.load(0, "language")["tokens"]) == 26


def test_what_is_too_long_for_the_job_can_be_dropped(index: Index, opens: Opens) -> None:
    """With `overflow`, as samples of any source; alone and in a mixture."""
    options = {"index": "store.index", "sequence": 30, "shuffle": False}
    entry = {"source": "conversations", "options": options}
    for data in (entry, {"mix": [entry]}):
        source = opens({**data, "overflow": "drop"}).source
        assert source is not None
        assert [source.describe(n).length for n in range(4)] == [10, 10, 0, 8]
    assert index.facts.longest == 42


def test_mixed_sources_have_their_shares(llava: Path, opens: Opens, index: Index, tmp_path: Path) -> None:
    """Three of one and one of the other in every four, each in its own order; weights may be fractions."""
    texts = write_lines(tmp_path / "texts.jsonl", [record(n, answer="7") for n in range(5)])
    indexed(texts, llava)
    of = ({"index": "store.index", "shuffle": False}, {"index": "texts.index", "shuffle": False})
    mix = [
        {"source": "conversations", "options": of[0], "weight": 0.75},
        {"source": "conversations", "options": of[1], "weight": 0.25},
    ]
    source = opens({"mix": mix}).source
    parts = [opens({"source": "conversations", "options": options}).source for options in of]
    assert source is not None
    assert None not in parts
    counts = [0, 0]
    for sample_id in range(16):
        part = int(float(source.describe(sample_id).units["language"]) == 2.0 and sample_id % 4 == 3)
        expected = parts[part]
        assert expected is not None
        for name, tensor in expected.load(counts[part], "language").items():
            assert torch.equal(tensor, source.load(sample_id, "language")[name])
        assert source.describe(sample_id).id == sample_id
        counts[part] += 1
    assert counts == [12, 4]


@pytest.mark.parametrize(
    ("data", "where", "why"),
    [
        ({"source": "conversations"}, "data.options.index", "is missing"),
        ({"source": "conversations", "options": {"index": "none"}}, "none", "cannot be read"),
        (
            {"source": "conversations", "options": {"index": "store.index", "sequence": 9}},
            "sequence",
            "takes 42",
        ),
        (
            {"source": "conversations", "options": {"index": "store.index", "checkpoint": "."}},
            "",
            "another processor",
        ),
        ({}, "data.source", "is missing"),
        ({"source": "digits", "mix": [{"source": "digits"}]}, "data.source", "the mixture names"),
        ({"mix": [{"source": "digits", "weight": 0.0}]}, "data.mix", "more than 0"),
        ({"mix": [{"source": "digit"}]}, "data.mix[0].source", "not a built-in source"),
        ({"mix": [{"source": "conversations"}]}, "data.mix[0].options.index", "is missing"),
    ],
)
def test_data_that_is_wrong_is_refused_before_anything_runs(
    index: Index, opens: Opens, data: Mapping[str, Any], where: str, why: str
) -> None:
    """With the place in the job file."""
    assert len(index) == 4
    with pytest.raises(PlanError) as caught:
        opens(data)
    assert any(where in p.where and why in p.message for p in caught.value.problems), caught.value


def test_a_run_goes_on_with_the_index_that_it_began_with(
    index: Index, opens: Opens, llava: Path, tmp_path: Path
) -> None:
    """Of a store that has grown it has other samples, in another order; a new index of the same store is the same."""
    data = {"source": "conversations", "options": {"index": "store.index"}}
    before = opens(data).spec
    (tmp_path / "store.index").rename(tmp_path / "old.index")
    records = [json.loads(line) for line in (tmp_path / "store.jsonl").read_text().splitlines()]
    indexed(write_lines(tmp_path / "store.jsonl", records), llava)
    assert not list(refused(before, opens(data).spec, accepted=()))
    indexed(write_lines(tmp_path / "store.jsonl", [*records, record(9)]), llava)
    after = opens(data).spec
    assert [change.key for change in refused(before, after, accepted=())] == ["data.options.digest"]
    assert not list(refused(before, after, accepted=("data.options.digest",)))
    pinned = {**data["options"], "digest": index.facts.digest}  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=r"data\.options\.digest"):
        opens({**data, "options": pinned})


def test_a_job_has_the_modules_that_an_index_is_for(index: Index, opens: Opens) -> None:
    """A language model alone would have placeholders and no rows."""
    assert len(index) == 4
    with pytest.raises(PlanError, match=r"\[modules.vision\]"):
        opens({"source": "conversations", "options": {"index": "store.index"}}, vision={})
