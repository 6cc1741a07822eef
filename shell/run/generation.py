"""Generation: a language model answers prompts token by token, by forward-only programs of the job's own layout.

The first pass computes the prompts, and the layers keep their keys and values (`shell.megatron.cache`). Every further
pass has one token of each sample: the one that was chosen before. Tokens are those that computing all of a sample anew
in each pass would give, up to rounding. A network that keeps nothing does that: one of a host program, or layers of
transformer-engine.

All ranks get all new tokens, so all know when every answer has ended. A draw hangs on the seed, the sample and the
place in the answer, so it is the same on every layout.
"""

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch

from mimogrid.core.base.hashing import draw_uniform
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import GenerateSpec
from mimogrid.core.step.step import step_of
from mimogrid.shell.runtime.data import Loads
from mimogrid.shell.runtime.forward_only import caching, predict
from mimogrid.shell.runtime.rank import RankRuntime


Tokens = tuple[int, ...]


@attrs.frozen
class Prompt:
    """What stands before an answer.

    Attributes:
        sample: its description.
        tokens: of the language model's sequence, -1 at placeholders.
        stops: the tokens that end an answer.
    """

    sample: Sample
    tokens: Tokens
    stops: frozenset[int]


@attrs.frozen
class Prompted:
    """A source of prompts, each followed by its answer so far, or only of the last token of each answer.

    `source` has what all modules but the language models `texts` read.
    """

    source: Loads
    texts: tuple[str, ...]
    prompts: Mapping[int, Prompt]
    answers: Mapping[int, Tokens]
    last_only: bool = False

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a prompt with its answer so far, or of its last token."""
        if self.last_only:
            return Sample(sample_id, 1, {})
        prompt = self.prompts[sample_id].sample
        return attrs.evolve(prompt, length=prompt.length + len(self.answers[sample_id]))

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return the tokens of a sample so far, or the last; or what another module reads of it."""
        if module not in self.texts:
            return self.source.load(sample_id, module)
        answer = self.answers[sample_id]
        whole = answer[-1:] if self.last_only else (*self.prompts[sample_id].tokens, *answer)
        return {"tokens": torch.tensor(whole)}


def answers_to(
    runtime: RankRuntime,
    prompts: Sequence[Prompt],
    source: Loads,
    how: GenerateSpec,
    tell: Callable[[], None] = lambda: None,
) -> dict[int, Tokens]:
    """Return an answer to each of a step's prompts by its id, with the token that ended it; the same on every rank.

    `tell` is called before each pass. Raises PlanError for a prompt that does not fit the job.
    """
    by_id = {prompt.sample.id: prompt for prompt in prompts}
    answers: dict[int, Tokens] = dict.fromkeys(by_id, ())

    def choose(samples: Sequence[Sample], logits_BV: torch.Tensor) -> torch.Tensor:
        if not how.temperature:
            return logits_BV.argmax(dim=-1)
        seed = runtime.job.spec.seed
        draws = [draw_uniform(seed, sample.id, f"generate/{len(answers[sample.id])}") for sample in samples]
        return drawn(logits_BV, torch.tensor(draws, dtype=torch.float64, device=logits_BV.device), how)

    with caching(runtime) as caches:
        again = None  # Steps of one token each are all alike.
        for place in range(how.tokens):
            tell()
            behind = place > 0 and caches is not None
            rows = Prompted(source, runtime.topology.graph.texts, by_id, answers, last_only=behind)
            step = again if behind else None
            if step is None:
                step = step_of(runtime.topology, tuple(map(rows.describe, by_id)))
            if behind:
                again = step
            tokens = predict(runtime, step, rows, choose=choose, caches=caches)
            answers = {i: (*answers[i], token) for i, token in zip(by_id, tokens, strict=True)}
            if all(not by_id[i].stops.isdisjoint(answer) for i, answer in answers.items()):
                break
    return {i: up_to(answer, by_id[i].stops) for i, answer in answers.items()}


def up_to(answer: Tokens, stops: frozenset[int]) -> Tokens:
    """Return an answer up to the first token that ends it, and with it.

    >>> up_to((5, 2, 7), frozenset({2})), up_to((5, 7), frozenset({2}))
    ((5, 2), (5, 7))
    """
    return next((answer[: i + 1] for i, token in enumerate(answer) if token in stops), answer)


def drawn(logits_BV: torch.Tensor, draws_B: torch.Tensor, how: GenerateSpec) -> torch.Tensor:
    """Return for each sample the token that a uniform draw falls on, among the likeliest.

    Of the softmax of logits / temperature, `top_k` tokens are left, and of these the fewest that have `top_p` together.

    >>> logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(3, -1)
    >>> how = GenerateSpec(tokens=1, temperature=1.0, top_k=3, top_p=0.9)
    >>> drawn(logits, torch.tensor([0.0, 0.7, 0.99], dtype=torch.float64), how)
    tensor([1, 1, 3])
    """
    scores, order = (logits_BV.double() / how.temperature).sort(dim=-1, descending=True, stable=True)
    if how.top_k:
        scores, order = scores[:, : how.top_k], order[:, : how.top_k]
    shares = scores.softmax(dim=-1)
    before = shares.cumsum(dim=-1) - shares
    shares = shares.where(before < how.top_p, 0.0)
    ends = shares.cumsum(dim=-1)
    place = torch.searchsorted(ends, (draws_B * ends[:, -1])[:, None], right=True)
    place = place.clamp(max=(shares > 0).sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, place).squeeze(1)
