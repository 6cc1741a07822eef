"""The error file: under torchrun, what torchrun prints of a failure is the report of the rank that failed first."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.flight_recorder.components.loader import read_dump

import harm
import launching
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world import flight_recorder
from mimogrid.shell.world.error_file import VARIABLE, record_failure
from scale import nightly


HINT = "To enable traceback see"
"""What torchrun prints of a rank that left no error file."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that torchrun has named for this process."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def as_torchrun_reads(*files: Path) -> ChildFailedError:
    """The error that torchrun prints where the ranks with these files failed."""
    failures = {rank: ProcessFailure(rank, 100 + rank, 1, str(file)) for rank, file in enumerate(files)}
    return ChildFailedError("mimogrid", failures)


def test_a_rank_that_was_cut_off_is_not_the_root_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is a lower rank, and failed in the same second."""
    for name, is_echo in (("first", False), ("echo", True)):
        monkeypatch.setenv(VARIABLE, str(tmp_path / name))
        record_failure(f"the report of {name}", is_echo=is_echo)
    error = as_torchrun_reads(tmp_path / "echo", tmp_path / "first")
    assert 1 == error.get_first_failure()[0]
    assert "the report of first" in str(error).partition("Root Cause")[2]
    assert HINT not in str(error)


def test_a_job_that_is_refused_is_told(file: Path, tmp_path: Path) -> None:
    """As on the terminal."""
    assert 2 == main(["check", str(tmp_path / "absent.toml")])
    told = str(as_torchrun_reads(file))
    assert "absent.toml: " in told
    assert HINT not in told


def test_secrets_are_not_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their variables are named, as on the terminal."""
    monkeypatch.setenv("EXAMPLE_TOKEN", "hunter-2")
    assert 2 == main(["check", "hunter-2.toml"])
    assert "$EXAMPLE_TOKEN.toml" in file.read_text()
    assert "hunter-2" not in file.read_text()


def test_nothing_is_written_where_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file that cannot be written is passed over."""
    monkeypatch.delenv(VARIABLE, raising=False)
    record_failure("nobody reads this")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent" / "error.json"))
    record_failure("nobody reads this")
    assert [] == os.listdir(tmp_path)


@nightly
@pytest.mark.world
def test_torchrun_prints_the_report(opened: Callable[[JobSpec], Job], tmp_path: Path) -> None:
    """Of the rank that raised; the rank that was cut off has at most a sentence. Torch's analyzer reads its record."""
    job = opened(harm.job("enc(1,1,1)@0 lm(1,1,1)@1"))
    arguments = ["train", str(job.path), "--set", f"train.run_dir={tmp_path / 'run'}"]
    with pytest.raises(ChildFailedError) as caught:
        launching.under_torchrun(2, arguments, tmp_path / "said", fault="fail rank 1 step 1 at lm.0 B1")
    root = str(caught.value).partition("Root Cause")[2]
    assert "rank 1 (host " in root, str(caught.value)
    assert "failed at step 1 in 'lm.0 B1'" in root
    assert HINT not in root
    facts = read_dump("rank-", str(tmp_path / "run" / flight_recorder.FOLDER / "rank-1"))
    gathered = [entry for entry in facts["entries"] if entry["profiling_name"] == "gloo:all_gather"]
    name, purpose = gathered[-1]["process_group"]
    assert {"name": name, "desc": purpose, "ranks": "[0, 1]"} == facts["pg_config"][name]
