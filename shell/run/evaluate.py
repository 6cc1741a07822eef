"""Evaluation: greedy answers to held-out samples, by forward-only programs of the same executor.

Every pass runs the whole pipeline over the prompts with their answers so far, and adds one token to each answer. All
ranks get all new tokens, so all know the lengths of the next pass. A pass has as many samples as a training step, so
that the layout fits it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import attrs
import torch

from mimogrid.core.base.samples import Sample
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.runtime.forward_only import predict
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
class Examined(Protocol):
    """A source that holds samples out for evaluation, task by task."""

    tasks: tuple[str, ...]

    def held_out(self, *, task: str) -> Questions:
        """Return the samples of a task that training never sees."""
        ...


@attrs.frozen
class Answer:
    """The predicted and the true answer to a sample, both without the stop token."""

    sample_id: int
    predicted: tuple[int, ...]
    true: tuple[int, ...]

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
        tokens: dict[int, tuple[int, ...]] = dict.fromkeys(ids, ())
        for done in range(most + 1):
            tell(start // size * (most + 1) + done, math.ceil(count / size) * (most + 1))
            tokens = _one_more(runtime, questions, tokens)
        answers += [Answer(i, _until(tokens[i], questions.stop), questions.answer(i)) for i in ids]
    return tuple(answers)


def _one_more(
    runtime: RankRuntime, questions: Questions, answers: Mapping[int, tuple[int, ...]]
) -> dict[int, tuple[int, ...]]:
    """Add one token to every answer that has not stopped."""
    prompts = _Prompts(questions, runtime.topology, answers)
    step = step_of(runtime.topology, tuple(prompts.describe(i) for i in answers))
    predicted = predict(runtime, step, prompts)
    return {
        i: tokens if questions.stop in tokens else (*tokens, token)
        for (i, tokens), token in zip(answers.items(), predicted, strict=True)
    }


def _until(tokens: tuple[int, ...], stop: int) -> tuple[int, ...]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


@attrs.frozen
class _Prompts:
    """A source of prompts, each followed by its answer so far."""

    questions: Questions
    topology: Topology
    answers: Mapping[int, tuple[int, ...]]

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a prompt with its answer so far."""
        text = self.topology.graph.texts[0]
        prompt = self.questions.prompt(sample_id, text)
        words = sum(token >= 0 for token in prompt) + len(self.answers[sample_id])
        return Sample(sample_id, words, self.questions.describe(sample_id).rows)

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return the rows of a sample, or its tokens so far."""
        if module not in self.topology.graph.texts:
            return self.questions.load(sample_id, module)
        tokens = (*self.questions.prompt(sample_id, module), *self.answers[sample_id])
        return {"tokens": torch.tensor(tokens)}
