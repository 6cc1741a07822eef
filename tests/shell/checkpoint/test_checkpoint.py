"""Checkpoints: resumed runs go on bitwise, any layout reads what another wrote, and damage is refused."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.index import INDEX
from mimogrid.shell.checkpoint.jsonfile import canonical
from mimogrid.shell.job import tensorfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool
from running import trained
from scale import nightly_only


DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits" / "job.toml"
STEPS, EVERY = 6, 4
SETTINGS = [
    f"train.steps={STEPS}",
    f"train.checkpoint_every={EVERY}",
    "train.evaluate=false",
    "batch.global_size=16",
]
PADDED = [
    "modules.language.grid.pp=1",
    "modules.language.grid.tp=2",
    "modules.language.options.vocab_padding=16",
]
"""One tp rank has the vocabulary, the other padding only."""
OTHER_LAYOUTS = [
    [*PADDED, "modules.vision.grid.dp=3"],
    ["modules.vision.grid.offset=0", "modules.vision.grid.tp=2", "modules.language.grid.offset=1"],
    [
        "schedule.name=zb-h1",
        "modules.vision.grid.pp=2",
        "modules.language.grid.pp=1",
        "optimizer.sharded=true",
    ],
]

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(pool: Pool) -> Run:
    """Train some steps of the digits job in a folder, or resume there."""

    def train(folder: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
        return trained(pool, open_job(DIGITS, [*SETTINGS, *overrides]), folder, resume=resume)

    return train


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run in fp64 that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, "precision=fp64")


@pytest.fixture
def stopped(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """The same run as it was left when it stopped after its first checkpoint."""
    folder = tmp_path / "stopped"
    shutil.copytree(whole[0], folder)
    as_stopped(folder)
    return folder


def as_stopped(folder: Path) -> None:
    """Leave of a run in a folder what was there after its first checkpoint."""
    (folder / "report.json").unlink()
    (folder / "weights.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08}")


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(
    run: Run, whole: tuple[Path, dict[str, Any]], stopped: Path
) -> None:
    """Losses from step 0 on, weights and the last checkpoint are the same to the bit."""
    report = run(stopped, "precision=fp64", resume=True)
    assert whole[1]["losses"] == report["losses"]
    assert whole[1]["losses_by_module"] == report["losses_by_module"]
    for name in ("weights.safetensors", *_shards(whole[0])):
        assert (whole[0] / name).read_bytes() == (stopped / name).read_bytes()


@pytest.mark.parametrize("layout", [*OTHER_LAYOUTS[1:], *nightly_only(OTHER_LAYOUTS[:1])], ids=" ".join)
def test_another_layout_goes_on_with_the_same_model(
    run: Run, whole: tuple[Path, dict[str, Any]], stopped: Path, layout: list[str]
) -> None:
    """A checkpoint loads under another layout, optimizer state included: losses agree to rounding."""
    report = run(stopped, "precision=fp64", *layout, resume=True)
    assert pytest.approx(whole[1]["losses"], rel=1e-9) == report["losses"]
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (whole[0], stopped))
    assert 1e-9 > max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_in_fp32_another_layout_goes_on_with_the_same_samples(run: Run, tmp_path: Path) -> None:
    """Losses agree to 1e-6 for the steps after a checkpoint, from samples in the middle of an epoch on.

    The layout that saved padded the vocabulary, and no checkpoint has that.
    """
    expected = run(tmp_path, *PADDED)["losses"]
    as_stopped(tmp_path)
    losses = run(tmp_path, *OTHER_LAYOUTS[2], resume=True)["losses"]
    assert STEPS == len(losses)
    assert pytest.approx(expected, rel=1e-6) == losses


def test_chunks_go_on_with_what_stages_saved(run: Run, tmp_path: Path) -> None:
    """Stages that are cut into interleaved chunks, under fewer and more dp ranks, load what whole ones saved."""
    deep = ["precision=fp64", "modules.language.options.layers=4"]
    expected = run(tmp_path, *deep)["losses"]
    as_stopped(tmp_path)
    chunks = ["schedule.name=interleaved", "modules.language.chunks=2", "modules.vision.grid.dp=1"]
    losses = run(tmp_path, *deep, *chunks, resume=True)["losses"]
    assert pytest.approx(expected, rel=1e-9) == losses


@pytest.mark.parametrize("layout", [[], OTHER_LAYOUTS[2]], ids=["layout of the job", "sharded"])
def test_a_state_is_pickled_without_the_buffers_around_it(pool: Pool, layout: list[str]) -> None:
    """Ranks pickle their values, and not the flat buffers that these are views of."""
    job = open_job(DIGITS, [*SETTINGS, *layout])
    said = [each for each in pool.run("pickled:in_world", job.topology.world_size, job) if each is not None]
    pickled, of_tensors = (sum(column) for column in zip(*said, strict=True))
    assert of_tensors < pickled < 2 * of_tensors


def test_saving_what_was_loaded_gives_the_same_bytes(
    pool: Pool, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Save, load, save: every file is equal but for the time in the manifest."""
    saved = whole[0] / "checkpoints" / f"step-{STEPS:08}"
    job = open_job(DIGITS, [*SETTINGS, "precision=fp64"])
    pool.run("resaving:in_world", 4, job, saved, tmp_path)
    again = tmp_path / saved.name
    files = sorted(path.name for path in saved.glob("shard-*"))
    assert files == sorted(path.name for path in again.glob("shard-*"))
    assert [(saved / f).read_bytes() for f in files] == [(again / f).read_bytes() for f in files]
    ours, theirs = (manifest.read_manifest(c) | {"created": 0, "digest": ""} for c in (saved, again))
    assert ours == theirs


def _rewrite(**changes: object) -> Callable[[Path], str]:
    """Change what the manifest says, its checksum included."""

    def harm(folder: Path) -> str:
        path = folder / manifest.MANIFEST
        facts = json.loads(path.read_text()) | changes
        facts = {key: value for key, value in facts.items() if value is not None}
        path.write_text(canonical({**facts, manifest.DIGEST: manifest.manifest_digest(facts)}))
        return manifest.MANIFEST

    return harm


def _harm(act: Callable[[Path], object], name: str = "shard-*") -> Callable[[Path], str]:
    def harm(folder: Path) -> str:
        victim = next(folder.glob(name))
        act(victim)
        return victim.name

    return harm


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _link(path: Path) -> None:
    outside = path.parents[2] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def _forge(edit: Callable[[Path], object], name: str = "shard-*") -> Callable[[Path], str]:
    """Change a file, and let the manifest say that this is what was written."""

    def harm(folder: Path) -> str:
        victim = next(folder.glob(name))
        edit(victim)
        files = json.loads((folder / manifest.MANIFEST).read_text())["files"]
        files[victim.name] = {"bytes": victim.stat().st_size, "sha256": tensorfile.checksum(victim)}
        _rewrite(files=files)(folder)
        return victim.name

    return harm


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the header of a shard says."""

    def edit(path: Path) -> None:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return edit


def _lie(key: str, value: object) -> Callable[[Path], object]:
    """Say something else of the first tensor."""
    return _header(
        lambda header: next(of for n, of in header.items() if n != "__metadata__").update({key: value})
    )


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the index says of the first tensor."""
    return _whole_index(lambda index: change(next(iter(index.values()))))


def _whole_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        index = json.loads(path.read_text())
        change(index)
        path.write_text(canonical(index))

    return edit


def _lead_to(file: str) -> Callable[[Path], str]:
    return _forge(_index(lambda of: of["parts"][0].update(file=file)), INDEX)


def _empty(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return manifest.MANIFEST


def _linked(folder: Path) -> str:
    _link(folder)
    return folder.name


def _renamed(folder: Path) -> str:
    return folder.rename(folder.with_name("step-00000009")).name


def _say_more(path: Path) -> None:
    path.write_text(canonical(json.loads(path.read_text()) | {"steps_taken": 5}))


def _of_format_1(path: Path) -> None:
    path.write_text(canonical(json.loads(path.read_text()) | {"version": 1}))


def _drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda index: index.pop(name)


def _another(folder: Path) -> str:
    (folder / "shard-9.safetensors").touch()
    return "shard-9.safetensors"


HARMS: dict[str, tuple[Callable[[Path], str], str]] = {
    "a shard is missing": (_harm(Path.unlink), "is missing"),
    "a shard is shorter": (_harm(lambda p: p.write_bytes(p.read_bytes()[:-1])), "bytes"),
    "a byte is another": (_harm(_flip), "checksum"),
    "the index is another": (_harm(_flip, INDEX), "checksum"),
    "a shard is a link": (_harm(_link), "link"),
    "a shard too many": (_another, "not of this checkpoint"),
    "no manifest": (_harm(Path.unlink, manifest.MANIFEST), "is missing"),
    "a manifest that is no JSON": (_harm(lambda p: p.write_text("{"), manifest.MANIFEST), "is no JSON"),
    "a manifest that is a list": (_harm(lambda p: p.write_text("[]"), manifest.MANIFEST), "no JSON object"),
    "a manifest of bytes": (_harm(lambda p: p.write_bytes(b"\xff"), manifest.MANIFEST), "is no JSON"),
    "another version": (_rewrite(version=99), "version 99"),
    "no version": (_rewrite(version=None), "version None"),
    "no list of files": (_rewrite(files=None), "lacks files"),
    "files elsewhere": (_rewrite(files={"../x": {"bytes": 1, "sha256": ""}}), "lacks files"),
    "files that are numbers": (_rewrite(files={"index.json": 3}), "lacks files"),
    "a step that is none": (_rewrite(step="6"), "has '6' for step"),
    "a job that is none": (_rewrite(job=["pickle"]), "has ['pickle'] for job"),
    "a job of another model": (_rewrite(job="steps = 3"), "holds a job that cannot be read"),
    "more updates than steps": (_rewrite(steps_taken=10**9), "not a count up to its step, 6"),
    "no state of skipped steps": (_rewrite(watch={}), "has {} for watch"),
    "a scale that is infinite": (
        _rewrite(watch={"scale": math.inf, "good": 0, "losses": [], "norms": []}),
        "for watch",
    ),
    "a format of before, with a checksum": (_harm(_of_format_1, manifest.MANIFEST), "checksum differs"),
    "another step": (_rewrite(step=9), "says step 9"),
    "another next sample": (_rewrite(data={"source": "digits", "next_sample": 0}), "for data"),
    "a manifest that says more": (_harm(_say_more, manifest.MANIFEST), "checksum differs"),
    "a checkpoint of another step": (_renamed, "'manifest.json' says step 6"),
    "an index that leads out": (
        _lead_to("../step-00000004/shard-00001-model-00001-of-00001.safetensors"),
        "../",
    ),
    "an index that leads anywhere": (_lead_to("/etc/passwd"), "names '/etc/passwd'"),
    "an index of its manifest": (_lead_to("manifest.json"), "names 'manifest.json'"),
    "an index without parts": (_forge(_index(lambda of: of.pop("parts")), INDEX), "does not say"),
    "an index with a gap": (_forge(_index(lambda of: of["parts"].clear()), INDEX), "together"),
    "an index of another shape": (
        _forge(_index(lambda of: of["parts"][0].update(shape=[3])), INDEX),
        "shard",
    ),
    "an index with a part twice": (
        _forge(_index(lambda of: of["parts"].append(of["parts"][0])), INDEX),
        "has two parts that overlap",
    ),
    "an index without a weight": (
        _forge(_whole_index(_drop("vision.input.bias")), INDEX),
        "has 'vision.input.bias', and 'index.json' does not say it has",
    ),
    "an index without a state": (
        _forge(_whole_index(_drop("optimizer.exp_avg.vision.input.bias")), INDEX),
        "has 'optimizer.exp_avg.vision.input.bias', and 'index.json' does not say it has",
    ),
    "an index that is no JSON": (_forge(lambda p: p.write_text("{"), INDEX), "is no JSON"),
    "a header that is too long": (
        _forge(lambda p: p.write_bytes((1 << 40).to_bytes(8, "little") + p.read_bytes()[8:])),
        "header has 1099511627776 bytes",
    ),
    "a header that is no JSON": (
        _forge(lambda p: p.write_bytes(p.read_bytes()[:8] + b"!" + p.read_bytes()[9:])),
        "no valid header",
    ),
    "a header of a larger tensor": (_forge(_lie("shape", [1 << 40])), "has the bytes"),
    "a header of a negative size": (_forge(_lie("shape", [-1, -64])), "no count"),
    "a header of unknown values": (_forge(_lie("dtype", "PICKLE")), "is not known here"),
    "a header of other values": (_forge(_lie("data_offsets", [0, 1 << 50])), "has the bytes"),
    "a header without a tensor": (_forge(_header(dict.popitem)), "tensors end at"),
    "values beyond what the header says": (
        _forge(lambda p: p.write_bytes(p.read_bytes() + b"more")),
        "says that its tensors end at",
    ),
    "a file of eight bytes": (_forge(lambda p: p.write_bytes(b"1")), "of 1 in all"),
    "an empty folder": (_empty, "is missing"),
    "a folder that is a link": (_linked, "link"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, harm: str
) -> None:
    """What is wrong is said with the file's name, and a command that goes on from the newest whole one."""
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    act, said = HARMS[harm]
    name = act(tmp_path / "checkpoints" / f"step-{STEPS:08}")
    with pytest.raises(PlanError) as refused:
        manifest.newest(tmp_path / "checkpoints")
    text = str(refused.value)
    assert name in text
    assert said in text
    assert f"The newest whole one is step-{EVERY:08}" in text
    command = refused.value.problems[0].remedy.partition("move the damaged ones away: ")[2]
    assert not subprocess.run(command, shell=True, check=True).returncode
    assert tmp_path / "checkpoints" / f"step-{EVERY:08}" == manifest.newest(tmp_path / "checkpoints")


def test_where_all_are_damaged_nothing_is_offered(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The newest is refused, and that no other is whole is said."""
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    for checkpoint in manifest.published(tmp_path / "checkpoints"):
        _flip(checkpoint / INDEX)
    with pytest.raises(PlanError, match="No checkpoint here is whole"):
        manifest.newest(tmp_path / "checkpoints")


def test_a_damaged_checkpoint_is_refused_before_training(run: Run, stopped: Path) -> None:
    """Every rank hears what the first found, and that it was the checkpoint."""
    victim = next((stopped / "checkpoints").glob("*/shard-*"))
    _flip(victim)
    with pytest.raises(PlanError) as refused:
        run(stopped, "precision=fp64", resume=True)
    (problem,) = refused.value.problems
    assert str(victim.parent) == problem.where
    assert victim.name in problem.message


def test_what_was_not_published_is_not_seen(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A folder under its temporary name is no checkpoint."""
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / f"step-{STEPS:08}"
    (newest / manifest.MANIFEST).unlink()
    newest.rename(newest.with_name(newest.name + manifest.PARTIAL))
    assert tmp_path / "checkpoints" / f"step-{EVERY:08}" == manifest.newest(tmp_path / "checkpoints")


def test_a_checkpoint_of_format_1_goes_on_bitwise(
    run: Run, whole: tuple[Path, dict[str, Any]], stopped: Path
) -> None:
    """Its manifest has no checksum and names no machine; what it saves next is of the new format."""
    path = stopped / "checkpoints" / f"step-{EVERY:08}" / manifest.MANIFEST
    facts = json.loads(path.read_text()) | {"version": 1}
    path.write_text(canonical({key: facts[key] for key in facts.keys() - {manifest.DIGEST, "machine"}}))
    assert whole[1]["losses"] == run(stopped, "precision=fp64", resume=True)["losses"]
    newest = manifest.newest(stopped / "checkpoints")
    assert newest
    assert manifest.VERSION == manifest.read_manifest(newest)["version"]


def test_a_run_without_a_checkpoint_begins_again(run: Run, stopped: Path) -> None:
    """Resuming where nothing whole was saved starts at step 0 and says so."""
    shutil.rmtree(stopped / "checkpoints")
    report = run(stopped, "precision=fp64", resume=True)
    assert STEPS == report["steps"]
    log = (stopped / "logs" / "rank-0.jsonl").read_text().splitlines()
    assert any("no whole checkpoint" in json.loads(line)["event"] for line in log)


def test_a_finished_run_goes_on_to_a_larger_number_of_steps(
    run: Run, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The losses before stay, and the report is the one of all steps."""
    shutil.copytree(whole[0], tmp_path / "run")
    report = run(tmp_path / "run", "precision=fp64", f"train.steps={STEPS + 2}", resume=True)
    assert STEPS + 2 == report["steps"] == len(report["losses"])
    assert whole[1]["losses"] == report["losses"][:STEPS]
    assert report == run(tmp_path / "run", "precision=fp64", f"train.steps={STEPS + 2}", resume=True)


def test_another_kind_of_machine_is_logged(run: Run, stopped: Path) -> None:
    """Resuming is bitwise on one kind of CPU only."""
    checkpoint = manifest.newest(stopped / "checkpoints")
    assert checkpoint is not None
    _rewrite(machine={"kernels": "OTHER"})(checkpoint)
    run(stopped, "precision=fp64", resume=True)
    log = [json.loads(line) for line in (stopped / "logs" / "rank-0.jsonl").read_text().splitlines()]
    (warning,) = (line["event"] for line in log if "another kind of machine" in line["event"])
    assert "instead of OTHER" in warning


def _shards(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in sorted(folder.glob("checkpoints/*/shard-*"))]
