"""Interruptions: a run that is ended anywhere, by whatever runs it, goes on as if it never had been."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import harm
import launching
import sweep
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from mimogrid.shell.world.preemption import EXIT_CODE


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]


def faulty(line: str) -> dict[str, str]:
    """The environment in which ``python -m faulty`` is `mimogrid` with a fault."""
    path = [str(Path(__file__).parents[2] / "support"), os.environ.get("PYTHONPATH", "")]
    return {"MIMOGRID_FAULT": line, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def uninterrupted(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the sweep's smaller job that nothing happened to."""
    return sweep.uninterrupted(pool, "epochs", tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("case", sweep.some(), ids=str)
def test_a_run_that_is_interrupted_anywhere_ends_the_same(
    pool: Pool, uninterrupted: Path, tmp_path: Path, case: sweep.Case
) -> None:
    """A few cases of the sweep; `nox -s faults` runs all."""
    sweep.judge(pool, case, tmp_path, uninterrupted)


def test_a_launcher_that_is_asked_to_stop_passes_it_on(pool: Pool, opened: Opened, tmp_path: Path) -> None:
    """The command saves and exits with a code that launchers restart on."""
    job = opened(harm.job("enc(1,1,1)@0 lm(1,1,1)@1"))
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert "" == harm.run(pool, job, whole).report
    slow = faulty("delay rank 1 step 2 for 2 s at UPDATE")
    command = [sys.executable, "-m", "faulty", "train", str(job.path), "--set", f"train.run_dir={folder}"]
    with subprocess.Popen(command, env=os.environ | slow, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("1/"):
                break
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert EXIT_CODE == process.returncode, said
    assert "was asked to stop, and is saved" in said
    assert "" == harm.run(pool, job, folder, resume=True).report
    assert harm.left(whole) == harm.left(folder)


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_the_same(
    pool: Pool, opened: Opened, tmp_path: Path
) -> None:
    """The restarted ranks go on from the last checkpoint; one report says who died."""
    job = opened(harm.job("enc(1,1,1)@0 lm(1,1,1)@1"))
    folder, whole, said = tmp_path / "run", tmp_path / "whole", tmp_path / "said"
    assert "" == harm.run(pool, job, whole).report
    arguments = ["train", str(job.path), "--set", f"train.run_dir={folder}", "--set", "train.timeout_s=60"]
    launching.under_torchrun(2, arguments, said, fault="kill rank 1 step 3 at lm.0 B1", restarts=1)
    assert 1 == said.read_text().count("mimogrid: rank 1 (host "), said.read_text()
    assert "resuming  step 2" in said.read_text()
    assert harm.left(whole) == harm.left(folder)
    assert not (folder / "heartbeats").exists()


def test_the_death_of_the_rank_that_keeps_the_store_is_told_by_one_of_the_others(
    opened: Opened, tmp_path: Path
) -> None:
    """Under a launcher that keeps no store of its own: the survivors agree over the run folder who tells."""
    job = opened(harm.job("enc(1,1,1)@0 lm(1,2,1)@1"))
    arguments = ["train", str(job.path), "--set", f"train.run_dir={tmp_path / 'run'}"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    ranks = [
        launching.started(
            [*arguments, "--set", "train.timeout_s=60"],
            tmp_path / f"said-{rank}",
            place | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            fault="kill rank 0 step 3 at enc.0 B1",
        )
        for rank in range(3)
    ]
    for rank in ranks:
        rank.join(timeout=200)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(3)]
    assert [-signal.SIGKILL, 1, 1] == [rank.exitcode for rank in ranks], said
    assert 1 == "".join(said).count("mimogrid: rank 0 (host "), said
    assert "ended without a word at step 3 in 'enc.0 B1'" in "".join(said)
