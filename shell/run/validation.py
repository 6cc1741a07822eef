"""Validation: what a model makes of samples that training does not see, while it trains.

Every task (`shell.job.tasks`) runs through the forward-only program of the job, in steps of the size of a training
step, so that the layout fits. Nothing that training reads is written: losses are bitwise those without it. The values
are

    loss               of the job, over the samples of all tasks
    TASK/loss          of the job, over those of a task
    TASK/MODULE        of a module with a loss
    TASK/NAME          the mean over samples of what a function of the user's returns under that name
    TASK/exact         the share of samples whose answer is the true one, where the model answers (`generation`)

A function ``package.module:function`` is called on the first rank as ``function(logits, sample)``: the logits [T, V] of
one sample, and what the source loads of it for the language model (tokens, labels, loss_weights). One of
``[validation.generate]`` gets the tokens of an answer in place of the logits. Both return numbers by name; a sample for
which they return none of a name does not count in that mean. One sample at a time is in memory.

A prompt is the sample up to the last stretch of tokens that count in its loss, which is the true answer.

The first rank knows all values. It tells the others whether a validation was the best so far, and whether patience is
out (`core.update.patience`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from mimogrid.core.base.errors import WorldError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import ValidationSpec
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.update.patience import best_of, is_patience_out
from mimogrid.core.update.reductions import loss_weight
from mimogrid.shell.job import builders
from mimogrid.shell.job.sources.source import Source
from mimogrid.shell.run.generation import Prompt, answers_to
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


@attrs.frozen
class Functions:
    """The user's functions: those that get logits, and those that get answers."""

    of_logits: tuple[Function, ...] = ()
    of_answers: tuple[Function, ...] = ()

    @classmethod
    def of(cls, spec: ValidationSpec) -> "Functions":
        """Find them. Raises PlanError for one that is not there."""
        return cls(_found("metrics", spec.metrics), _found("generate.metrics", spec.generate.metrics))


def _found(key: str, paths: Sequence[str]) -> tuple[Function, ...]:
    found = (builders.find(path, where=f"validation.{key}[{n}]") for n, path in enumerate(paths))
    return tuple(builder.load() for builder in found)


def validate(
    runtime: RankRuntime,
    functions: Functions,
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
                _measure(logits, step, source, functions.of_logits, sums)
            if spec.generate.tokens:
                _answer(runtime, step, source, functions.of_answers, sums)
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


def _answer(
    runtime: RankRuntime, step: Step, source: Source, functions: Sequence[Function], sums: _Sums
) -> None:
    """Let the model answer each sample of a step; the first rank compares answers, and calls the user's functions."""
    (text,) = runtime.topology.graph.texts
    how = runtime.job.spec.validation.generate
    asked = [_opening(sample, source.load(sample.id, text), how.stop) for sample in step.samples]
    answers = answers_to(runtime, [prompt for prompt, _ in asked], source, how)
    runtime.heartbeat.enter(VALIDATING)
    if runtime.rank != runtime.topology.ranks[0]:
        return
    for prompt, true in asked:
        sample_id = prompt.sample.id
        answer = answers[sample_id]
        sums.metrics.setdefault("exact", []).append(float(answer == true))
        given = torch.tensor([token for token in answer if token not in prompt.stops], dtype=torch.int64)
        for function in functions:
            found = _called(function, given, source.load(sample_id, text), sample_id)
            for name, value in found.items():
                sums.metrics.setdefault(name, []).append(value)


def _opening(
    sample: Sample, loaded: Mapping[str, torch.Tensor], stops: Sequence[int]
) -> tuple[Prompt, tuple[int, ...]]:
    """Return what stands before the last answer of a sample, and that answer. Raises WorldError where there is none."""
    counts = (loaded["loss_weights"] > 0).tolist()
    last = max((place for place, counted in enumerate(counts) if counted), default=-1)
    if last < 0:
        raise WorldError(
            f"validation.generate: no token of sample {sample.id} counts, so it has no true answer."
        )
    first = next((place + 1 for place in range(last, -1, -1) if not counts[place]), 0)
    true = tuple(loaded["labels"][first : last + 1].tolist())
    tokens = tuple(loaded["tokens"][: first + 1].tolist())
    if (loaded["tokens"][first + 1 :] < 0).any():
        raise WorldError(
            f"validation.generate: sample {sample.id} has placeholders behind the prompt of its last answer."
        )
    prompt = attrs.evolve(sample, length=sum(token >= 0 for token in tokens))
    return Prompt(prompt, tokens, frozenset(stops or true[-1:])), true


def _called(
    function: Function, logits_TV: torch.Tensor, sample: Mapping[str, torch.Tensor], sample_id: int
) -> Mapping[str, float]:
    with torch.no_grad():
        found: Any = function(logits_TV, sample)
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return {str(name): float(value) for name, value in found.items()}
    name = f"{function.__module__}:{function.__name__}"
    raise WorldError(f"validation: '{name}' returned {found!r} for sample {sample_id}, not numbers by name.")


def _standing(runtime: RankRuntime, history: Sequence[Mapping[str, float]]) -> tuple[bool, bool]:
    """Return whether the last validation is the best, and whether patience is out."""
    spec = runtime.job.spec.validation
    if spec.best not in history[-1]:
        raise WorldError(f"validation.best: '{spec.best}' is not known. Known: {', '.join(history[-1])}.")
    values = [one[spec.best] for one in history if spec.best in one]
    is_best = best_of(values, highest=spec.highest) == len(values) - 1
    return is_best, is_patience_out(values, highest=spec.highest, patience=spec.patience)
