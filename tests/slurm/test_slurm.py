"""The batch file on a real Slurm: as it is shipped, but for the job."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_cluster import NODES, Cluster, await_that


pytestmark = pytest.mark.slurm

FILE = "examples/slurm/train.sbatch"


def job_of(cluster: Cluster, name: str, source: str, *, steps: int, every: int) -> str:
    """Write a job file with the modules and data of a text; return its name in the folder of the cluster."""
    train = f"[train]\nsteps = {steps}\ncheckpoint_every = {every}\n"
    (cluster.work / name).write_text(source.partition("[train]")[0] + train)
    return name


def losses(folder: Path) -> list[tuple[int, float]]:
    """The loss of each step, as the run has recorded it."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def losses_of_local_launch(cluster: Cluster, job: str, steps: int) -> list[tuple[int, float]]:
    """Train so many steps of a job without Slurm; by default the learning rate does not depend on their number."""
    folder = cluster.work / f"local-{job}"
    settings = (f"train.run_dir={folder.name}", f"train.steps={steps}")
    command = [sys.executable, "-m", "mimogrid", "train", job, *(f"--set={one}" for one in settings)]
    subprocess.run(command, cwd=cluster.work, env=cluster.variables, check=True, capture_output=True)
    return losses(folder)


def run_of(cluster: Cluster, job: str) -> Path:
    """The run folder of a job of Slurm, or of a task of an array."""
    return cluster.work / "runs" / f"slurm-{cluster.fact(job, 'JobId')}"


def await_checkpoint(folder: Path, after: int) -> int:
    """Wait for a checkpoint after a step; return its step."""

    def newest() -> int:
        return max((int(path.name[-8:]) for path in folder.glob("checkpoints/step-????????")), default=-1)

    await_that(f"a checkpoint after step {after} in {folder}", lambda: newest() > after)
    return newest()


def said(cluster: Cluster, job: str) -> str:
    """The output of all ranks of a job, over all its starts."""
    log = cluster.work / f"mimogrid-{cluster.fact(job, 'JobId')}.log"
    return log.read_text() if log.exists() else ""


def resumed_step(cluster: Cluster, job: str) -> int:
    """Wait until a job goes on with its run; return the step that it goes on with."""
    resuming = re.compile(r"^resuming +step (\d+)", re.MULTILINE)
    await_that(f"job {job} goes on", lambda: bool(resuming.search(said(cluster, job))))
    return int(resuming.findall(said(cluster, job))[-1])


def layouts_of(cluster: Cluster, job: str) -> list[tuple[str, str]]:
    """The ranks of the layout and of the world, for each start of a job."""
    return re.findall(r"^layout +ranks (\d+) +of (\d+)", said(cluster, job), re.MULTILINE)


def test_a_wrong_job_is_not_queued_again(cluster: Cluster) -> None:
    """It would be wrong the next time, too."""
    job = cluster.submit("--ntasks=2", "--nodes=1", FILE, "absent.toml")
    cluster.await_state(job, "FAILED")
    assert ("2:0", "0") == (cluster.fact(job, "ExitCode"), cluster.fact(job, "Restarts"))
    assert 1 == said(cluster, job).count("absent.toml: "), said(cluster, job)


def test_a_run_outlives_a_node_and_a_cancellation(cluster: Cluster) -> None:
    """Seven ranks on two nodes: a lost node requeues the job; a cancelled run goes on when submitted again."""
    three = (cluster.work / "examples/three/job.toml").read_text()
    name = job_of(cluster, "three.toml", three, steps=80, every=5)
    job = cluster.submit(FILE, name)
    run = run_of(cluster, job)
    await_checkpoint(run, 0)
    assert [{0, 1, 2, 3}, {4, 5, 6}] == [cluster.ranks(node) for node in NODES]
    cluster.lose(NODES[1])
    cluster.await_state(job, "PENDING")
    cluster.start(NODES[1])
    await_checkpoint(run, resumed_step(cluster, job))
    cluster.run("scancel", job)
    cluster.await_state(job, "CANCELLED")
    await_that("all nodes are free", lambda: all(not cluster.ranks(node) for node in NODES))
    assert "was asked to stop, and is saved: step " in said(cluster, job), said(cluster, job)
    again = cluster.submit(FILE, name, RUN=f"runs/slurm-{job}")
    cluster.await_state(again, "COMPLETED")
    assert losses_of_local_launch(cluster, name, 80) == losses(run)


def test_jobs_of_an_array_do_not_collide_and_one_outlives_its_time_limit(cluster: Cluster) -> None:
    """It is signalled before the limit, saves, and is queued again by its exit code; both losses are the local ones."""
    first = (cluster.work / "examples/first/job.toml").read_text()
    pair = re.sub(r"^grid = .*\n", "", first, flags=re.MULTILINE)
    names = [
        job_of(cluster, "short.toml", pair, steps=20, every=10),
        job_of(cluster, "long.toml", "seed = 1\n" + pair, steps=10**6, every=50),
    ]
    array = cluster.submit("--array=0-1", "--ntasks=2", "--nodes=1", FILE, *names)
    short, long = f"{array}_0", f"{array}_1"
    for task in (short, long):
        cluster.await_state(task, "RUNNING", "COMPLETED")
    assert cluster.fact(short, "NodeList") != cluster.fact(long, "NodeList")
    await_checkpoint(run_of(cluster, long), 0)
    # The limit is in whole minutes, and the signal comes up to a minute earlier than 120 s before it.
    hours, minutes, _ = map(int, cluster.fact(long, "RunTime").split(":"))
    cluster.run("scontrol", "update", f"JobId={long}", f"TimeLimit={60 * hours + minutes + 3}")
    step = resumed_step(cluster, long)
    assert f"was asked to stop, and is saved: step {step} is next" in said(cluster, long)
    assert ["0", "1"] == [cluster.fact(task, "Restarts") for task in (short, long)]
    await_checkpoint(run_of(cluster, long), step)
    cluster.run("scancel", long)
    cluster.await_state(long, "CANCELLED")
    cluster.await_state(short, "COMPLETED")
    for name, job in zip(names, (short, long), strict=True):
        seen = losses(run_of(cluster, job))
        assert losses_of_local_launch(cluster, name, len(seen)) == seen


def test_a_job_with_layouts_goes_on_with_the_nodes_that_there_are(cluster: Cluster) -> None:
    """Submitted again for half of the ranks while a node is gone, and for all of them when it is back."""
    source = (cluster.work / "examples/elastic/job.toml").read_text()
    name = job_of(cluster, "elastic.toml", source, steps=10**6, every=5)
    first = cluster.submit("--ntasks=4", "--nodes=2", "--ntasks-per-node=2", FILE, name)
    run, again = run_of(cluster, first), {"RUN": f"runs/slurm-{first}"}
    await_checkpoint(run, 0)
    cluster.lose(NODES[1])
    cluster.await_state(first, "PENDING")
    cluster.run("scancel", first)
    half = cluster.submit("--ntasks=2", "--nodes=1", FILE, name, **again)
    await_checkpoint(run, resumed_step(cluster, half))
    cluster.run("scancel", half)
    cluster.await_state(half, "CANCELLED")
    cluster.start(NODES[1])
    whole = cluster.submit("--ntasks=4", "--nodes=2", "--ntasks-per-node=2", FILE, name, **again)
    await_checkpoint(run, resumed_step(cluster, whole))
    cluster.run("scancel", whole)
    cluster.await_state(whole, "CANCELLED")
    await_that("all nodes are free", lambda: all(not cluster.ranks(node) for node in NODES))
    assert [("4", "4")] == layouts_of(cluster, first) == layouts_of(cluster, whole)
    assert [("2", "2")] == layouts_of(cluster, half)
    seen = losses(run)
    local = losses_of_local_launch(cluster, name, len(seen))
    assert [step for step, _ in local] == [step for step, _ in seen]
    assert [loss for _, loss in local] == pytest.approx([loss for _, loss in seen], rel=1e-9, abs=0)
