"""Preflight: a machine that is too small refuses a world before anything starts; secrets stay out of what is said."""

import json
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from layouts import job
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.cli import start
from mimogrid.shell.cli.main import main
from mimogrid.shell.device import machine
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.run import log
from mimogrid.shell.world import preflight
from mimogrid.shell.world.secrets import without_secrets


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


def test_more_memory_than_there_is_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What weights, gradients and the optimizer need is known exactly."""
    topology = open_job(written(tmp_path, job("enc(1,1,1)@0 lm(1,1,1)@1"))).topology
    assert [] == list(preflight.problems(topology, on_host=True))
    monkeypatch.setattr(machine, "available_bytes", lambda: 200 << 20)
    (problem,) = preflight.problems(topology, on_host=True)
    assert problem.message.startswith("2 ranks need at least 0.2 GB")
    assert problem.message.endswith("and this machine has 0.2 GB available.")
    assert [] == list(preflight.problems(topology, on_host=False))


@pytest.mark.parametrize(
    ("limits", "raised"), [((24, 24), None), ((24, 4096), (72, 4096)), ((1024, 4096), (1024, 4096))]
)
def test_too_few_descriptors(
    limits: tuple[int, int], raised: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is raised as far as it may be; else the first line says which it is, and the command."""
    now = {resource.RLIMIT_NOFILE: limits}
    monkeypatch.setattr(resource, "getrlimit", now.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", now.__setitem__)
    found = list(preflight.allow_files(2))
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
