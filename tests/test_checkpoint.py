"""Checkpoints: resumed runs go on bitwise, any layout reads what another wrote, and damage is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mimogrid.core.errors import PlanError
from mimogrid.shell import checkpoint
from mimogrid.shell.jobs import open_job
from mimogrid.shell.launch import Pool


DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits" / "job.toml"
STEPS, EVERY = 6, 4
OTHER_LAYOUTS = [
    ["modules.language.grid.pp=1", "modules.language.grid.tp=2", "modules.vision.grid.dp=3"],
    ["modules.vision.grid.offset=0", "modules.vision.grid.tp=2", "modules.language.grid.offset=1"],
]

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(pool: Pool) -> Run:
    """Train some steps of the digits job in a folder, or resume there."""

    def train(folder: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
        settings = [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.evaluate=false"]
        job = open_job(DIGITS, [*settings, *overrides])
        folder.mkdir(exist_ok=True)
        arguments = (job, None, str(folder), str(folder) if resume else None)
        reports = pool.run("mimogrid.shell.train:in_world", job.topology.world_size, *arguments)
        return next(report for report in reports if report)

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
    (folder / "report.json").unlink()
    (folder / "weights.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08}")
    return folder


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(
    run: Run, whole: tuple[Path, dict[str, Any]], stopped: Path
) -> None:
    """Losses from step 0 on, weights and the last checkpoint are the same to the bit."""
    report = run(stopped, "precision=fp64", resume=True)
    assert whole[1]["losses"] == report["losses"]
    assert whole[1]["losses_by_module"] == report["losses_by_module"]
    for name in ("weights.safetensors", *_shards(whole[0])):
        assert (whole[0] / name).read_bytes() == (stopped / name).read_bytes()


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_another_layout_goes_on_with_the_same_model(
    run: Run, whole: tuple[Path, dict[str, Any]], stopped: Path, layout: list[str]
) -> None:
    """A checkpoint loads under another layout, optimizer state included: losses agree to rounding."""
    report = run(stopped, "precision=fp64", *layout, resume=True)
    assert pytest.approx(whole[1]["losses"], rel=1e-9) == report["losses"]
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (whole[0], stopped))
    assert 1e-9 > max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_saving_what_was_loaded_gives_the_same_bytes(
    pool: Pool, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Save, load, save: every file is equal but for the time in the manifest."""
    saved = whole[0] / "checkpoints" / f"step-{STEPS:08}"
    job = open_job(DIGITS, ["precision=fp64"])
    pool.run("resaving:in_world", 4, job, saved, tmp_path)
    again = tmp_path / saved.name
    files = sorted(path.name for path in saved.glob("shard-*"))
    assert files == sorted(path.name for path in again.glob("shard-*"))
    assert [(saved / f).read_bytes() for f in files] == [(again / f).read_bytes() for f in files]
    ours, theirs = (checkpoint.read_manifest(c) | {"created": 0} for c in (saved, again))
    assert ours == theirs


@pytest.mark.parametrize("harm", ["missing", "shorter", "changed"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, harm: str
) -> None:
    """What is wrong is said with the file's name, and the newest whole checkpoint is offered."""
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    victim = next((tmp_path / "checkpoints" / f"step-{STEPS:08}").glob("shard-*"))
    content = bytearray(victim.read_bytes())
    if harm == "missing":
        victim.unlink()
    elif harm == "shorter":
        victim.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        victim.write_bytes(content)
    with pytest.raises(PlanError) as refused:
        checkpoint.newest(tmp_path / "checkpoints")
    assert victim.name in str(refused.value)
    assert f"step-{EVERY:08}" in str(refused.value)


def test_what_was_not_published_is_not_seen(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A folder without a manifest, or under its temporary name, is no checkpoint."""
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / f"step-{STEPS:08}"
    newest.rename(newest.with_name(newest.name + checkpoint.PARTIAL))
    assert tmp_path / "checkpoints" / f"step-{EVERY:08}" == checkpoint.newest(tmp_path / "checkpoints")


def test_a_run_without_a_checkpoint_begins_again(run: Run, stopped: Path) -> None:
    """Resuming where nothing whole was saved starts at step 0 and says so."""
    shutil.rmtree(stopped / "checkpoints")
    report = run(stopped, "precision=fp64", resume=True)
    assert STEPS == report["steps"]
    log = (stopped / "logs" / "rank-0.jsonl").read_text().splitlines()
    assert any("no whole checkpoint" in json.loads(line)["event"] for line in log)


def _shards(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in sorted(folder.glob("checkpoints/*/shard-*"))]
