"""Cutting by tokens: the cells of a step whose microbatches have a limit of tokens in place of a number.

Samples stay in their order. They go into a cell as long as they fit, and then into the next one. That gives the number
of microbatches, and more are not needed. Then the same samples are cut anew into as many cells, by the smallest limit
that gives no more of them: so the largest cell is as small as it can be.

>>> cut_by_tokens([4, 1, 1, 2, 3, 1], limit=6, lanes=1)
(0, 3, 6)
>>> cut_by_tokens([4, 1, 1, 2, 3, 1], limit=4, lanes=1)
(0, 1, 4, 6)
"""

import bisect
from collections.abc import Sequence

from mimogrid.core.base.samples import prefix_sums
from mimogrid.core.job.tokens import rounded_up


def cut_by_tokens(tokens: Sequence[int], *, limit: int, lanes: int, multiple: int = 1) -> tuple[int, ...]:
    """Return where each cell begins, and where the last one ends; the last cells may be empty.

    `tokens` are those of the samples, none above the limit. The cells are the lanes of whole microbatches, whose number
    is a multiple of `multiple`.
    """
    ends = prefix_sums(tokens)
    count = lanes * rounded_up(-(-len(_begins(ends, limit)) // lanes), multiple)
    low, high = max(-(-ends[-1] // count), *tokens), limit
    while low < high:
        middle = (low + high) // 2
        if len(_begins(ends, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    begins = _begins(ends, low)
    return (*begins, *[len(tokens)] * (count + 1 - len(begins)))


def _begins(ends: Sequence[int], limit: int) -> list[int]:
    """Return where each cell begins if cells are filled one after the other; `ends` are the sums of tokens."""
    begins, last = [0], len(ends) - 1
    while (stop := bisect.bisect_right(ends, ends[begins[-1]] + limit) - 1) < last:
        begins.append(stop)
    return begins
