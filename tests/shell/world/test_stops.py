"""Stops: what a disk, a source, a clock and a port may do to a run. Each row of docs/faults.md names its test."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

import harm
from mimogrid.core.base.errors import WorldError
from mimogrid.core.job.spec import DataSpec, JobSpec
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run import run_lock
from mimogrid.shell.world.launch import Pool
from scale import nightly_only


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    """A small job on two ranks."""
    return harm.job("enc(1,1,1)@0 lm(1,1,1)@1")


@pytest.fixture(scope="module")
def job(opened: Opened, spec: JobSpec) -> Job:
    """The job that all of this happens to."""
    return opened(spec)


@pytest.fixture(scope="module")
def whole(pool: Pool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert "" == harm.run(pool, job, folder).report
    return folder


def failure(pool: Pool, job: Job, function: str, *arguments: object) -> str:
    """The report of a run that fails."""
    with pytest.raises(WorldError) as caught:
        pool.run(function, job.topology.world_size, job, *arguments)
    return str(caught.value)


DISKS = {
    "ENOSPC": "No space left on device",
    "EIO": "Input/output error",
    "ENOTCONN": "Transport endpoint is not connected",
    "STALL": "the file system does not answer",
}


@pytest.mark.parametrize(
    ("code", "rank"),
    [("ENOSPC", 1), ("STALL", 1), *nightly_only([("ENOTCONN", 0), ("EIO", 1), ("STALL", 0)])],
)
def test_a_disk_that_fails_ends_the_run_and_the_run_goes_on(  # noqa: PLR0917 -- fixtures and cases
    pool: Pool, job: Job, whole: Path, tmp_path: Path, code: str, rank: int
) -> None:
    """The cause, the file and the rank are in the first line; the checkpoint before is there, and is enough."""
    limited = open_job(job.path, ["train.timeout_s=5"]) if code == "STALL" else job
    report = failure(pool, limited, "mishaps:failing_disk", str(tmp_path), rank, code)
    pool.close()  # a thread that never comes back
    first = report.splitlines()[0]
    assert f"checkpoint 'step-00000004' was not saved: '{tmp_path}/checkpoints/step-00000004.partial" in first
    assert f"{DISKS[code]} (ranks {rank})." in first
    assert f"then continue with --resume {tmp_path}" in report
    assert 2 == manifest.step_of(manifest.published(tmp_path / "checkpoints")[-1])
    assert "" == harm.run(pool, job, tmp_path, resume=True).report
    assert harm.left(whole) == harm.left(tmp_path)


def lying(spec: JobSpec, wrong: str, sample_id: int) -> JobSpec:
    """The job with a source that is wrong about one sample."""
    options = {**spec.data.options, "wrong": wrong, "sample_id": sample_id}
    return attrs.evolve(spec, data=DataSpec(source="own:lying", options=options))


def test_a_source_that_raises_is_named(pool: Pool, opened: Opened, spec: JobSpec, tmp_path: Path) -> None:
    """Rank, action and error stand in the first line; the run goes on from its last checkpoint once that is mended."""
    report = failure(pool, opened(lying(spec, "raises", 40)), "harm:in_world", str(tmp_path), None, "")
    first = report.splitlines()[0]
    assert re.match(r"rank 0 \(host .*, module enc, stage enc.0\) failed at step 3 in 'enc.0 F", first)
    assert first.endswith("FileNotFoundError: [Errno 2] No such file or directory: '/data/17.jpg'")
    assert 2 == manifest.step_of(manifest.published(tmp_path / "checkpoints")[-1])


def test_nan_in_the_data_costs_its_step_only(
    pool: Pool, opened: Opened, spec: JobSpec, tmp_path: Path
) -> None:
    """No rank takes that step, the log and the metrics say so, and the weights at the end are numbers."""
    assert "" == harm.run(pool, opened(lying(spec, "nan", 40)), tmp_path).report
    log = map(json.loads, (tmp_path / "logs" / "rank-0.jsonl").read_text().splitlines())
    assert [3] == [line["step"] for line in log if line["event"].startswith("step skipped: ")]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 6 == len(steps)


def test_a_clock_that_jumps_decides_nothing(pool: Pool, job: Job, whole: Path, tmp_path: Path) -> None:
    """Deadlines and waits use the monotonic clock; only what is reported about times may be off."""
    for rank in range(2):
        (tmp_path / f"rank-{rank}").mkdir()
    pool.run("mishaps:jumping_clock", 2, job, str(tmp_path))
    assert harm.left(whole) == harm.left(tmp_path)


def test_local_worlds_listen_on_loopback_only(pool: Pool, job: Job, tmp_path: Path) -> None:
    """Whatever the environment says; and a full /dev/shm is no matter to ranks without GPUs."""
    said = pool.run("mishaps:listening", 2, job, str(tmp_path))
    listened = set().union(*(addresses for _, addresses, _ in said))
    assert {"0100007F"} == listened
    assert [set(), set()] == [shared for _, _, shared in said]


def test_a_run_folder_follows_the_umask(pool: Pool, job: Job, tmp_path: Path) -> None:
    """Everything in it, also what is written with care."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o750)
    pool.run("mishaps:with_umask", 2, job, str(folder), 0o027)
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in folder.rglob("*")}
    assert {(True, 0o750), (False, 0o640)} == modes
    assert (folder / run_lock.LOCK).is_file()


def test_the_table_of_faults_names_tests_that_exist() -> None:
    """Each row of docs/faults.md is held by a test."""
    rows = re.findall(
        r"^\| .* \| `(tests/\S+)::(\w+)` \|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 15
    for path, name in rows:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
