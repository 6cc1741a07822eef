"""Token limits: how many microbatches a layout has if the job limits the tokens of each (`job.tokens`).

The limit is kept in every layout, so the number of microbatches is not chosen: it follows from the dp size of the
language model. A step fills so many microbatches of a single dp rank, its *bins*. With d dp ranks each microbatch takes
d of these, so a step has bins / d microbatches, rounded up. More dp ranks of an encoder cut the part of a dp rank of
the language model into lanes. A lane must have room for the longest sample, so there may only be a few. Samples fill
lanes a little worse than whole bins, and worse still if they are assigned by cost. The number is therefore a lower
bound, which the search walks by; a layout that is timed has the number that its samples give (`evaluation`).
"""

import bisect
import functools
import math
from collections.abc import Collection, Sequence

import attrs

from mimogrid.core.job.models import Gpt
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.tokens import microbatch_multiple, rounded_up
from mimogrid.core.step.step import Step
from mimogrid.core.step.tokens import cut_by_tokens


STEP = 1.1
"""Numbers of dp ranks of a module without text that are tried differ by this factor, or divide those of the text."""


@attrs.frozen
class TokenLimit:
    """The limit of tokens of a job, as its layouts feel it.

    Attributes:
        bins: microbatches of a step on a single dp rank of a language model.
        lanes: the most lanes that a dp rank of a language model may have.
        samples: samples of a step; no module has more dp ranks.
    """

    bins: int
    lanes: int
    samples: int

    def microbatches(self, dp: int, multiple: int = 1) -> int:
        """Return the number of microbatches of a step with so many dp ranks of a language model.

        >>> TokenLimit(bins=10, lanes=1, samples=64).microbatches(4), TokenLimit(10, 1, 64).microbatches(4, multiple=2)
        (3, 4)
        """
        return rounded_up(-(-self.bins // dp), multiple)

    def microbatches_of(self, spec: JobSpec) -> int:
        """Return the number of microbatches of a layout."""
        texts = [module.grid.dp for module in spec.modules.values() if isinstance(module.options, Gpt)]
        return self.microbatches(min(texts), microbatch_multiple(spec))

    def text_dp_sizes(
        self, count: int, *, multiple: int, of: int, most: int, beside: Sequence[int] = ()
    ) -> Sequence[int]:
        """Return dp sizes of a language model with which a step has so many microbatches, ascending.

        The number of microbatches is rounded up to a multiple of `multiple`. The dp sizes are multiples of `of`: the
        least, the largest, and some between. More dp ranks have less to do in each of as many microbatches. Of those
        that have room for the lanes that dp sizes `beside` them make, the least and the largest are there, too.

        >>> TokenLimit(bins=64, lanes=1, samples=320).text_dp_sizes(2, multiple=1, of=1, most=60, beside=[20])
        (32, 36, 40, 44, 49, 54, 60)
        """
        if count % multiple:
            return ()
        first, fewer = -(-self.bins // count), count - multiple
        last = min(most, self.samples, -(-self.bins // fewer) - 1 if fewer else most)
        return _text_dp_sizes(first, last, of, math.lcm(*beside), self.lanes)

    def other_dp_sizes(self, count: int, *, most: int, text: int | None = None) -> Sequence[int]:
        """Return dp sizes of another module beside a language model with so many microbatches, ascending.

        `text` is the dp size of that, if it is known; else the least.
        """
        sizes = _beside(text or -(-self.bins // count), self.lanes)
        return sizes[: bisect.bisect_right(sizes, min(most, self.samples))]

    def allows(self, texts: Collection[int], others: Collection[int]) -> bool:
        """Whether the longest sample fits into a lane, by the dp sizes of language models and of other modules."""
        return not texts or lanes_beside(texts, others) <= self.lanes


def lanes_beside(texts: Collection[int], others: Collection[int]) -> int:
    """Return the most lanes that a dp rank of a language model has, by the dp sizes of these and of other modules.

    >>> lanes_beside([4], [6])
    3
    """
    return math.lcm(*texts, *others) // min(texts)


@functools.lru_cache(maxsize=1 << 16)
def _text_dp_sizes(first: int, last: int, of: int, beside: int, lanes: int) -> tuple[int, ...]:
    """Return some of the multiples of `of` from a first number to a last one, with those that go with a dp size.

    >>> _text_dp_sizes(8, 15, 1, 1, 1), _text_dp_sizes(8, 15, 4, 1, 1), _text_dp_sizes(10, 19, 1, 14, 1)
    ((8, 9, 10, 11, 13, 15), (8, 12), (10, 11, 13, 14, 15, 17, 19))
    """
    found: list[int] = []
    for dp in range(rounded_up(first, of), last + 1, of):
        if not found or dp >= STEP * found[-1] or dp + of > last:
            found.append(dp)
    parts = (beside // each for each in range(1, min(lanes, beside) + 1) if beside % each == 0)
    steps = (math.lcm(part, of) for part in parts)
    ends = {end for step in steps for end in (rounded_up(first, step), last - last % step)}
    return tuple(sorted({*found, *(end for end in ends if first <= end <= last)}))


@functools.lru_cache(maxsize=1 << 12)
def _beside(text: int, lanes: int) -> tuple[int, ...]:
    """Return dp sizes that cut each of so many dp ranks into at most so many lanes.

    >>> _beside(4, 1), _beside(6, 2)
    ((1, 2, 4), (1, 2, 3, 4, 6, 12))
    """
    found: list[int] = []
    for dp in range(1, text * lanes + 1):
        fits = dp // math.gcd(dp, text) <= lanes
        if fits and (not found or dp >= STEP * found[-1] or text % dp == 0 or dp % text == 0):
            found.append(dp)
    return tuple(found)


def token_limit_of(step: Step) -> TokenLimit | None:
    """Return the limit of tokens of a job by one of its steps; None if its microbatches are counted."""
    topology, limit = step.topology, step.topology.spec.batch.tokens_per_microbatch
    if not limit:
        return None
    bins = len(cut_by_tokens(step.sample_tokens, limit=limit, lanes=1)) - 1
    return TokenLimit(bins=bins, lanes=limit // (topology.sequence or 1), samples=len(step.samples))
