"""Ray: a job under Ray Train is the job, also after a worker was killed, and on fewer workers."""

import json
import os
import runpy
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

import launching
from mimogrid.adapters.ray import NODE, RayJob, placed
from mimogrid.core.base.errors import PlanError
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool


JOB = """
precision = "fp64"

[modules.vision]
model = "vit"
feeds = ["language"]
grid = { dp = 2 }
options = { layers = 1, hidden = 16, heads = 2 }

[modules.language]
model = "gpt"
grid = { tp = 2 }
options = { layers = 2, hidden = 16, heads = 2, vocab = 32 }

[data]
source = "synthetic"

[batch]
global_size = 8
microbatches = 2

[train]
steps = 20
checkpoint_every = 3
evaluate = false

[[layouts]]
ranks = 2
modules.vision.grid = { dp = 1 }
modules.language.grid = { dp = 1 }
"""
STEPS = 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of four ranks, and of two."""
    file = tmp_path_factory.mktemp("job") / "job.toml"
    file.write_text(JOB)
    return file


@pytest.fixture(scope="module")
def whole(pool: Pool, path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the job without Ray."""
    folder = tmp_path_factory.mktemp("whole")
    pool.run("mimogrid.shell.run.train:in_world", 4, open_job(path), None, str(folder))
    losses: list[float] = json.loads((folder / "report.json").read_text())["losses"]
    return losses


@pytest.fixture(scope="module")
def four() -> Iterator[None]:
    """A Ray world of four CPUs."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


def config(folder: Path, name: str, failures: int = 0) -> RunConfig:
    """A run of Ray that keeps its checkpoints in a folder."""
    return RunConfig(
        name=name,
        storage_path=str(folder),
        failure_config=FailureConfig(max_failures=failures),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
    )


def workers() -> list[psutil.Process]:
    """The workers of Ray's that this process has started, by their process."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Kill one worker when there is a checkpoint; note which."""
    launching.await_that(lambda: any(folder.glob("checkpoint_*")), 900.0)
    killed.append(workers()[1].pid)
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.usefixtures("four")
def test_a_run_whose_worker_was_killed_ends_as_without_ray(
    path: Path, whole: list[float], tmp_path: Path
) -> None:
    """To the last bit: Ray starts all workers again, and they go on from the newest checkpoint."""
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "killed", killed), daemon=True)
    killer.start()
    result = RayJob(path).run(ScalingConfig(num_workers=4), config(tmp_path, "killed", failures=2))
    killer.join()
    assert killed
    assert STEPS == result.metrics["steps"]
    assert whole[-1] == result.metrics["loss"]


@pytest.mark.usefixtures("four")
def test_a_run_goes_on_with_fewer_workers(path: Path, whole: list[float], tmp_path: Path) -> None:
    """Under the layout for them, to rounding: half of it on four, the rest on two."""
    half = RayJob(path, ["train.steps=6"]).run(ScalingConfig(num_workers=4), config(tmp_path, "less"))
    assert whole[5] == half.metrics["loss"]
    result = RayJob(path).run(ScalingConfig(num_workers=2), config(tmp_path, "less"))
    assert whole[-1] == pytest.approx(result.metrics["loss"], rel=1e-9, abs=0)


def test_a_world_that_is_too_small_is_refused(path: Path) -> None:
    """Before Ray starts a worker."""
    with pytest.raises(PlanError, match="there are 1 ranks"):
        RayJob(path).run(ScalingConfig(num_workers=1))


def test_no_tp_group_is_on_two_nodes(path: Path) -> None:
    """On nodes that Ray would fill in the middle of one; alike nodes that end between two need nothing."""
    topology = open_job(path, ["modules.vision.grid={ dp = 1 }", "modules.vision.grid.tp=2"]).topology

    def on(*cpus: int) -> ScalingConfig:
        nodes = [
            {"Alive": True, "NodeID": f"node {i}", "Resources": {"CPU": float(n)}} for i, n in enumerate(cpus)
        ]
        return placed(topology, ScalingConfig(num_workers=4), nodes)

    assert on(2, 2).label_selector is None
    assert [{NODE: "node 1"}] * 2 + [{NODE: "node 0"}] * 2 == on(3, 3).label_selector
    assert [{NODE: "node 1"}] * 4 == on(1, 5).label_selector
    with pytest.raises(PlanError, match="would be on two"):
        on(3, 1)
    assert on(1, 1).label_selector is None


@pytest.mark.usefixtures("four")
def test_workers_of_another_program_embed_the_job(path: Path, whole: list[float]) -> None:
    """The example's actors take the steps of the job, to the last bit."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples/ray_workers.py"))
    assert whole[:3] == example["main"](path, 3)
