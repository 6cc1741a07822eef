"""Validation: what a model makes of samples that training does not see, while it trains.

Every task (`shell.job.tasks`) runs through the forward-only program of the job, in steps of the size of a training
step, so that the layout fits. Nothing that training reads is written: losses are bitwise those without it. The values
are

    loss               of the job, over the samples of all tasks
    TASK/loss          of the job, over those of a task
    TASK/MODULE        of a module with a loss
    TASK/NAME          the mean over samples of what a function of the user's returns under that name

A function ``package.module:function`` is called on the first rank as ``function(logits, sample)``: the logits [T, V] of
one sample, and what the source loads of it for the language model (tokens, labels, loss_weights). It returns numbers by
name; a sample for which it returns none of a name does not count in that mean. One sample at a time is in memory.

The first rank knows all values. It tells the others whether a validation was the best so far, and whether patience is
out (`core.update.patience`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from mimogrid.core.base.errors import WorldError
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.update.patience import best_of, is_patience_out
from mimogrid.core.update.reductions import loss_weight
from mimogrid.shell.job import builders
from mimogrid.shell.job.sources.source import Source
from mimogrid.shell.runtime.exchange import gather_values
from mimogrid.shell.runtime.forward_only import loss_sums, sample_logits
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.world.phases import VALIDATING


Function = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], Mapping[str, float]]


@attrs.frozen
class Validated:
    """The values of a validation, which only the first rank has; whether it is the best, and whether training ends."""

    values: Mapping[str, float]
    is_best: bool
    ends: bool


NOT_VALIDATED = Validated({}, is_best=False, ends=False)


@attrs.define
class _Sums:
    """Sums of losses and of their units, and of metrics and their counts, by name."""

    losses: dict[str, float] = attrs.field(factory=dict[str, float])
    units: dict[str, float] = attrs.field(factory=dict[str, float])
    metrics: dict[str, list[float]] = attrs.field(factory=dict[str, list[float]])

    def add(self, step: Step, losses: Mapping[str, float]) -> None:
        """Add the losses of a step."""
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + loss
            self.units[name] = self.units.get(name, 0.0) + step.units[name]

    def means(self) -> dict[str, float]:
        """Return each loss divided by its units; a loss over nothing is 0."""
        return {
            name: loss / self.units[name] if self.units[name] else 0.0 for name, loss in self.losses.items()
        }


def functions_of(paths: Sequence[str]) -> tuple[Function, ...]:
    """Return the user's functions. Raises PlanError for one that is not there."""
    return tuple(
        builders.find(path, where=f"validation.metrics[{number}]").load() for number, path in enumerate(paths)
    )


def validate(
    runtime: RankRuntime,
    functions: Sequence[Function],
    before: Sequence[Mapping[str, float]],
    tell: Callable[[float, float], None] = lambda *_: None,
) -> Validated:
    """Validate the model as it is now; all ranks call it, the first with the functions of the user's.

    `before` has the values of earlier validations. `tell` is told how many samples are done, and of how many.
    """
    spec, first = runtime.job.spec.validation, runtime.rank == runtime.topology.ranks[0]
    whole, values = _Sums(), dict[str, float]()
    for number, (task, source) in enumerate(runtime.job.tasks.items()):
        sums = _Sums()
        for done, step in enumerate(_steps(runtime, source, spec.samples)):
            samples = done * runtime.job.spec.batch.global_size
            tell(number * spec.samples + samples, len(runtime.job.tasks) * spec.samples)
            losses = loss_sums(runtime, step, source)
            sums.add(step, losses)
            whole.add(step, losses)
            if spec.metrics:
                logits = sample_logits(runtime, step, source)
                runtime.heartbeat.enter(VALIDATING)
                _measure(logits, step, source, functions, sums)
        means = sums.means()
        values |= {
            f"{task}/loss": _loss(runtime, means),
            **{f"{task}/{name}": of for name, of in means.items()},
        }
        values |= {f"{task}/{name}": sum(of) / len(of) for name, of in sums.metrics.items()}
    values = {"loss": _loss(runtime, whole.means()), **values}
    is_best = ends = False
    if first and spec.best:
        is_best, ends = _standing(runtime, [*before, values])
    told = torch.tensor([is_best, ends], dtype=torch.float64, device=runtime.device.torch)
    is_best, ends = gather_values(runtime, told).cpu().sum(dim=0).bool().tolist()
    return Validated(values if first else {}, is_best, ends)


def _steps(runtime: RankRuntime, source: Source, count: int) -> Iterator[Step]:
    """Yield steps with at least so many samples."""
    size = runtime.job.spec.batch.global_size
    for start in range(0, count, size):
        yield step_of(runtime.topology, tuple(source.describe(i) for i in range(start, start + size)))


def _loss(runtime: RankRuntime, means: Mapping[str, float]) -> float:
    return sum(loss_weight(runtime.topology, name) * mean for name, mean in means.items())


def _measure(
    logits: Mapping[int, torch.Tensor], step: Step, source: Source, functions: Sequence[Function], sums: _Sums
) -> None:
    """Call the user's functions with the logits of each sample by its place in a step, on the rank that has them."""
    (text,) = step.topology.graph.texts
    for place, logits_TV in sorted(logits.items()):
        sample = source.load(step.samples[place].id, text)
        for function in functions:
            for name, value in _called(function, logits_TV, sample, step.samples[place].id).items():
                sums.metrics.setdefault(name, []).append(float(value))


def _called(
    function: Function, logits_TV: torch.Tensor, sample: Mapping[str, torch.Tensor], sample_id: int
) -> Mapping[str, float]:
    with torch.no_grad():
        found: Any = function(logits_TV, sample)
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return {str(name): float(value) for name, value in found.items()}
    name = f"{function.__module__}:{function.__name__}"
    raise WorldError(
        f"validation.metrics: '{name}' returned {found!r} for sample {sample_id}, not numbers by name."
    )


def _standing(runtime: RankRuntime, history: Sequence[Mapping[str, float]]) -> tuple[bool, bool]:
    """Return whether the last validation is the best, and whether patience is out."""
    spec = runtime.job.spec.validation
    if spec.best not in history[-1]:
        raise WorldError(f"validation.best: '{spec.best}' is not known. Known: {', '.join(history[-1])}.")
    values = [one[spec.best] for one in history if spec.best in one]
    is_best = best_of(values, highest=spec.highest) == len(values) - 1
    return is_best, is_patience_out(values, highest=spec.highest, patience=spec.patience)
