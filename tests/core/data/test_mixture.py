"""A mixture gives every source its share of every stretch, and every sample of a source once, in order."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.data.mixture import Mixture


WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


@given(WEIGHTS, st.integers(0, 3))
def test_every_prefix_has_the_proportions(weights: list[int], turns: int) -> None:
    """No source is a whole sample away from its share, and its samples come in order, each once."""
    mixture, total = Mixture.of(weights), sum(weights)
    counts = Counter[int]()
    for place in range(turns * total, turns * total + 2 * total):
        source, before = mixture.at(place)
        shares = [Fraction(weight, total) for weight in weights]
        assert before == counts[source] + turns * weights[source]
        counts[source] += 1
        done = place + 1 - turns * total
        assert all(abs(counts[s] - done * share) < 1 for s, share in enumerate(shares))
    assert all(counts[s] == 2 * weight for s, weight in enumerate(weights))


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (7, 2, 1), (70.0, 20.0, 10.0)])
def test_only_the_proportions_of_weights_count(weights: tuple[float, ...]) -> None:
    """Weights may be fractions, counts or percentages."""
    assert Mixture.of(weights) == Mixture.of((7, 2, 1))


@pytest.mark.parametrize(
    ("weights", "why"),
    [((1, 0), "more than 0"), ((float("nan"), 1), "more than 0"), ((1, 0.123456789), "repeat only after")],
)
def test_weights_that_make_no_mixture_are_refused(weights: tuple[float, ...], why: str) -> None:
    """They are refused with the reason."""
    with pytest.raises(ValueError, match=why):
        Mixture.of(weights)
