"""Interruptions: a run that is ended anywhere, by whatever runs it, goes on as if it never had been."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import harm
import launching
import sweep
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.interruptions import interruptions_of
from mimogrid.shell.world.launch import Pool
from mimogrid.shell.world.preemption import EXIT_CODE
from scale import nightly, nightly_only


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]


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


@pytest.fixture(scope="module")
def pair(opened: Opened) -> Job:
    """A job on two ranks."""
    return opened(harm.job("enc(1,1,1)@0 lm(1,1,1)@1"))


@pytest.fixture(scope="module")
def whole_pair(pool: Pool, pair: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that job that nothing happened to."""
    folder = tmp_path_factory.mktemp("pair")
    assert "" == harm.run(pool, pair, folder).report
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, *nightly_only([signal.SIGTERM, signal.SIGHUP])])
def test_a_launcher_that_is_asked_to_stop_passes_it_on(
    pool: Pool, pair: Job, whole_pair: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The command saves, exits with a code that launchers restart on, and prints the command that goes on."""
    folder, said = tmp_path / "run", tmp_path / "said"
    arguments = ["train", str(pair.path), "--set", f"train.run_dir={folder}"]
    process = launching.started(arguments, said, fault="delay rank 1 step 2 for 2 s at UPDATE")
    launching.await_that((folder / "checkpoints" / "step-00000002").exists, 60.0)
    os.kill(process.pid or 0, number)
    process.join(timeout=60)
    assert EXIT_CODE == process.exitcode, said.read_text()
    assert "was asked to stop, and is saved: step 3 is next" in said.read_text()
    assert f"mimogrid train {pair.path} --set train.run_dir={folder} --resume {folder}" in said.read_text()
    assert "" == harm.run(pool, pair, folder, resume=True).report
    assert harm.left(whole_pair) == harm.left(folder)


def test_a_second_ctrl_c_ends_a_run_at_once(pair: Job, tmp_path: Path) -> None:
    """Also where a rank hangs."""
    folder, said = tmp_path / "run", tmp_path / "said"
    arguments = ["train", str(pair.path), "--set", f"train.run_dir={folder}"]
    process = launching.started(arguments, said, fault="delay rank 1 step 1 for 60 s at UPDATE")
    launching.await_that(lambda: "1/6 steps" in said.read_text() if said.exists() else False, 60.0)
    for wait_s in (0.5, 0.0):
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(wait_s)
    process.join(timeout=10)
    assert 130 == process.exitcode, said.read_text()
    assert "Ctrl-C again ends the run at once" in said.read_text()
    assert not launching.holders(folder)


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_the_same(
    pair: Job, whole_pair: Path, tmp_path: Path
) -> None:
    """The restarted ranks go on from the last checkpoint; one report says who died."""
    job, whole, folder, said = pair, whole_pair, tmp_path / "run", tmp_path / "said"
    arguments = ["train", str(job.path), "--set", f"train.run_dir={folder}", "--set", "train.timeout_s=60"]
    launching.under_torchrun(2, arguments, said, fault="kill rank 1 step 3 at lm.0 B1", restarts=1)
    assert 1 == said.read_text().count("mimogrid: rank 1 (host "), said.read_text()
    assert "resuming  step 2" in said.read_text()
    assert harm.left(whole) == harm.left(folder)
    assert not (folder / "heartbeats").exists()
    (lost,) = interruptions_of(folder)
    assert (3, 2) == (lost["done"], lost["resumed_at"])
    assert lost["last_s"] <= lost["noticed_s"] <= lost["first_s"] <= lost["again_s"]
    assert lost["failed_s"] <= lost["noticed_s"]
    assert "rank 1 (host " in lost["report"]
    assert [lost] == json.loads((folder / "report.json").read_text())["interruptions"]
    assert "1 steps repeated" in said.read_text()
    assert not (folder / "failure.json").exists()


@nightly
@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("stop rank 1 step 3 at lm.0 B1", "is stopped"),
        ("delay rank 1 step 3 for 120 s at lm.0 B1", "fell behind"),
    ],
)
def test_torchrun_need_not_wait_for_a_rank_that_hangs(
    pair: Job, whole_pair: Path, tmp_path: Path, fault: str, how: str
) -> None:
    """Once its world has reported, the rank ends at the first signal; torchrun kills it after 30 s only."""
    folder, said = tmp_path / "run", tmp_path / "said"
    arguments = ["train", str(pair.path), "--set", f"train.run_dir={folder}", "--set", "train.timeout_s=5"]
    launching.under_torchrun(2, arguments, said, fault=fault, restarts=1)
    (lost,) = interruptions_of(folder)
    assert how in lost["report"]
    assert 4.9 < lost["noticing_s"]
    assert lost["restart_s"] < 25.0
    assert harm.left(whole_pair) == harm.left(folder)


@pytest.mark.parametrize(
    ("kind", "code", "how"),
    [("kill", -signal.SIGKILL, "ended without a word"), *nightly_only([("stop", 1, "is stopped")])],
)
def test_the_end_of_the_rank_that_keeps_the_store_is_told_by_one_of_the_others(
    opened: Opened, tmp_path: Path, kind: str, code: int, how: str
) -> None:
    """Under a launcher that keeps no store of its own: the survivors agree over the run folder who tells."""
    job = opened(harm.job("enc(1,1,1)@0 lm(1,2,1)@1"))
    arguments = ["train", str(job.path), "--set", f"train.run_dir={tmp_path / 'run'}"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    limit_s = 5 if kind == "stop" else 60
    ranks = [
        launching.started(
            [*arguments, "--set", f"train.timeout_s={limit_s}"],
            tmp_path / f"said-{rank}",
            place | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            fault=f"{kind} rank 0 step 3 at enc.0 B1",
        )
        for rank in range(3)
    ]
    for rank in ranks:
        rank.join(timeout=200)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(3)]
    assert [code, 1, 1] == [rank.exitcode for rank in ranks], said
    assert 1 == "".join(said).count("mimogrid: rank 0 (host "), said
    assert f"{how} at step 3 in 'enc.0 B1'" in "".join(said)
