"""Validation: what it says is what a training step would say, and training is the same without it."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.world.launch import Pool
from pictures_that_fail import job_in


ROOT = Path(__file__).resolve().parents[3]
TRAIN = "mimogrid.shell.run.train:in_world"
TWO_TASKS = ("a", "b")


def validated(folder: Path, *overrides: str, tasks: tuple[str, ...] = TWO_TASKS) -> Job:
    """Open a job of two ranks, with dropout, that validates after every second of its steps."""
    job = job_in(folder, "modules.language.options.dropout=0.2")
    name = job.spec.data.source.partition(":")[0]
    own = f'source = "{name}:pictures", options = {{ folder = "{folder}", sequence = 8 }}'
    wanted = [f"validation.tasks.{task}={{ {own} }}" for task in tasks]
    return open_job(
        job.path,
        [
            *job.overrides,
            *wanted,
            "validation.every=2",
            "validation.samples=10",
            f'validation.metrics=["{name}:right"]',
            "validation.generate.tokens=2",
            f'validation.generate.metrics=["{name}:said"]',
            *overrides,
        ],
    )


def run(pool: Pool, job: Job, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a job in a folder; return its report."""
    folder.mkdir(exist_ok=True)
    found = pool.run(TRAIN, 2, job, None, str(folder), str(folder) if resume else None)
    return next(report for report in found if report)


@pytest.mark.world
def test_training_is_bitwise_that_without_validation(pool: Pool, tmp_path: Path) -> None:
    """With dropout, the best weights kept, and functions of the user's; each value stands where the docs say."""
    job = validated(tmp_path, "train.steps=5", 'validation.best="a/right"', "validation.highest=true")
    report = run(pool, job, tmp_path / "with")
    alone = run(pool, open_job(job.path, [*job.overrides, "validation.every=0"]), tmp_path / "without")
    assert alone["losses"] == report["losses"]
    files = [(tmp_path / way / "weights.safetensors").read_bytes() for way in ("with", "without")]
    assert files[0] == files[1]
    assert [1, 3, 4] == [one["step"] for one in report["validations"]]
    names = {
        "loss",
        *(
            f"{task}/{name}"
            for task in TWO_TASKS
            for name in ("loss", "language", "right", "long", "exact", "said")
        ),
    }
    assert all(names | {"step"} == one.keys() for one in report["validations"])
    first = report["validations"][0]
    assert first["a/loss"] == first["b/loss"] == first["a/language"] == pytest.approx(first["loss"])
    assert 0 <= first["a/right"] <= 1
    assert 0 <= first["a/exact"] <= 1
    assert 0 < first["a/said"] <= 2
    assert pytest.approx((4 + 5) / 2) == first["a/long"]  # of those with more than three positions, 4 or 5
    lines = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    assert [1, 3, 4] == [line["step"] for line in lines if "validation" in line]
    assert report["best_validation"] == max(report["validations"], key=lambda one: one["a/right"])["step"]
    best = load_file(tmp_path / "with" / "best.safetensors")
    assert best.keys() == load_file(tmp_path / "with" / "weights.safetensors").keys()
    assert ([], None) == (alone["validations"], alone["best_validation"])


@pytest.mark.world
def test_losses_are_those_of_a_training_step_and_patience_ends_a_run(pool: Pool, tmp_path: Path) -> None:
    """Without learning: of the same samples the same loss. No validation is better than the first, so two more do."""
    overrides = (
        "precision=fp64",
        "optimizer.lr=0.0",
        "train.steps=9",
        "validation.every=1",
        "validation.samples=8",
        'validation.best="loss"',
        "validation.patience=2",
        "modules.language.options.dropout=0.0",
        "validation.metrics=[]",
        "validation.generate={ tokens = 0 }",
    )
    report = run(pool, validated(tmp_path, *overrides, tasks=("a",)), tmp_path / "run")
    assert pytest.approx(report["losses"][0], rel=1e-12) == report["validations"][0]["a/language"]
    assert (3, 0, 3) == (report["ended_early_after"], report["best_validation"], len(report["losses"]))
    best, last = (load_file(tmp_path / "run" / name) for name in ("best.safetensors", "weights.safetensors"))
    assert all(best[name].equal(last[name]) for name in last)
    assert (tmp_path / "run" / "timeline.svg").is_file()
    again = run(pool, validated(tmp_path, *overrides, tasks=("a",)), tmp_path / "run", resume=True)
    assert report == again


@pytest.mark.world
def test_a_resumed_run_remembers_validations(pool: Pool, tmp_path: Path) -> None:
    """Their values are those of a run that was never stopped, and so is the best."""
    job = validated(tmp_path, "train.steps=4", 'validation.best="loss"')
    whole = run(pool, job, tmp_path / "whole")
    run(pool, open_job(job.path, [*job.overrides, "train.steps=2"]), tmp_path / "parts")
    resumed = run(pool, job, tmp_path / "parts", resume=True)
    for key in ("losses", "validations", "best_validation"):
        assert whole[key] == resumed[key]


@pytest.mark.world
def test_a_function_that_returns_something_else_ends_the_run_in_words(pool: Pool, tmp_path: Path) -> None:
    """With its name, what it returned, and of which sample."""
    job = validated(tmp_path)
    strange = job.spec.validation.metrics[0].replace(":right", ":strange")
    job = open_job(job.path, [*job.overrides, f'validation.metrics=["{strange}"]'])
    with pytest.raises(WorldError, match=rf"'{strange}' returned 0.5 for sample 0, not numbers by name"):
        run(pool, job, tmp_path / "run")


def problems(path: Path, *overrides: str) -> list[tuple[str, str]]:
    """What is wrong with a job, and where."""
    with pytest.raises(PlanError) as caught:
        open_job(path, ["validation.every=1", *overrides])
    return [(problem.where, problem.message) for problem in caught.value.problems]


FIRST, DIGITS = (ROOT / "examples" / name / "job.toml" for name in ("first", "digits"))


@pytest.mark.parametrize(
    ("path", "override", "where", "said"),
    [
        (FIRST, "validation.samples=8", "validation.tasks", "holds no samples out"),
        (DIGITS, "validation.best=los", "validation.best", "'los' is not known"),
        (
            DIGITS,
            'validation.tasks.own={ source = "conversation" }',
            "validation.tasks.own.source",
            "'conversation' is not a built-in source",
        ),
        (
            DIGITS,
            'validation.tasks.own={ source = "synthetic", options = { features = { vision = 16 } } }',
            "validation.tasks.own",
            "reads rows of width 42, the source gives 16",
        ),
        (DIGITS, 'validation.metrics=["no_such_module:right"]', "validation.metrics[0]", "no_such_module"),
        (DIGITS, "validation.generate.tokens=-1", "validation.generate.tokens", "is -1"),
        (DIGITS, "validation.generate.top_p=0.0", "validation.generate.top_p", "is 0.0"),
        (DIGITS, "validation.generate.temperature=nan", "validation.generate.temperature", "is nan"),
        (DIGITS, 'validation.generate.metrics=["m:f"]', "validation.generate.metrics", "none are generated"),
        (DIGITS, "validation.every=-1", "validation.every", "is -1"),
        (DIGITS, "validation.samples=0", "validation.samples", "is 0"),
        (DIGITS, "validation.patience=3", "validation.patience", "nothing says which validation is better"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(
    path: Path, override: str, where: str, said: str
) -> None:
    """A source that holds nothing out or does not fit, a value that there is not, a number that makes no sense."""
    found = problems(path, override)
    assert any(place.startswith(where) and said in message for place, message in found), found


def test_the_data_source_may_hold_samples_out() -> None:
    """Those of digits, task by task."""
    job = open_job(
        ROOT / "examples" / "digits" / "job.toml", ["validation.every=1", 'validation.best="read/language"']
    )
    assert ["read", "copy", "count"] == list(job.tasks)
    assert not open_job(ROOT / "examples" / "digits" / "job.toml").tasks
