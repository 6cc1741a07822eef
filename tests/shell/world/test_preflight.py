"""Preflight: a machine that is too small refuses a world before anything starts; secrets stay out of what is said."""

import json
import math
import os
import resource
import shutil
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from layouts import job
from mimogrid.core.base.errors import Problem
from mimogrid.core.base.units import in_bytes
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.cli import start
from mimogrid.shell.cli.main import main
from mimogrid.shell.device import machine
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.run import log
from mimogrid.shell.world import preflight
from mimogrid.shell.world.secrets import without_secrets


FIRST = Path(__file__).resolve().parents[3] / "examples" / "first" / "job.toml"


def written(folder: Path, spec: JobSpec) -> Path:
    """The file of a job."""
    path = folder / "job.toml"
    path.write_text(jobfile.dump(spec))
    return path


class StartedError(Exception):
    """Raised in place of starting processes."""


def not_started(*_: object, **__: object) -> None:
    """Do not start a pool."""
    raise StartedError


def test_more_ranks_than_cores_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any process and any folder is made; --force goes on."""
    path = written(tmp_path, job("enc(1,1,1)@0 lm(1,1,8)@1"))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(preflight, "FEW_RANKS", 4)
    monkeypatch.setattr(start, "Pool", not_started)
    words = ["train", str(path), "--set", f"train.run_dir={tmp_path / 'run'}"]
    assert 2 == main(words)
    said = capsys.readouterr().err
    assert "the job needs 9 ranks, and this machine has 2 cores." in said
    assert "--force" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(StartedError):
        main([*words, "--force"])


def lacking(topology: Topology, *, on_host: bool = True, folder: Path | None = None) -> list[Problem]:
    """What keeps a job from running on this machine."""
    return preflight.problems(preflight.checks(topology, on_host=on_host, folder=folder), force=False)


def test_more_memory_than_there_is_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What weights, gradients and the optimizer need is known exactly, for each rank."""
    topology = open_job(written(tmp_path, job("enc(1,1,1)@0 lm(1,1,1)@1"))).topology
    assert [] == lacking(topology)
    monkeypatch.setattr(machine, "available_bytes", lambda: 200 << 20)
    (problem,) = lacking(topology)
    assert problem.message.startswith("2 ranks need at least 210 MB")
    assert "(rank 1 needs most, 105 MB)" in problem.message
    assert problem.message.endswith("and this machine has 210 MB available.")
    assert [] == lacking(topology, on_host=False)


def test_a_rank_that_is_larger_than_its_device_is_refused() -> None:
    """By its number and the name of the device, before anything is built on it."""
    topology = open_job(FIRST).topology
    needed = kept(topology, 2).bytes
    assert [] == list(preflight.device_problems(topology, 2, "NVIDIA H200", needed))
    assert [] == list(preflight.device_problems(topology, 2, "a CPU", None))
    assert [] == list(preflight.device_problems(topology, 7, "of a rank that idles", 0))
    (problem,) = preflight.device_problems(topology, 2, "NVIDIA H200", needed - 1)
    assert "rank 2 needs at least 1.67 MB" in problem.message
    assert "'NVIDIA H200'" in problem.message


def test_a_disk_that_checkpoints_would_fill_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run: the newest is written before the oldest goes. The folder need not exist yet."""
    job = open_job(FIRST)
    size, usage = preflight.checkpoint_bytes(job.topology), shutil.disk_usage(tmp_path)
    weights = sum(math.prod(p.shape) for m in job.topology.modules.values() for p in m.parameters)
    assert 3 * 4 * weights <= size < 3.1 * 4 * weights  # fp32, with two states of AdamW and their counters
    folder = tmp_path / "new" / "run"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * size))
    assert [] == lacking(job.topology, folder=folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * size - 1))
    (problem,) = lacking(job.topology, folder=folder)
    assert f"3 checkpoints take {in_bytes(3 * size)}, and '{tmp_path}' has" in problem.message
    assert not folder.parent.exists()


def test_a_folder_that_cannot_be_written_is_refused_whatever_is_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run could leave anything."""
    topology = open_job(FIRST).topology
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = list(preflight.checks(topology, on_host=True, folder=tmp_path))
    (problem,) = preflight.problems(found, force=True)
    assert f"'{tmp_path}' cannot be written." == problem.message


@pytest.mark.parametrize("command", ["parity", "probe"])
def test_whatever_starts_ranks_asks_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `train` does."""
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 20)
    monkeypatch.setattr(start, "Pool", not_started)
    assert 2 == main([command, str(FIRST)])
    assert "memory: 4 ranks need at least" in capsys.readouterr().err
    with pytest.raises(StartedError):
        main([command, str(FIRST), "--force"])


def test_a_server_that_ends_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it said of itself stands above. With --json nothing else is said."""

    def start(_: BaseProcess) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(BaseProcess, "start", start)
    assert 1 == main(["parity", str(FIRST)])
    first, second = capsys.readouterr().err.splitlines()
    assert "4 ranks start" == first
    assert second.startswith("mimogrid: no rank can be started: the process that forks them has ended.")
    assert 1 == main(["parity", str(FIRST), "--json"])
    assert [second] == capsys.readouterr().err.splitlines()


def test_the_table_has_every_check_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train --preflight` starts nothing and makes nothing; exit code 2 says that a run would be refused."""
    monkeypatch.chdir(tmp_path)
    words = ["train", str(FIRST), "--preflight"]
    assert 0 == main(words)
    assert ["ranks", "memory", "folder", "disk", "files", "ports"] == [
        line.split()[1] for line in capsys.readouterr().out.splitlines()
    ]
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 20)
    assert 2 == main(words)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("NO  memory")
    assert shown[2].endswith("or go on with --force.")
    assert 2 == main([*words, "--json"])
    assert ["memory"] == [problem["where"] for problem in json.loads(capsys.readouterr().out)["problems"]]
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("limits", "raised"), [((24, 24), None), ((24, 4096), (72, 4096)), ((1024, 4096), (1024, 4096))]
)
def test_too_few_descriptors(
    limits: tuple[int, int], raised: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is raised as far as it may be; else the first line says which it is, and the command."""
    written(tmp_path, job("enc(1,1,1)@0 lm(1,1,1)@1"))
    now = {resource.RLIMIT_NOFILE: limits}
    monkeypatch.setattr(resource, "getrlimit", now.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", now.__setitem__)
    found = lacking(open_job(tmp_path / "job.toml").topology)
    if raised is None:
        (problem,) = found
        assert (
            "ulimit: a process may have 24 files open; a launcher of 2 ranks needs 72."
            == str(problem).splitlines()[0]
        )
        assert "ulimit -n 1024" in problem.remedy
    else:
        assert (raised, []) == (now[resource.RLIMIT_NOFILE], found)


def test_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit may be below what the machine has."""
    files: Mapping[str, list[str]] = {
        "/proc/meminfo": ["MemTotal: 100 kB", "MemAvailable:  64 kB"],
        "/sys/fs/cgroup/memory.max": ["50000"],
        "/sys/fs/cgroup/memory.current": ["20000"],
    }
    monkeypatch.setattr(machine, "lines", lambda path: files[path])
    assert 30000 == machine.available_bytes()


def test_secrets_of_the_environment_are_named_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In reports and in logs, in the file and on the terminal; settings such as `false` are no secrets."""
    monkeypatch.setenv("HUB_TOKEN", 'hf_"0123')
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert "403: $HUB_TOKEN is false" == without_secrets('403: hf_"0123 is false')
    topology = open_job(written(tmp_path, job("enc(1,1,1)@0 lm(1,1,1)@1"))).topology
    with log.open_log(tmp_path / "logs", topology.role(0), speaks=True) as logger:
        logger.warning('at hf_"0123', where='hf_"0123')
    assert "at $HUB_TOKEN  where $HUB_TOKEN" in capsys.readouterr().err
    event = json.loads((tmp_path / "logs" / "rank-0.jsonl").read_text())
    assert ("at $HUB_TOKEN", "$HUB_TOKEN") == (event["event"], event["where"])
    assert 2 == main(["check", str(tmp_path / 'hf_"0123.toml')])
    said = capsys.readouterr().err
    assert "$HUB_TOKEN" in said
    assert "0123" not in said
