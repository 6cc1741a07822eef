"""Trackers: the curves of a run go to each that the job names, and one that fails does not end the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.spec import TRACKERS as NAMES
from mimogrid.shell.cli import start
from mimogrid.shell.cli.main import main
from mimogrid.shell.job import extras
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.run import trackers
from mimogrid.shell.run.trackers import TRACKERS, TrackedRun, Trackers, tracked


FIRST = Path(__file__).resolve().parents[3] / "examples" / "first" / "job.toml"


class Fragile:
    """A tracker that fails where it is told to."""

    def __init__(self, fails: str, points: list[Any]) -> None:
        self._fails, self.points = fails, points
        self._check("open")

    def log(self, step: int, curves: Mapping[str, float]) -> None:
        """Note a point."""
        self._check(f"log {step}")
        self.points.append((step, dict(curves)))

    def close(self) -> None:
        """Note the end."""
        self._check("close")
        self.points.append("closed")

    def _check(self, what: str) -> None:
        if what == self._fails:
            raise ConnectionError("nobody answers")


@pytest.mark.parametrize(
    ("fails", "kept"),
    [("open", []), ("log 2", [(1, {"loss": 1.0})]), ("close", [(n, {"loss": 1.0}) for n in (1, 2, 3)])],
)
def test_a_tracker_that_fails_is_told_once_and_left_out(
    fails: str, kept: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it fails, the others get all points."""
    fragile, sound, warned = list[Any](), list[Any](), list[str]()
    made = {"wandb": lambda _: Fragile(fails, fragile), "mlflow": lambda _: Fragile("", sound)}
    monkeypatch.setattr(trackers, "TRACKERS", made)
    found = Trackers(("wandb", "mlflow"), TrackedRun(tmp_path, "p", {}), warned.append)
    for step in (1, 2, 3):
        found.log(step, {"loss": 1.0})
    found.close()
    assert ["the run goes on without the tracker wandb: ConnectionError: nobody answers"] == warned
    assert kept == fragile
    assert [*((n, {"loss": 1.0}) for n in (1, 2, 3)), "closed"] == sound


def test_tensorboard_keeps_the_curves(tmp_path: Path) -> None:
    """In the folder of the run, of a job that names it, as every job does that does not say otherwise."""
    spec = open_job(FIRST).spec
    found = Trackers(spec.track.to, tracked(tmp_path, spec), pytest.fail)
    found.log(10, {"loss": 0.5})
    found.close()
    curves: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [(10, 0.5)] == [(point.step, point.value) for point in curves.Scalars("loss")]


def test_a_run_is_the_same_one_after_a_resume(tmp_path: Path) -> None:
    """And another than that of any other folder; its keys are those of the job file."""
    spec = open_job(FIRST).spec
    first, second, other = (tracked(tmp_path / name, spec) for name in ("a", "a", "b"))
    assert first.id == second.id != other.id
    assert spec.optimizer.lr == first.config["optimizer.lr"]


@pytest.mark.parametrize("name", sorted(extras.TRACKERS))
def test_a_tracker_that_is_not_installed_is_an_error_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its extra."""
    is_installed = extras.is_installed
    monkeypatch.setattr(extras, "is_installed", lambda module: module != name and is_installed(module))
    monkeypatch.setattr(start, "Pool", None)
    assert 2 == main(["train", str(FIRST), "--set", f'track.to=["tensorboard", "{name}"]'])
    said = capsys.readouterr().err
    assert f"track.to: needs {name}, which is not installed." in said
    assert f"pip install 'mimogrid[{name}]'" in said


def test_words_of_the_table_are_checked() -> None:
    """A name that is no tracker, no steps, no project: all at once."""
    with pytest.raises(PlanError) as caught:
        open_job(FIRST, ['track.to=["trackeo"]', "track.every=0", 'track.project=""'])
    assert ["track.to", "track.every", "track.project"] == [
        problem.where for problem in caught.value.problems
    ]
    assert "trackio" in str(caught.value)
    assert set(NAMES) == set(TRACKERS)
