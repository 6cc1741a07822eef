"""Faults: whatever befalls a rank, all end in time with one report that names it, and resuming is exact."""

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

import harm
from injection import parse
from mimogrid.core.base.errors import WorldError
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.folders import Stopped
from mimogrid.shell.world.launch import Pool
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
    ("delay rank 3 every step for 0.02 s at reading data", EVEN, "lm.1", "what its costs predict", WAITING),
    *nightly_only(
        [
            (
                "delay rank 1 every step for 0.02 s at reading data",
                None,
                "enc.0",
                "the median of its peers",
                WAITING,
            ),
            ("delay rank 3 every step for 0.04 s at lm.1 F*", EVEN, "lm.1", "what its costs predict", SLOWLY),
        ]
    ),
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
