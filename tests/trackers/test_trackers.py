"""The real trackers: what a run gives them is in their own files, read with their own readers."""

import json
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimogrid.shell.run.trackers import TrackedRun, Trackers


STEPS = (0, 10, 20)
BLOCK, WHOLE, LAST = 32768, 1, 4
"""Of the files of wandb: the size of a block, and the kinds of parts with which a record ends."""
CURVES = {"loss": 0.5, "loss/language": 0.25}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    """A run in a folder, whatever the environment says."""
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "digits-1"
    folder.mkdir()
    return TrackedRun(folder, "a project", {"seed": 3, "optimizer.lr": 0.1, "data.source": "digits"})


def write(name: str, run: TrackedRun) -> None:
    """Write three points, the last of them after a resume."""
    for steps in (STEPS[:2], STEPS[2:]):
        found = Trackers((name,), run, pytest.fail)
        for step in steps:
            found.log(step, CURVES)
        found.close()


def test_trackio(run: TrackedRun) -> None:
    """Its SQLite file has the points of one run."""
    write("trackio", run)
    (file,) = (run.folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as tables:
        rows = tables.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(run.name, step) for step in STEPS] == [(name, step) for name, step, _ in rows]
    assert all(CURVES.items() <= json.loads(metrics).items() for _, _, metrics in rows)


def records(file: Path) -> Iterator[bytes]:
    """The records of a file of wandb: behind 7 bytes, blocks as LevelDB's log has them, without a reader of its own."""
    content, at, begun = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        begun += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {WHOLE, LAST}:
            yield begun
            begun = b""


def test_wandb(run: TrackedRun) -> None:
    """Offline, its files have the points: those before and after a resume, under one id."""
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415

    write("wandb", run)
    found = list[int]()
    for file in sorted((run.folder / "wandb").glob(f"offline-run-*-{run.id}/run-{run.id}.wandb")):
        for packed in records(file):
            record = Record.FromString(packed)
            if record.WhichOneof("record_type") == "history":
                items = {
                    ".".join(item.nested_key) or item.key: item.value_json for item in record.history.item
                }
                assert "0.5" == items["loss"]
                found.append(int(items["_step"]))
    assert list(STEPS) == found


def test_mlflow(run: TrackedRun) -> None:
    """Its SQLite file has one run with the points and the keys of the job."""
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    write("mlflow", run)
    client = MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(run.project)
    (kept,) = client.search_runs([experiment.experiment_id])
    assert run.name == kept.info.run_name
    assert "3" == kept.data.params["seed"]
    points = client.get_metric_history(kept.info.run_id, "loss/language")
    assert [(step, 0.25) for step in STEPS] == [(point.step, point.value) for point in points]


def test_a_server_that_is_gone_is_told_soon(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks wait for the first one meanwhile, and MLflow by itself tries for four minutes."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    warned, begin = list[str](), time.monotonic()
    found = Trackers(("mlflow",), run, warned.append)
    found.log(0, CURVES)
    found.close()
    assert 1 == len(warned)
    assert "the run goes on without the tracker mlflow" in warned[0]
    assert time.monotonic() - begin < 60
