"""Orphans: no rank outlives what has started it, however that ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import harm
import launching
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from scale import nightly_only


pytestmark = pytest.mark.world

AT_ONCE_S = 2.0


@pytest.fixture(scope="module")
def job(opened: Callable[[JobSpec], Job]) -> Job:
    """A job on two ranks."""
    return opened(harm.job("enc(1,1,1)@0 lm(1,1,1)@1"))


@pytest.fixture(scope="module")
def whole(pool: Pool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert "" == harm.run(pool, job, folder).report
    return folder


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize(
    "fault",
    ["stop rank 1 step 3 at lm.0 B1", *nightly_only(["delay rank 1 step 3 for 60 s at lm.0 B1"])],
)
def test_the_ranks_of_a_killed_launcher_end_and_the_run_goes_on(
    pool: Pool, job: Job, whole: Path, tmp_path: Path, fault: str
) -> None:
    """Also a rank that sleeps or is stopped; the lock is free at once, and what is resumed is exact."""
    folder, said = tmp_path / "run", tmp_path / "said"
    arguments = ["train", str(job.path), "--set", f"train.run_dir={folder}"]
    launcher = launching.started(arguments, said, fault=fault)
    launching.await_that((folder / "checkpoints" / "step-00000002").exists, 60.0)
    refused = tmp_path / "refused"
    beside = launching.started(["train", str(job.path), "--resume", str(folder)], refused)
    beside.join(timeout=30)
    assert 2 == beside.exitcode
    assert f"is in use: process {launcher.pid} on host '" in refused.read_text()
    assert f"kill {launcher.pid}" in refused.read_text()
    ranks = launching.holders(folder) - {launcher.pid}
    assert 2 == len(ranks)
    os.kill(launcher.pid or 0, signal.SIGKILL)
    launching.await_that(lambda: all(map(is_gone, ranks)), AT_ONCE_S)
    assert not launching.holders(folder)
    again = launching.started(["train", str(job.path), "--resume", str(folder)], tmp_path / "again")
    again.join(timeout=60)
    assert 0 == again.exitcode, (tmp_path / "again").read_text()
    assert harm.left(whole) == harm.left(folder)


def test_the_ranks_of_a_killed_agent_end(job: Job, tmp_path: Path) -> None:
    """Under torchrun likewise."""
    folder = tmp_path / "run"
    arguments = ["train", str(job.path), "--set", f"train.run_dir={folder}"]
    fault = "delay rank 1 step 3 for 60 s at lm.0 B1"
    agent = launching.process(launching.under_torchrun, 2, arguments, tmp_path / "said", fault=fault)
    agent.start()
    launching.await_that((folder / "checkpoints" / "step-00000002").exists, 60.0)
    ranks = launching.holders(folder)
    assert 2 == len(ranks)
    os.kill(agent.pid or 0, signal.SIGKILL)
    launching.await_that(lambda: all(map(is_gone, ranks)), AT_ONCE_S)


def test_what_a_shell_starts_for_torchrun_ends_with_its_parent(tmp_path: Path) -> None:
    """Torchrun starts its ranks without a pipe of ours: there the kernel looks at the parent."""
    rank = (
        "import os, time; from mimogrid.shell.world.orphans import end_with_launcher as end; end(); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(60)"
    )
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", agent], env=os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    ) as process:
        pid = tmp_path / "pid"
        launching.await_that(lambda: pid.exists() and pid.read_text().endswith(" "), 60.0)
        process.kill()
        launching.await_that(lambda: is_gone(int(pid.read_text())), AT_ONCE_S)


def test_the_server_of_a_killed_launcher_ends_while_it_imports(job: Job, tmp_path: Path) -> None:
    """It has seconds to go until it would look at its pipe."""
    command = [
        sys.executable,
        "-m",
        "mimogrid",
        "train",
        str(job.path),
        "--set",
        f"train.run_dir={tmp_path / 'run'}",
    ]

    def servers() -> set[int]:
        found = set()
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
                line = status.with_name("cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[1]) == process.pid and b"forkserver" in line:
                found.add(int(status.parts[2]))
        return found

    def have_imported_some() -> bool:
        return any(b"libtorch" in Path(f"/proc/{pid}/maps").read_bytes() for pid in servers())

    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        launching.await_that(have_imported_some, 60.0)
        (server,) = servers()
        process.kill()
        process.wait()
        launching.await_that(lambda: is_gone(server), AT_ONCE_S)


def test_the_launcher_may_start_ranks_from_any_thread(pool: Pool) -> None:
    """The kernel looks at the launcher's process, not at the thread that has started a rank."""
    said: list[object] = []
    with Pool(1) as own:
        thread = threading.Thread(target=lambda: said.extend(own.run("bodies:alive", 1)))
        thread.start()
        thread.join()
        time.sleep(0.1)
        assert [True] == said == own.run("bodies:alive", 1)
