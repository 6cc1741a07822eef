"""`mimogrid data`: an index is made by processes of its own, shown and summed up."""

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.cli.main import main
from mimogrid.shell.data.index import Index
from stores import image, indexed, listener, record, write_lines


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with a text, one image, two images, and a record without an answer."""
    folder: Path = tmp_path_factory.mktemp("store")
    names = [image(folder, f"{n}.png", n) for n in range(3)]
    records = [record(0, names[0]), record(1, answer="7"), record(2, *names[1:]), record(3, answer="")]
    return write_lines(folder / "store.jsonl", records)


def test_an_index_is_made_by_processes(store: Path, llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the one that is made in this process; the command says what it left out."""
    alone, _ = indexed(store, llava, out=store.parent / "alone.index")
    assert main(["data", "index", str(store), "--processor", str(llava), "--workers", "1"]) == 0
    index, said = Index(store.with_suffix(".index")), capsys.readouterr().out
    assert [index[row] for row in range(3)] == [alone[row] for row in range(3)]
    assert f"{index.folder}: 3 samples, at most 42 positions each" in said
    assert "records left out: 1; " in said
    assert "1  empty answer: an assistant says nothing" in said
    assert main(["data", "index", str(store), "--processor", str(llava), "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["longest"], found["left_out"]) == (3, 42, {"empty answer": 1})


def test_a_sample_is_shown_as_what_it_becomes(
    store: Path, llava: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Text, rows where they go, and what counts; its images in one picture."""
    index, _ = indexed(store, llava)
    show = ["data", "show", str(index.folder)]
    assert main([*show, "--id", "r2", "--picture", str(tmp_path / "r2.png")]) == 0
    said = capsys.readouterr().out
    assert "10 tokens, 32 placeholders, 4 tokens that count" in said
    assert "vision reads 1 x 4 x 4, 1 x 4 x 4 rows" in said
    assert [line.split() for line in said.splitlines()[-4:]] == [
        ["text", "<s>", "USER:"],
        ["placeholders", "32", "rows"],
        ["text", "Read", "the", "digits", "ASSISTANT:"],
        ["counts", "3", "1", "4", "</s>"],
    ]
    with Image.open(tmp_path / "r2.png") as picture, Image.open(store.parent / "2.png") as second:
        assert picture.size == (32 + 4 + 32, 8)
        assert picture.crop((36, 0, 68, 8)).tobytes() == second.tobytes()
    assert main([*show, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["id"], found["row"], found["units"]) == ("r0", 0, 4.0)
    assert [(piece["kind"], piece["positions"]) for piece in found["pieces"]][1] == ("placeholders", 16)
    for wrong, why in (
        (["--id", "r9"], "has no sample 'r9'"),
        (["--id", "r1", "--picture", str(tmp_path / "r1.png")], "has no image and no sound"),
        (["--picture", str(tmp_path / "none" / "a.png")], "cannot be written"),
    ):
        assert main([*show, *wrong]) == 2
        assert why in capsys.readouterr().err


def test_a_sound_is_shown_as_its_waveform(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that rises and falls is above the middle, then below it."""
    wave = np.repeat([0.0, 0.5, -1.0], 2000)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    store = write_lines(tmp_path / "store.jsonl", [{"audio": "a.wav", "answer": "A bird"}])
    index, _ = indexed(store, listener(tmp_path / "checkpoint"))
    assert main(["data", "show", str(index.folder), "--picture", str(tmp_path / "a.png")]) == 0
    assert f"sound {tmp_path / 'a.wav'}" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        ink = (np.asarray(picture)[..., 0] < 100).nonzero()
        rows = [int(np.median(ink[0][(ink[1] > left) & (ink[1] < left + 100)])) for left in (30, 190, 350)]
        assert picture.size == (480, 120)
    assert rows == pytest.approx([60, 30, 119], abs=1)


def test_samples_are_summed_up(store: Path, llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text, as a picture, and for scripts."""
    index, _ = indexed(store, llava)
    drawn = index.folder / "drawn.svg"
    assert main(["data", "stats", str(index.folder), "--svg", str(drawn)]) == 0
    said = capsys.readouterr().out
    assert "positions of a sample   min 8   median 26   mean 25.3   95 % 42   max 42" in said
    assert "rows that vision reads of a sample   min 0   median 16   mean 16.0   95 % 32   max 32" in said
    assert "left out: 1 empty answer" in said
    texts = [element.text for element in ET.parse(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert "store.index: 3 samples" in texts
    assert main(["data", "stats", str(index.folder), "--json"]) == 0
    histograms = {each["name"]: each for each in json.loads(capsys.readouterr().out)["histograms"]}
    assert sum(histograms["tokens that count in the loss"]["counts"]) == 3
    assert histograms["kFLOPs of a sample, forward and backward"]["quantiles"][0] > 0


def test_a_sample_costs_what_a_job_computes_of_it(
    store: Path, llava: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Less where a job freezes the tower; without a job and a model, nothing is said of it."""
    index, _ = indexed(store, llava)
    job = tmp_path / "job.toml"
    tables = "[modules.vision]\nfrozen = true\n[modules.language]\n"
    data = f'[data]\nsource = "conversations"\noptions = {{ index = "{index.folder}" }}\n'
    job.write_text(f'weights = "{llava}"\n{tables}{data}[batch]\nglobal_size = 1\n')
    costs: list[list[int]] = []
    for more in ([], ["--job", str(job)]):
        assert main(["data", "stats", str(index.folder), "--json", *more]) == 0
        costs.append(json.loads(capsys.readouterr().out)["histograms"][-1]["quantiles"])
    assert costs[0][0] == costs[1][0], "the text has no image"
    assert costs[0][3] > costs[1][3]
    assert main(["data", "stats", str(index.folder), "--job", str(tmp_path / "none.toml")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    elsewhere = shutil.copytree(index.folder, tmp_path / "moved" / "store.index")
    assert main(["data", "stats", str(elsewhere)]) == 0
    assert "operations of a sample are not known; name a job with --job" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["data"], "'data' is no command"),
        (["data", "indx"], "Did you mean 'data index'?"),
        (["data", "stats", "none"], "none: cannot be read"),
        (["data", "index", "none.json", "--processor", "none"], "has no processor"),
        (["data", "index", "none.json", "--processor", "none", "--workers", "-1"], "below 0"),
    ],
)
def test_wrong_commands_are_refused(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2 and the reason."""
    assert main(words) == 2
    assert why in capsys.readouterr().err


def test_a_missing_folder_is_no_index(tmp_path: Path) -> None:
    """The error names the command that makes one."""
    with pytest.raises(PlanError, match="mimogrid data index STORE"):
        Index(tmp_path)
