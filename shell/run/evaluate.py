"""Evaluation: greedy answers to held-out samples (`generation`), in passes of as many samples as a training step has.

Modules of the user's that have a loss rest in these passes. If the questions are `Generative`, one more pass over the
prompts with their answers, of which none is longer than a true one, lets such modules generate.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import attrs
import torch

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import GenerateSpec
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.run.generation import Prompt, answers_to
from mimogrid.shell.runtime.forward_only import generate
from mimogrid.shell.runtime.rank import RankRuntime


@runtime_checkable
class Questions(Protocol):
    """A source of held-out samples that have a prompt and one true answer."""

    stop: int

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample."""
        ...

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return a sample's tensors for a module."""
        ...

    def prompt(self, sample_id: int, module: str) -> tuple[int, ...]:
        """Return the tokens before the answer, -1 at placeholders."""
        ...

    def answer(self, sample_id: int) -> tuple[int, ...]:
        """Return the true answer, without the stop token."""
        ...

    def spell(self, tokens: tuple[int, ...]) -> str:
        """Return tokens as text."""
        ...

    def image(self, sample_id: int) -> Any:
        """Return the image to read, as an array of grey values."""
        ...


@runtime_checkable
class Generative(Questions, Protocol):
    """Questions after whose answers modules of the user's generate something: a picture, a sound.

    `predictions` has by module what it returned as ``prediction`` for a sample, without the dim of samples.
    """

    def start(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return what a module reads to generate, besides the rows that feed it; {}: nothing."""
        ...

    def scores(self, sample_id: int, predictions: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """Return how good predictions are, as numbers by name; the report has their means."""
        ...

    def picture(self, sample_id: int, predictions: Mapping[str, torch.Tensor]) -> Any:
        """Return the question with what was generated, as an array of grey values."""
        ...

    def caption(self, sample_id: int, predictions: Mapping[str, torch.Tensor]) -> str:
        """Return a line for this picture."""
        ...


@runtime_checkable
class Examined(Protocol):
    """A source that holds samples out for evaluation, task by task."""

    tasks: tuple[str, ...]

    def held_out(self, *, task: str) -> Questions:
        """Return the samples of a task that training never sees."""
        ...


@attrs.frozen
class Answer:
    """The predicted and the true answer to a sample, both without the stop token.

    The first rank has what was generated after it, by module.
    """

    sample_id: int
    predicted: tuple[int, ...]
    true: tuple[int, ...]
    predictions: Mapping[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor], eq=False)

    @property
    def is_right(self) -> bool:
        """Whether both are the same, to the last token."""
        return self.predicted == self.true


def examine(
    runtime: RankRuntime,
    questions: Questions,
    count: int,
    tell: Callable[[float, float], None] = lambda *_: None,
) -> tuple[Answer, ...]:
    """Answer at least `count` held-out samples, in passes of a whole step; the same on every rank.

    `tell` is told how many passes are done, and of how many.
    """
    size = runtime.job.spec.batch.global_size
    most = max(len(questions.answer(i)) for i in range(size))
    answers: list[Answer] = []
    for start in range(0, count, size):
        ids = range(start, start + size)
        passes = itertools.count(start // size * (most + 1))
        prompts = [_prompt(questions, i, runtime.topology) for i in ids]
        source = _Prompts(questions, runtime.topology, dict.fromkeys(ids, ()))
        tokens = answers_to(
            runtime,
            prompts,
            source,
            GenerateSpec(tokens=most + 1),
            lambda: tell(next(passes), math.ceil(count / size) * (most + 1)),  # noqa: B023 -- called at once
        )
        given = {i: _without(tokens[i], questions.stop) for i in ids}
        # An answer that has not stopped is longer than any true one, for which the sequence has room.
        short = {i: answer[:most] for i, answer in given.items()}
        generated = _generated(runtime, questions, short) if isinstance(questions, Generative) else {}
        answers += [Answer(i, given[i], questions.answer(i), generated.get(i, {})) for i in ids]
    return tuple(answers)


def _generated(
    runtime: RankRuntime, questions: Questions, answers: Mapping[int, tuple[int, ...]]
) -> dict[int, Mapping[str, torch.Tensor]]:
    """Return what modules generate after answers, by sample and module, on the first rank."""
    prompts = _Prompts(questions, runtime.topology, answers)
    step = step_of(runtime.topology, tuple(prompts.describe(i) for i in answers))
    generated = generate(runtime, step, prompts)
    return {sample_id: generated.get(place, {}) for place, sample_id in enumerate(answers)}


def _prompt(questions: Questions, sample_id: int, topology: Topology) -> Prompt:
    tokens = questions.prompt(sample_id, topology.graph.texts[0])
    words = sum(token >= 0 for token in tokens)
    sample = Sample(sample_id, words, questions.describe(sample_id).rows)
    return Prompt(sample, tokens, frozenset({questions.stop}))


def _without(tokens: tuple[int, ...], stop: int) -> tuple[int, ...]:
    return tokens[:-1] if stop in tokens else tokens


@attrs.frozen
class _Prompts:
    """A source of prompts, each followed by its answer."""

    questions: Questions
    topology: Topology
    answers: Mapping[int, tuple[int, ...]]

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a prompt with its answer."""
        prompt = _prompt(self.questions, sample_id, self.topology).sample
        return attrs.evolve(prompt, length=prompt.length + len(self.answers[sample_id]))

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return the rows of a sample, its tokens, or what a module reads to generate."""
        if module in self.topology.graph.texts:
            return {
                "tokens": torch.tensor((*self.questions.prompt(sample_id, module), *self.answers[sample_id]))
            }
        if isinstance(self.questions, Generative) and self.topology.modules[module].model.has_loss:
            return self.questions.start(sample_id, module)
        return self.questions.load(sample_id, module)
