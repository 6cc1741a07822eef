"""Patience: which validation was the best so far, and whether training still improves.

A value that is no number is never the best. Of equal values the first is.

>>> best_of([3.0, 1.0, math.nan, 1.0], highest=False)
1
>>> is_patience_out([3.0, 1.0, 2.0, 1.0], highest=False, patience=2)
True
"""

import math
from collections.abc import Sequence


def best_of(values: Sequence[float], *, highest: bool) -> int | None:
    """Return the number of the best validation; None where no value is a number."""
    known = [number for number, value in enumerate(values) if not math.isnan(value)]
    return (max if highest else min)(known, key=values.__getitem__, default=None)


def is_patience_out(values: Sequence[float], *, highest: bool, patience: int) -> bool:
    """Return whether so many validations have passed since the best; with a patience of 0 it never is."""
    best = best_of(values, highest=highest)
    since = len(values) - (0 if best is None else best + 1)
    return 0 < patience <= since
