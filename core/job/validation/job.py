"""The job as a whole: its batch, its schedule, its training run."""

from collections.abc import Iterator

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.models import Gpt
from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.job.spec import (
    BALANCES,
    TRACKERS,
    WORKER_KINDS,
    DataSpec,
    GenerateSpec,
    JobSpec,
    TrackSpec,
    TrainSpec,
)
from mimogrid.core.job.validation.checks import above_zero, at_least, at_most, divisors, one_of
from mimogrid.core.job.validation.optimizer import optimizer_problems


SAMPLES_MOST, MODULES_MOST, WORKERS_MOST = 1_000_000, 500, 1_000
"""Larger numbers are taken for typing errors."""
NAME_BYTES_MOST, PATH_BYTES_MOST = 255, 4000
"""What a file system takes as the name of a folder, and as a path."""


def job_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check what does not depend on the modules."""
    yield from one_of("precision", spec.precision, tuple(VALUE_BYTES))
    yield from at_least("seed", spec.seed, 0)
    yield from one_of("schedule.name", spec.schedule.name, SCHEDULES)
    if spec.schedule.memory_gb is not None:
        yield from above_zero("schedule.memory_gb", spec.schedule.memory_gb)
    yield from optimizer_problems(spec.optimizer)
    yield from _train(spec.train)
    yield from _loading(spec.data)
    yield from _validation(spec)
    yield from _track(spec.track)
    yield from _gpu(spec)
    if not spec.modules:
        yield Problem("modules", "the job has no module.", "Add a table [modules.NAME].")
    yield from too_many_modules(len(spec.modules))
    yield from _batch(spec)


def too_many_modules(count: int) -> Iterator[Problem]:
    """Check the number of modules."""
    if count > MODULES_MOST:
        yield Problem("modules", f"there are {count:,}.", f"Use at most {MODULES_MOST:,}.")


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
    if train.run_dir is not None:
        yield from _run_dir(train.run_dir)


def _loading(data: DataSpec) -> Iterator[Problem]:
    yield from at_least("data.workers", data.workers, 0, "0: ranks load what they read themselves.")
    yield from at_most("data.workers", data.workers, WORKERS_MOST)
    yield from at_least("data.ahead", data.ahead, 1)
    yield from one_of("data.worker_kind", data.worker_kind, WORKER_KINDS)


def _validation(spec: JobSpec) -> Iterator[Problem]:
    validation, where = spec.validation, "validation"
    yield from at_least(f"{where}.every", validation.every, 0, "0: never.")
    yield from at_least(f"{where}.samples", validation.samples, 1)
    yield from at_most(f"{where}.samples", validation.samples, SAMPLES_MOST)
    yield from at_least(
        f"{where}.patience", validation.patience, 0, "0: training does not end before its last step."
    )
    if validation.patience and not validation.best:
        message = f"is {validation.patience}, and nothing says which validation is better than another."
        yield Problem(f"{where}.patience", message, 'Set validation.best, such as best = "loss".')
    texts = [name for name, module in spec.modules.items() if isinstance(module.options, Gpt)]
    if validation.metrics and len(texts) != 1:
        message = f"get the logits of the language model; the job has {len(texts)}."
        yield Problem(f"{where}.metrics", message, "Leave them out.")
    yield from _generate(f"{where}.generate", validation.generate, len(texts))


def _generate(where: str, generate: GenerateSpec, texts: int) -> Iterator[Problem]:
    yield from at_least(f"{where}.tokens", generate.tokens, 0, "0: nothing is generated.")
    if not generate.temperature >= 0:
        yield Problem(
            f"{where}.temperature", f"is {generate.temperature}.", "Use 0 or more; 0: the likeliest tokens."
        )
    yield from at_least(f"{where}.top_k", generate.top_k, 0, "0: all tokens.")
    if not 0 < generate.top_p <= 1:
        yield Problem(f"{where}.top_p", f"is {generate.top_p}.", "Use a number above 0, up to 1.")
    if generate.tokens and texts != 1:
        message = f"is {generate.tokens}, and a language model answers; the job has {texts}."
        yield Problem(f"{where}.tokens", message, "Leave it out.")
    if generate.metrics and not generate.tokens:
        message = "get answers, and none are generated."
        yield Problem(f"{where}.metrics", message, f"Set {where}.tokens, the most tokens of an answer.")


def _track(track: TrackSpec) -> Iterator[Problem]:
    for name in track.to:
        yield from one_of("track.to", name, TRACKERS)
    yield from at_least("track.every", track.every, 1)
    if not track.project or not track.project.isprintable():
        yield Problem("track.project", f"is {track.project!a}.", "Use a name, such as the default: mimogrid.")


def _gpu(spec: JobSpec) -> Iterator[Problem]:
    gpu = spec.gpu
    if gpu.memory_gb is not None:
        yield from above_zero("gpu.memory_gb", gpu.memory_gb)
    for key, part in (("efficiency", gpu.efficiency), ("link_efficiency", gpu.link_efficiency)):
        if part is not None and not 0 < part <= 1:
            message = f"is {part}: the part of its peak that a GPU reaches."
            yield Problem(f"gpu.{key}", message, "Use a number above 0 and up to 1, such as 0.5.")
    for name, times in gpu.times.items():
        yield from one_of("gpu.times", name, tuple(spec.modules))
        yield from above_zero(f"gpu.times.{name}", times)


def _run_dir(path: str) -> Iterator[Problem]:
    """Check that a file system can have a folder of that name."""
    where, remedy = "train.run_dir", "Name a folder, or leave it out: runs/<job>-<n>."
    longest = max(len(name.encode(errors="replace")) for name in path.split("/"))
    if not path:
        yield Problem(where, "is empty.", remedy)
    elif not path.isprintable():
        yield Problem(where, f"{path!a} has characters that cannot be printed.", remedy)
    elif longest > NAME_BYTES_MOST:
        yield Problem(where, f"has a name of {longest} bytes, more than {NAME_BYTES_MOST}.", remedy)
    elif len(path.encode()) > PATH_BYTES_MOST:
        yield Problem(where, f"has {len(path.encode())} bytes, more than {PATH_BYTES_MOST:,}.", remedy)


def _batch(spec: JobSpec) -> Iterator[Problem]:
    size, count = spec.batch.global_size, spec.batch.microbatches
    wrong = [
        *at_least("batch.global_size", size, 1),
        *at_most("batch.global_size", size, SAMPLES_MOST),
        *at_least("batch.microbatches", count, 1),
        *at_most("batch.microbatches", count, SAMPLES_MOST),
    ]
    yield from wrong
    yield from one_of("batch.balance", spec.batch.balance, BALANCES)
    if not wrong and size % count:
        yield Problem(
            "batch.microbatches",
            f"{size} samples of a step do not divide into {count} microbatches.",
            f"Legal counts for {size} samples: {divisors(size)}.",
        )
