"""Run folders: another user's, another job's, and one that is in use are refused, and nothing in them is touched."""

import json
import os
import shutil
from pathlib import Path

import attrs
import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.update.decision import SkipState
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run import folders as runs


DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits" / "job.toml"


def job(*overrides: str) -> Job:
    """The digits job."""
    return open_job(DIGITS, overrides)


def claim(job: Job, resume: Path | None = None, changed: tuple[str, ...] = ()) -> Path:
    """Claim a folder and let go of it, as a run that ends."""
    with runs.claimed(job, resume, changed) as folder:
        return folder


def refusal(job: Job, resume: Path | None, changed: tuple[str, ...] = ()) -> PlanError:
    """The error by which a folder is refused; everything in it is as it was."""
    assert resume is not None
    before = everything(resume)
    with pytest.raises(PlanError) as refused:
        claim(job, resume, changed)
    assert before == everything(resume)
    return refused.value


def everything(folder: Path) -> dict[str, tuple[bytes, float]]:
    """The files of a folder, and when each was written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime)
        for path in sorted(folder.rglob("*"))
    }


def saved(folder: Path, job: Job, step: int) -> None:
    """Put a checkpoint there that has nothing but a manifest."""
    target = manifest.folder_of(folder / "checkpoints", step)
    target.mkdir(parents=True)
    skips = attrs.asdict(SkipState())
    facts = {"step": step, "steps_taken": step, "watch": skips, "job": jobfile.dump(job.spec), "files": {}}
    (target / manifest.MANIFEST).write_text(json.dumps({"version": 1, **facts}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of the digits job that was ended before its first checkpoint."""
    return claim(job(f"train.run_dir={tmp_path / 'run'}"))


def test_a_run_is_resumed_under_another_layout_and_for_longer(run: Path) -> None:
    """Grids, schedule, precision and [train] are free, with a checkpoint and without one."""
    other = ["modules.vision.grid.dp=1", "schedule.name=zb-h1", "train.steps=2000", "precision=bf16"]
    assert run == claim(job(*other), run)
    saved(run, job(), 100)
    assert run == claim(job(*other), run)


@pytest.mark.parametrize("has_checkpoint", [False, True], ids=["record", "checkpoint"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1", "seed: is 1; the run to resume has 0"),
        ("optimizer.lr=0.1", "optimizer.lr: is 0.1; the run to resume has 0.003"),
        ("modules.language.options.dropout=0.5", "modules.language.options.dropout: is 0.5"),
        ("batch.global_size=128", "batch.global_size: is 128"),
    ],
)
def test_the_run_of_another_job_is_refused_unless_that_is_meant(
    run: Path, override: str, said: str, has_checkpoint: bool
) -> None:
    """What differs is told with both values, the file that says so, and the way out, which works."""
    if has_checkpoint:
        saved(run, job(), 100)
    error = str(refusal(job(override), run))
    assert said in error
    assert str(manifest.folder_of(run / "checkpoints", 100) if has_checkpoint else run / runs.RECORD) in error
    key = override.partition("=")[0]
    assert f"If this is intended: --changed {key}." in error
    refusal(job(override), run, ("train",))
    assert run == claim(job(override), run, (key,))


def test_what_was_saved_counts_more_than_what_was_begun(run: Path) -> None:
    """A change that was meant needs to be named until a checkpoint has it."""
    saved(run, job(), 100)
    changed = job("optimizer.lr=0.1")
    assert run == claim(changed, run, ("optimizer.lr",))
    refusal(changed, run)
    assert run == claim(job(), run)
    saved(run, changed, 200)
    assert run == claim(changed, run)
    refusal(job(), run)


def test_a_run_that_is_further_than_the_job_goes_is_refused(run: Path) -> None:
    """A report of 50 steps about weights of step 100 would be wrong."""
    saved(run, job(), 100)
    assert "is at step 100 already" in str(refusal(job("train.steps=50"), run))
    assert run == claim(job("train.steps=100"), run)


def test_a_run_without_a_name_is_called_after_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the file, or after its folder where the file is called job.toml."""
    monkeypatch.chdir(tmp_path)
    plan = open_job(DIGITS.parents[1] / "plans" / "clip_llama7b_8.toml")
    claimed = [claim(job()), claim(job()), claim(plan)]
    assert ["digits-1", "digits-2", "clip_llama7b_8-1"] == [folder.name for folder in claimed]


def test_a_finished_run_is_finished_up_to_its_steps(run: Path) -> None:
    """A job that wants more steps goes on."""
    runs.write_json(run / runs.REPORT, {"steps": 100})
    assert {"steps": 100} == runs.finished_report(run, 100) == runs.finished_report(run, 50)
    assert runs.finished_report(run, 101) is None


def test_the_run_of_another_user_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever it belongs to is named; a copy can be resumed."""
    saved(run, job(), 100)
    me = runs.owner_of_new_file(run)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "owner_of_new_file", lambda _: me + 1)
        error = str(refusal(job(), run))
    assert f"belongs to {runs._user(me)}" in error
    assert f"cp -r {run} COPY" in error
    copy = run.parent / "copy"
    shutil.copytree(run, copy)
    assert copy == claim(job(), copy)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
@pytest.mark.parametrize("whose", ["run.json", "checkpoints", "checkpoints/step-00000100"])
def test_one_thing_of_another_user_is_enough(run: Path, whose: str) -> None:
    """A checkpoint of somebody else's would be let go, once there are newer ones."""
    saved(run, job(), 100)
    os.chown(run / whose, 12345, -1)
    assert "belongs to user 12345" in str(refusal(job(), run))


def test_a_folder_in_which_somebody_trains_is_refused(run: Path) -> None:
    """Of two processes that resume one run, one does; when it has ended, the next may."""
    with runs.claimed(job(), run):
        assert "trains there" in str(refusal(job(), run))
    assert run == claim(job(), run)


def test_two_that_found_the_same_folder_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one is refused, also when the faster has ended since."""
    mine = job(f"train.run_dir={tmp_path / 'run'}")
    claim(mine)
    monkeypatch.setattr(runs, "_empty", Path)
    with pytest.raises(PlanError, match="was claimed by another run"):
        claim(mine)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"job": 3}', '{"job": "model = "}', '{"job": "x = 1"}'])
def test_a_record_that_says_nothing_is_refused_by_its_name(run: Path, text: str) -> None:
    """Where there is a checkpoint, that says more."""
    (run / runs.RECORD).write_text(text)
    assert str(run / runs.RECORD) in str(refusal(job(), run))
    saved(run, job(), 100)
    assert run == claim(job(), run)


def test_an_empty_record_of_a_run_without_a_checkpoint_is_begun_again(run: Path) -> None:
    """A disk that was full left it; there is nothing that could be another job's."""
    (run / runs.RECORD).write_text("")
    assert run == claim(job(), run)
    assert "job" in json.loads((run / runs.RECORD).read_text())


def test_a_folder_whose_world_was_killed_before_its_record_is_begun_again(tmp_path: Path) -> None:
    """Found by `make chaos`: the lock alone is not a run, and nothing of the user's either."""
    (tmp_path / "run.lock").touch()
    (tmp_path / f"{runs.RECORD}.partial").touch()
    assert tmp_path == claim(job(), tmp_path)
    assert "job" in json.loads((tmp_path / runs.RECORD).read_text())


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    """Something of the user's own may be in it."""
    (tmp_path / "mine").touch()
    assert "is not empty and holds no run" in str(refusal(job(), tmp_path))
    (tmp_path / "mine").unlink()
    assert tmp_path == claim(job(), tmp_path)
