"""The job as a whole: its batch, its schedule, its training run."""

from collections.abc import Iterator

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.job.spec import JobSpec, TrainSpec
from mimogrid.core.job.validation.checks import above_zero, at_least, at_most, divisors, one_of
from mimogrid.core.job.validation.optimizer import optimizer_problems


SAMPLES_MOST = 10_000_000
"""A larger number is taken for a typing error."""


def job_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check what does not depend on the modules."""
    yield from one_of("precision", spec.precision, tuple(VALUE_BYTES))
    yield from at_least("seed", spec.seed, 0)
    yield from one_of("schedule.name", spec.schedule.name, SCHEDULES)
    if spec.schedule.memory_gb is not None:
        yield from above_zero("schedule.memory_gb", spec.schedule.memory_gb)
    yield from optimizer_problems(spec.optimizer)
    yield from _train(spec.train)
    if not spec.modules:
        yield Problem("modules", "the job has no module.", "Add a table [modules.NAME].")
    yield from _batch(spec)


def _train(train: TrainSpec) -> Iterator[Problem]:
    yield from at_least("train.steps", train.steps, 0)
    yield from at_least("train.checkpoint_every", train.checkpoint_every, 0, "0: only at the end.")
    yield from at_least("train.keep_checkpoints", train.keep_checkpoints, 1)
    yield from at_least("train.keep_every", train.keep_every, 0, "0: none for ever.")
    yield from at_least("train.threads", train.threads, 1)
    yield from above_zero("train.timeout_s", train.timeout_s)
    for step in train.profile.steps:
        if step not in range(train.steps):
            remedy = f"Name steps from 0 on, below train.steps = {train.steps}."
            yield Problem("train.profile.steps", f"has {step}, which is no step of the run.", remedy)
    for rank in train.profile.ranks:
        yield from at_least("train.profile.ranks", rank, 0)
    for entry in train.skip_steps:
        first, last = (entry, entry) if isinstance(entry, int) else entry
        if not 0 <= first <= last:
            remedy = "Steps count from 0; a range is [first, last], both included."
            yield Problem("train.skip_steps", f"has [{first}, {last}].", remedy)
    if train.run_dir == "":
        yield Problem("train.run_dir", "is empty.", "Name a folder, or leave it out: runs/<job>-<n>.")


def _batch(spec: JobSpec) -> Iterator[Problem]:
    size, count = spec.batch.global_size, spec.batch.microbatches
    wrong = [
        *at_least("batch.global_size", size, 1),
        *at_most("batch.global_size", size, SAMPLES_MOST),
        *at_least("batch.microbatches", count, 1),
    ]
    yield from wrong
    if not wrong and size % count:
        yield Problem(
            "batch.microbatches",
            f"{size} samples of a step do not divide into {count} microbatches.",
            f"Legal counts for {size} samples: {divisors(size)}.",
        )
