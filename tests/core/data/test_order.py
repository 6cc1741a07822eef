"""The order of samples is a permutation in every epoch, another one in each, and needs no list."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.data.order import Order, permuted


@given(st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_is_every_sample_once(count: int, seed: int, epoch: int) -> None:
    """Each epoch is a permutation."""
    order = Order(seed=seed, count=count)
    assert sorted(map(order.at, range(epoch * count, (epoch + 1) * count))) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """The order depends on the seed and the epoch, and on nothing else."""
    orders = [tuple(map(Order(seed=seed, count=50).at, range(100))) for seed in (0, 1)]
    epochs = {order[:50] for order in orders} | {order[50:] for order in orders}
    assert len(epochs) == 4
    assert tuple(map(Order(seed=0, count=50).at, range(100))) == orders[0]


def test_a_place_far_away_is_as_near_as_the_first() -> None:
    """A place is computed without those before it."""
    assert Order(seed=3, count=10**12).at(10**15) in range(10**12)


def test_without_shuffling_samples_stay_in_the_order_of_the_store() -> None:
    """A store may be in order already."""
    assert list(map(Order(seed=0, count=3, shuffle=False).at, range(7))) == [0, 1, 2, 0, 1, 2, 0]


def test_every_permutation_of_few_is_about_equally_likely() -> None:
    """24 permutations of 4, 4,800 keys: 200 of each are expected, with a standard deviation of 14."""
    seen = Counter(tuple(permuted(n, 4, f"key {key}") for n in range(4)) for key in range(4800))
    assert len(seen) == 24
    assert max(abs(count - 200) for count in seen.values()) < 5 * 14
