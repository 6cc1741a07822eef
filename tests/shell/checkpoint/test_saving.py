"""Saving: it does not hold up training, is cut off at any moment without a trace, and fails in clear words."""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.cli import inspect
from mimogrid.shell.cli.arguments import InspectArgs
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run import folders as runs
from mimogrid.shell.world.launch import Pool
from running import trained
from scale import nightly, nightly_only


pytestmark = pytest.mark.world

DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits" / "job.toml"
STEPS, EVERY = 6, 2
KINDS = {
    "fp32, dropout": ["modules.vision.options.dropout=0.1", "modules.language.options.dropout=0.1"],
    "bf16, shared updates": ["precision=bf16", "optimizer.sharded=true"],
}

Run = Callable[..., dict[str, Any]]
Whole = Callable[[str], tuple[Path, dict[str, Any]]]


def job(*overrides: str) -> Job:
    """The digits job for some steps."""
    limits = [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.evaluate=false"]
    return open_job(DIGITS, ["batch.global_size=16", *limits, *overrides])


@pytest.fixture(scope="module")
def run(pool: Pool) -> Run:
    """Train in a folder to the end, or go on there."""
    return functools.partial(trained, pool)


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Runs of each kind that never stopped."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[kind] = folder, run(job(*KINDS[kind]), folder)
        return found[kind]

    return of


@nightly
def test_waiting_for_a_save_at_once_gives_the_same_files(run: Run, whole: Whole, tmp_path: Path) -> None:
    """What is written while training goes on holds what the weights were at the save point."""
    folder, report = whole("bf16, shared updates")
    told = run(job(*KINDS["bf16, shared updates"], "train.checkpoint_async=false"), tmp_path)
    assert report["losses"] == told["losses"]
    files = contents(folder)
    assert {f"step-{step:08}" for step in (4, 6)} == {name.split("/")[0] for name in files}
    assert files == contents(tmp_path)


@pytest.mark.parametrize(
    ("kind", "death"),
    [
        ("bf16, shared updates", ((0, 1, 2, 3), 5)),
        *nightly_only([("fp32, dropout", ((2,), 3)), ("fp32, dropout", ((0, 1, 2, 3), 5))]),
        *nightly_only([("bf16, shared updates", ((2,), 3))]),
    ],
)
def test_a_run_that_was_killed_goes_on_bitwise(  # noqa: PLR0917 -- fixtures and cases
    pool: Pool, run: Run, whole: Whole, tmp_path: Path, kind: str, death: tuple[tuple[int, ...], int]
) -> None:
    """One rank dies, or all do while a checkpoint is being written: losses and files are as if none had."""
    ranks, step = death
    opened = job(*KINDS[kind])
    with pytest.raises(WorldError, match="killed by signal 9"):
        pool.run("stalling:killed", 4, opened, str(tmp_path), ranks, step, "step-00000004")
    assert step <= len((tmp_path / "metrics.jsonl").read_text().splitlines())
    if len(ranks) > 1:
        assert (tmp_path / "checkpoints" / "step-00000004.partial").is_dir()
        assert tmp_path / "checkpoints" / "step-00000002" == manifest.newest(tmp_path / "checkpoints")
        (tmp_path / "checkpoints" / "step-00000004.partial" / "of-another-layout").touch()
    report = run(opened, tmp_path, resume=True)
    folder, expected = whole(kind)
    assert expected["losses"] == report["losses"]
    assert contents(folder) == contents(tmp_path)
    weights = [(path / "weights.safetensors").read_bytes() for path in (folder, tmp_path)]
    assert weights[0] == weights[1]


def test_one_save_is_in_flight(pool: Pool, whole: Whole, tmp_path: Path) -> None:
    """Where the disk is slow the next save waits, and says so; what is written is still the state of the save point."""
    pool.run("stalling:slow", 4, job(*KINDS["bf16, shared updates"]), str(tmp_path))
    log = (tmp_path / "logs" / "rank-0.jsonl").read_text().splitlines()
    assert 2 == ["waiting" in json.loads(line)["event"] for line in log].count(True)
    assert contents(whole("bf16, shared updates")[0]) == contents(tmp_path)


def test_old_checkpoints_are_let_go(run: Run, tmp_path: Path) -> None:
    """The newest are kept, and those of steps that `keep_every` divides."""
    opened = job(
        "train.checkpoint_every=1", "train.keep_checkpoints=1", "train.keep_every=3", "train.steps=5"
    )
    run(opened, tmp_path)
    assert [3, 5] == [manifest.step_of(path) for path in manifest.published(tmp_path / "checkpoints")]


# -- what the disk refuses ---------------------------------------------------------------------------------


def failure(said: list[tuple[bool, str]]) -> str:
    """The one report of a world; all other ranks echo it."""
    (report,) = (error for is_echo, error in said if not is_echo)
    assert 4 == len(said)
    return report


def test_a_file_that_grows_too_large(pool: Pool, run: Run, tmp_path: Path) -> None:
    """All ranks end with one report that names file, cause and remedy; what was saved before is untouched."""
    opened = job()
    run(job("train.steps=2"), tmp_path)
    before = contents(tmp_path)
    (tmp_path / "report.json").unlink()
    report = failure(pool.run("stalling:full", 4, opened, str(tmp_path / "new"), 2, 200_000))
    assert "checkpoint 'step-00000002' was not saved" in report
    assert "File too large (ranks 2).\n    Raise the limit" in report
    assert f"--resume {tmp_path / 'new'}" in report
    assert [] == list((tmp_path / "new" / "checkpoints").iterdir())
    assert before == contents(tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder whose checkpoints are on a disk of 4 MB; not everybody may mount one."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if not shutil.which("mount") or mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)):
        pytest.skip("no right to mount a small disk")
    yield folder.parent
    subprocess.run(["umount", str(folder)], check=True)


def mount(*arguments: str) -> int:
    """Mount something; return the exit code."""
    return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode


def test_a_full_disk(pool: Pool, run: Run, disk: Path) -> None:
    """The second checkpoint does not fit: the first stays, and the run goes on from it once there is space."""
    opened = job()
    report = failure(pool.run("stalling:told", 4, opened, str(disk)))
    assert "No space left on device" in report
    assert "Free some space" in report
    assert ["step-00000002"] == [path.name for path in (disk / "checkpoints").iterdir()]
    assert manifest.newest(disk / "checkpoints")
    assert not mount("-o", "remount,size=16m", str(disk / "checkpoints"))
    assert STEPS == len(run(opened, disk, resume=True)["losses"])


def test_a_disk_that_became_read_only(pool: Pool, run: Run, disk: Path) -> None:
    """A run ends at its first checkpoint; one that is to go on there is refused before it starts."""
    run(job("train.steps=2"), disk)
    (disk / "report.json").unlink()
    before = contents(disk)
    assert not mount("-o", "remount,ro", str(disk / "checkpoints"))
    report = failure(pool.run("stalling:told", 4, job(), str(disk)))
    assert "Read-only file system" in report
    assert "Make the folder writable" in report
    assert before == contents(disk)
    with pytest.raises(PlanError, match="cannot be written"):
        enter(runs.claimed(job(), disk))


def test_a_checkpoint_that_is_read_is_not_pruned(tmp_path: Path) -> None:
    """It goes with the next save; one that has just gone is told of in words."""
    old, new = (manifest.folder_of(tmp_path, step) for step in (2, 4))
    for checkpoint in (old, new):
        checkpoint.mkdir()
        (checkpoint / manifest.MANIFEST).write_text("{}")
    with manifest.reading(old):
        manifest.prune(tmp_path, keep=1, keep_every=0)
        assert [old, new] == manifest.published(tmp_path)

    def damage(checkpoint: Path, _: object) -> Iterator[str]:
        """What a run does while `mimogrid inspect` reads."""
        manifest.prune(tmp_path, keep=1, keep_every=0)
        yield "is there" if checkpoint.exists() else "is gone"

    with patch.object(inspect, "damage", damage), pytest.raises(PlanError) as caught:
        inspect.run(None, InspectArgs(folder=tmp_path, verify=True, json=False))
    assert all("is there" in problem.message for problem in caught.value.problems)
    assert [old, new] == manifest.published(tmp_path)
    manifest.prune(tmp_path, keep=1, keep_every=0)
    assert [new] == manifest.published(tmp_path)
    with pytest.raises(PlanError, match="may have just removed it"):
        enter(manifest.reading(old))


def test_a_file_where_a_folder_is_needed(pool: Pool, tmp_path: Path) -> None:
    """The error names it, during a run and before one."""
    (tmp_path / "checkpoints").write_text("")
    report = failure(pool.run("stalling:told", 4, job(), str(tmp_path)))
    assert f"{tmp_path}/checkpoints" in report
    assert "Move away what is there" in report
    with pytest.raises(PlanError, match=f"'{tmp_path}/checkpoints' is a file"):
        enter(runs.claimed(job(), tmp_path))


def enter(context: AbstractContextManager[object]) -> None:
    """Enter a context, and leave it again."""
    with context:
        pass


def contents(folder: Path) -> dict[str, bytes]:
    """The files of the checkpoints of a run but manifests, which say when each was made."""
    return {
        str(path.relative_to(folder / "checkpoints")): path.read_bytes()
        for path in sorted((folder / "checkpoints").glob("*/*"))
        if path.name != manifest.MANIFEST
    }
