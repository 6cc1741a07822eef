"""Patience: the best validation is the first of equals, and training ends so many validations after it."""

import math

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.update.patience import best_of, is_patience_out


VALUES = st.lists(st.floats(), max_size=12)


@given(VALUES, st.booleans())
def test_the_best_is_the_first_that_none_is_better_than(values: list[float], highest: bool) -> None:
    """What is no number is not the best."""
    best = best_of(values, highest=highest)
    numbers = [value for value in values if not math.isnan(value)]
    if best is None:
        assert not numbers
    else:
        assert values[best] == (max if highest else min)(numbers)
        assert best == values.index(values[best])


@given(VALUES, st.booleans(), st.integers(1, 5))
def test_patience_counts_from_the_best(values: list[float], highest: bool, patience: int) -> None:
    """Or from the start, where nothing was a number; without a patience it lasts."""
    best = best_of(values, highest=highest)
    since = values if best is None else values[best + 1 :]
    assert is_patience_out(values, highest=highest, patience=patience) == (len(since) >= patience)
    assert not is_patience_out(values, highest=highest, patience=0)
