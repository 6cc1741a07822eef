"""Changes: which keys of a job may change when a run is resumed.

A run is defined by what it computes: which model, from which samples, by which update rule. A key is *free* if it
decides only where, in which order and for how long this is computed, and what is saved:

    free    grids, chunks, split, vocab_padding, recompute, microbatches, tokens_per_microbatch, balance, world_size,
            [schedule], [train], [validation], [track], [gpu], [[layouts]], optimizer.sharded, bucket_mb and cut_mb,
            data.workers, ahead and worker_kind, precision, fp8, engine
    fixed   everything else: models and their options, edges, what is frozen, loss weights, [data], batch.global_size
            (a step uses the samples after those of the step before), [optimizer], seed

A fixed key that differs is refused unless the user names it. Otherwise it would be easy to resume the wrong one of
two runs that differ in one learning rate. Changes have the names of keys in the job file:

>>> [str(change) for change in changes(JOB, attrs.evolve(JOB, seed=7, world_size=8))]
['seed: 0 -> 7', 'world_size: None -> 8']
>>> [change.key for change in refused(JOB, attrs.evolve(JOB, seed=7, world_size=8), accepted=())]
['seed']
>>> list(refused(JOB, attrs.evolve(JOB, seed=7), accepted=("seed",)))
[]
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

from mimogrid.core.job.models import unpadded
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GpuSpec,
    GridSpec,
    JobSpec,
    ScheduleSpec,
    TrackSpec,
    TrainSpec,
    ValidationSpec,
)


JOB = JobSpec(modules={}, data=DataSpec(source="digits"), batch=BatchSpec(global_size=8))
"""A job for examples."""


@attrs.frozen
class Change:
    """A key of the job file with its value before and after; None: the key is absent."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


def changes(before: JobSpec, after: JobSpec) -> Iterator[Change]:
    """Yield every key in which two jobs differ, with defaults filled in; of a module in one job only, the name."""
    ours, theirs = (tuple(spec.modules) for spec in (before, after))
    if ours != theirs:
        yield Change("modules", list(ours), list(theirs))
    both = set(ours) & set(theirs)
    first, second = (flat(attrs.asdict(_of_modules(spec, both))) for spec in (before, after))
    for key in {**first, **second}:
        if first.get(key) != second.get(key):
            yield Change(key, first.get(key), second.get(key))


def refused(before: JobSpec, after: JobSpec, *, accepted: Iterable[str]) -> Iterator[Change]:
    """Yield the changes with which a job cannot resume a run; `accepted` are keys or tables that may change."""
    named = tuple(accepted)
    for change in changes(_essence(before), _essence(after)):
        if not any(change.key == key or change.key.startswith(f"{key}.") for key in named):
            yield change


def _essence(spec: JobSpec) -> JobSpec:
    """Return a job with every free key at its default."""
    return attrs.evolve(
        spec,
        modules={
            name: attrs.evolve(
                module,
                options=unpadded(module.options),
                grid=GridSpec(),
                chunks=1,
                split=None,
                microbatches=None,
                recompute="none",
                engine="",
                fp8="",
            )
            for name, module in spec.modules.items()
        },
        data=attrs.evolve(spec.data, workers=0, ahead=0, worker_kind=""),
        batch=attrs.evolve(spec.batch, microbatches=1, tokens_per_microbatch=0, balance=""),
        schedule=ScheduleSpec(),
        optimizer=attrs.evolve(spec.optimizer, sharded=False, bucket_mb=0.0, cut_mb=0.0),
        train=TrainSpec(),
        validation=ValidationSpec(),
        track=TrackSpec(),
        gpu=GpuSpec(),
        precision="",
        world_size=None,
        layouts=(),
    )


def _of_modules(spec: JobSpec, names: set[str]) -> JobSpec:
    return attrs.evolve(spec, modules={n: module for n, module in spec.modules.items() if n in names})


def flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested tables under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            found[f"{above}{key}"] = value
    return found
