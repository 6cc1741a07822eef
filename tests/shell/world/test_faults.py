"""Faults: whatever befalls a rank, all end in time with one report that names it, and resuming is exact."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

import harm
import launching
import sweep
from injection import parse
from mimogrid.core.base.errors import WorldError
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.folders import Stopped
from mimogrid.shell.world.launch import Pool
from mimogrid.shell.world.preemption import EXIT_CODE
from scale import nightly_only


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]
CASES = [
    "fail rank 0 step 3 at enc.0 B1",
    "kill rank 0 step 3 at publishing a checkpoint",
    "stop rank 3 step 3 at lm.1 B1",
    "delay rank 3 step 3 for 60 s at lm.1 B3",
    "delay rank 0 step 3 for 0.4 s at UPDATE",
    *nightly_only(
        [
            "fail rank 3 step 3 at saving a checkpoint",
            "kill rank 0 step 0 at building",
            "kill rank 3 step 3 at lm.1 F0",
            "kill rank 0 step 3 at enc.0 REDUCE0",
            "kill rank 0 step 3 at a checkpoint is published",
            "stop rank 3 step 0 at rendezvous",
            "stop rank 0 step 3 at NORM",
        ]
    ),
]


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def job(opened: Opened) -> Job:
    """The job that all of this happens to."""
    return opened(harm.job())


@pytest.fixture(scope="module")
def whole(pool: Pool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert "" == harm.run(pool, job, folder).report
    return folder


@pytest.mark.parametrize("line", CASES)
def test_a_run_ends_with_the_right_report_or_goes_on(
    pool: Pool, job: Job, whole: Path, tmp_path: Path, line: str
) -> None:
    """The report names rank, module, step and action; the resumed run ends with the same bits."""
    (case,) = (case for case in harm.cases() if line == str(case))
    ended = harm.judge(pool, job, tmp_path / "run", whole, case)
    assert ended.seconds < harm.LONG_S  # whoever is waited for for so long is not waited for to the end


EVEN = Costs(stages=dict.fromkeys(("enc.0", "lm.0", "lm.1"), StageCosts(forward=1.0, backward=2.0)))
SLOWLY, WAITING = "it computes slowly", "it waits for its data"
STRAGGLERS = [
    ("delay rank 1 every step for 0.04 s at enc.0 B*", None, "enc.0", "the median of its peers", SLOWLY),
    ("delay rank 1 every step for 0.02 s at reading data", None, "enc.0", "the median of its peers", WAITING),
    ("delay rank 3 every step for 0.04 s at lm.1 F*", EVEN, "lm.1", "what its costs predict", SLOWLY),
    ("delay rank 3 every step for 0.02 s at reading data", EVEN, "lm.1", "what its costs predict", WAITING),
]


@pytest.mark.parametrize(("line", "costs", "stage", "standard", "cause"), STRAGGLERS)
def test_a_rank_that_is_always_slow_is_told_of(  # noqa: PLR0917 -- fixtures and cases
    pool: Pool,
    opened: Opened,
    tmp_path: Path,
    line: str,
    costs: Costs | None,
    stage: str,
    standard: str,
    cause: str,
) -> None:
    """Once per window, in one line of the log and in the metrics: rank, module, stage, by how much, and why."""
    spec, window = harm.job(), 6
    limits = attrs.evolve(spec.train, steps=window + 2, checkpoint_every=0, timeout_s=60.0)
    slow = opened(attrs.evolve(spec, train=limits, schedule=attrs.evolve(spec.schedule, costs=costs)))
    tmp_path.joinpath("run").mkdir()
    pool.run("harm:watched", 4, slow, str(tmp_path / "run"), line, window)
    rank, module = parse(line).rank, stage.partition(".")[0]
    log = map(json.loads, (tmp_path / "run" / "logs" / "rank-0.jsonl").read_text().splitlines())
    # On a busy machine another rank may be slow, too.
    begins = f"straggler: rank {rank} (module {module}, stage {stage}) computes for "
    said, *_ = [entry["event"] for entry in log if entry["event"].startswith(begins)]
    assert f" times {standard}, " in said
    assert said.endswith(f": {cause}")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [window - 1] == [step["step"] for step in steps if "stragglers" in step]
    (record,) = [of_rank for of_rank in steps[window - 1]["stragglers"] if rank == of_rank["rank"]]
    told = (rank, [module], [stage], standard, cause)
    assert told == tuple(record[key] for key in ("rank", "modules", "stages", "standard", "cause"))
    assert record["busy_s"] > 1.5 * record["expected_s"] > 0


@pytest.mark.parametrize("rank", [3, *nightly_only([0])])
def test_a_rank_that_is_asked_to_stop_stops_all_after_the_step(
    pool: Pool, job: Job, whole: Path, tmp_path: Path, rank: int
) -> None:
    """All ranks stop at one step and save there, though no checkpoint was due; the resumed run is exact."""
    said = pool.run("harm:asked", 4, job, str(tmp_path), rank, 2)
    assert [Stopped(str(tmp_path), 3)] * 4 == said
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
    assert "" == harm.run(pool, job, tmp_path, resume=True).report
    assert harm.left(whole) == harm.left(tmp_path)


@pytest.mark.parametrize("during_the_save", [False, True])
def test_a_second_signal_ends_a_step_and_does_not_end_the_save(
    pool: Pool, job: Job, whole: Path, tmp_path: Path, during_the_save: bool
) -> None:
    """Whoever hangs in a step can be ended by it; what is being saved is saved. Either way the run goes on exactly."""
    beside = open_job(job.path, ["train.checkpoint_async=true", "train.timeout_s=20"])
    if during_the_save:
        said = pool.run("sweep:asked_twice", 4, beside, str(tmp_path), during_the_save)
        assert [Stopped(str(tmp_path), 3)] * 4 == said
        newest = 3
    else:
        with pytest.raises(WorldError, match="killed by signal 15"):
            pool.run("sweep:asked_twice", 4, beside, str(tmp_path), during_the_save)
        newest = 2
    published = manifest.published(tmp_path / "checkpoints")
    assert not published or newest == manifest.step_of(published[-1])
    assert bool(published) or not during_the_save
    assert "" == harm.run(pool, job, tmp_path, resume=True).report
    assert harm.left(whole) == harm.left(tmp_path)


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


@pytest.mark.parametrize("number", [signal.SIGINT, *nightly_only([signal.SIGTERM]), signal.SIGHUP])
def test_a_launcher_that_is_asked_to_stop_passes_it_on(
    pool: Pool, pair: Job, whole_pair: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The command saves, exits with a code that launchers restart on, and prints the command that goes on."""
    folder, said = tmp_path / "run", tmp_path / "said"
    arguments = ["train", str(pair.path), "--set", f"train.run_dir={folder}"]
    process = launching.started(arguments, said, fault="delay rank 1 step 2 for 2 s at UPDATE")
    launching.await_that(lambda: "step 1/" in said.read_text() if said.exists() else False, 60.0)
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
    launching.await_that(lambda: "step 0/" in said.read_text() if said.exists() else False, 60.0)
    for wait_s in (1.0, 0.0):
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
