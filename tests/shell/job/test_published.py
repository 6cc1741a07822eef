"""Published checkpoints that are read: what is wrong with a folder is said in one error, before anything starts."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import mangled
from mangled import CONFIGS, LLAVA, write
from mimogrid.core.base.errors import PlanError
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.published import CONFIG, INDEX, ONE_FILE, published


NORM = "model.norm.weight"
Change = Callable[[Path], object]


@pytest.mark.parametrize("seed", [0])
def test_whatever_is_edited_is_refused_or_read_as_it_is(seed: int) -> None:
    """Hundreds of edits, within 200 MB and 10 seconds each; what is accepted is what safetensors reads."""
    process = subprocess.run(
        [sys.executable, mangled.__file__, str(seed), "400"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert 0 == process.returncode, process.stdout + process.stderr


def config(**changes: Any) -> Change:
    """A config with other values."""
    return lambda folder: (folder / CONFIG).write_text(json.dumps({**CONFIGS[0], **changes}))


def text(file: str, content: bytes) -> Change:
    """A file with other bytes."""
    return lambda folder: (folder / file).write_bytes(content)


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """A file of safetensors with another header."""

    def spoil(folder: Path) -> None:
        data = (folder / ONE_FILE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        (folder / ONE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def entry(**changes: Any) -> Change:
    """A header that says something else of a tensor."""
    return header(lambda table: table[NORM].update(changes))


def claims(length: int) -> Change:
    """A file that says how long its header is."""
    return lambda folder: (folder / ONE_FILE).write_bytes(length.to_bytes(8, "little") + b"{}")


def pickled(folder: Path) -> None:
    """Weights in a pickle."""
    (folder / ONE_FILE).rename(folder / "pytorch_model.bin")


def instead(file: str, make: Callable[[Path], object]) -> Change:
    """Something else in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return spoil


def in_shards(change: Callable[[Path, dict[str, str]], object]) -> Change:
    """A checkpoint of three files, and an index with a change."""

    def spoil(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        write(folder, CONFIGS[0], shards=3)
        index = json.loads((folder / INDEX).read_text())
        change(folder, index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


REFUSED: Mapping[str, tuple[Change, str]] = {
    "an unknown architecture": (
        config(architectures=["LamaForCausalLM"]),
        "'LamaForCausalLM' is no architecture .*\n.*Did you mean 'LlamaForCausalLM'?",
    ),
    "a quantized checkpoint": (config(quantization_config={"bits": 4}), "the checkpoint is quantized"),
    "unknown rotary scaling": (
        config(rope_scaling={"rope_type": "yarm", "factor": 2.0}),
        "of the type 'yarm', a scaling that there is none of here.*\n.*Did you mean 'yarn'?",
    ),
    "scaling that is no number": (
        config(rope_scaling={"type": "linear", "factor": float("nan")}),
        "rope_scaling.factor: nan is not a number above 0",
    ),
    "a config that is no JSON": (text(CONFIG, b"{'a': 1}"), "config.json: is no JSON that can be read"),
    "a config that is no text": (text(CONFIG, b"\xff\xfe\x00"), "config.json: is not a text file in UTF-8"),
    "a config that is nested deeply": (text(CONFIG, b"[" * 100_000), "nested more than 32 deep"),
    "a config that is huge": (text(CONFIG, b" " * (17 << 20)), "has more than 16 MiB"),
    "a config that is a list": (text(CONFIG, b"[]"), "config.json: holds no table"),
    "a number that is none": (config(rms_norm_eps=float("nan")), "rms_norm_eps: is NaN; expected a number"),
    "more layers than tensors": (config(num_hidden_layers=2**40), "expected an integer of 1 to 21"),
    "a folder for a config": (instead(CONFIG, Path.mkdir), "config.json: is a folder"),
    "a folder for weights": (instead(ONE_FILE, Path.mkdir), "model.safetensors: is no regular file"),
    "a circle of links": (
        instead(ONE_FILE, lambda path: path.symlink_to(path)),
        "model.safetensors: cannot be read: Too many levels of symbolic links",
    ),
    "no weights": (instead(ONE_FILE, lambda path: None), "has neither model.safetensors nor model.saf"),
    "a pickle": (pickled, r"is pickled \(.bin\), which is never read here.*\n.*save_pretrained"),
    "an empty file": (text(ONE_FILE, b""), "says that its header has 0 bytes, of 0 in all"),
    "a header of 2^60 bytes": (claims(2**60), f"says that its header has {2**60} bytes, of 10 in all"),
    "a header that is no JSON": (text(ONE_FILE, b"\2\0\0\0\0\0\0\0{,"), "has no valid header"),
    "a negative shape": (entry(shape=[-8]), "has no valid header: ValueError.'-8 is no count'"),
    "an unknown dtype": (entry(dtype="F3"), f"has '{NORM}' in a dtype that is not known here, 'F3'"),
    "weights that are no floats": (
        entry(dtype="I16"),
        rf"has 1 weights that are no floats, such as {NORM} \(I16\)",
    ),
    "tensors that overlap": (
        entry(data_offsets=[0, 16]),
        "says that '.*', BF16 .*, has the bytes [0-9]+ to [0-9]+",
    ),
    "a truncated file": (
        lambda folder: text(ONE_FILE, (folder / ONE_FILE).read_bytes()[:-10])(folder),
        "says that its tensors end at byte ([0-9]+); it has",
    ),
    "an index that names a file that is missing": (
        in_shards(lambda folder, _: (folder / "model-1.safetensors").unlink()),
        "model-1.safetensors: cannot be read: No such file or directory",
    ),
    "an index that names a tensor that is missing": (
        in_shards(lambda _, places: places.update({NORM: "model-0.safetensors"})),
        f"index.json: names {NORM} in model-0.safetensors, where it is not",
    ),
    "an index that leads elsewhere": (
        in_shards(lambda _, places: places.update({NORM: "../model.safetensors"})),
        "names '../model.safetensors', which is no file of the folder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(case: str, tmp_path: Path) -> None:
    """With the file, the numbers and a way out."""
    change, said = REFUSED[case]
    write(tmp_path / "checkpoint", CONFIGS[0], shards=1)
    assert published(tmp_path / "checkpoint").model.modules
    published.cache_clear()
    change(tmp_path / "checkpoint")
    with pytest.raises(PlanError) as error:
        published(tmp_path / "checkpoint")
    assert re.search(said, str(error.value)), error.value
    assert all(problem.where and problem.remedy for problem in error.value.problems)


@pytest.mark.parametrize("named", ["loop", "missing", "a\\u0000b", "long" * 100])
def test_folders_that_a_job_cannot_name(named: str, tmp_path: Path) -> None:
    """A circle of links, one that is not there, a null byte, a name that is too long."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    job = tmp_path / "job.toml"
    job.write_text(
        f'[modules.language]\nmodel = "gpt"\nweights = "{named}"\n[data]\nsource = "digits"\n[batch]\nglobal_size = 1'
    )
    with pytest.raises(PlanError):
        open_job(job)


def test_a_whole_of_two_modules_names_them(tmp_path: Path) -> None:
    """A module of a job by another name is not guessed."""
    write(tmp_path / "llava", LLAVA, shards=1)
    with pytest.raises(PlanError, match="has no module 'eyes'; it has vision, language"):
        published(tmp_path / "llava").module("eyes")
