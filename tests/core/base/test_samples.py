"""Samples and steps: who has which samples, and so which rows."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import job, step_with
from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample, dp_ranks_over, dp_samples, prefix_sums, share
from mimogrid.core.step.step import step_of


@given(st.integers(1, 9), st.integers(0, 50))
def test_shares_partition(parts: int, total: int) -> None:
    """Shares lie end to end, hold everything once, and differ by one at most."""
    shares = [share(i, parts, total) for i in range(parts)]
    assert list(range(total)) == [i for part in shares for i in part]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_uneven_shares() -> None:
    """Three dp ranks share eight samples as 2, 3 and 3."""
    assert [2, 3, 3] == [len(share(i, 3, 8)) for i in range(3)]


COUNTS = {"dp_size": st.integers(1, 5), "microbatches": st.integers(1, 6), "each": st.integers(0, 7)}


@given(**COUNTS)
def test_dp_ranks_and_microbatches_partition(dp_size: int, microbatches: int, each: int) -> None:
    """Microbatch by microbatch and in each dp rank by dp rank, the samples of a step come once and in order."""
    total = each * microbatches
    assert list(range(total)) == [
        i
        for k in range(microbatches)
        for dp_rank in range(dp_size)
        for i in dp_samples(
            dp_rank=dp_rank, dp_size=dp_size, microbatch=k, microbatches=microbatches, total=total
        )
    ]


@given(**COUNTS, data=st.data())
def test_dp_ranks_over_is_the_inverse(
    dp_size: int, microbatches: int, each: int, data: st.DataObject
) -> None:
    """The dp ranks over a range of samples are exactly those with one of them, and empty dp ranks in between."""
    total = each * microbatches
    start = data.draw(st.integers(0, total))
    wanted = range(start, data.draw(st.integers(start, total)))
    k = data.draw(st.integers(0, microbatches - 1))
    counts = {"dp_size": dp_size, "microbatch": k, "microbatches": microbatches, "total": total}
    having = [i for i in range(dp_size) if set(dp_samples(dp_rank=i, **counts)) & set(wanted)]
    found = list(dp_ranks_over(wanted, **counts))
    assert having == [i for i in found if dp_samples(dp_rank=i, **counts)]
    assert found == list(range(having[0], having[-1] + 1)) if having else not found


@given(st.lists(st.integers(0, 5), min_size=24, max_size=24))
def test_rows_of_dp_ranks_partition(rows: list[int]) -> None:
    """The row intervals of all microbatches and dp ranks lie end to end from the first row to the last."""
    topology = job("vision vit dp3 m8 > language; language gpt dp2", batch=24)
    step = step_with(topology, {"vision": rows})
    for name, module in topology.modules.items():
        intervals = [
            step.rows_of("vision", module.samples(dp_rank, k, 24))
            for k in range(module.microbatches)
            for dp_rank in range(module.dp_size)
        ]
        assert 0 == intervals[0][0], name
        assert sum(rows) == intervals[-1][1], name
        assert all(a[1] == b[0] for a, b in itertools.pairwise(intervals)), name


@given(st.lists(st.integers(0, 5), max_size=9))
def test_prefix_sums(counts: list[int]) -> None:
    """Prefix sums begin at 0 and rise by the counts."""
    sums = prefix_sums(counts)
    assert counts == [b - a for a, b in itertools.pairwise(sums)]
    assert 0 == sums[0]


def test_a_share_of_a_language_model() -> None:
    """A dp rank of a language model sees rows by feeder in file order, and placeholders in front of the text."""
    topology = job("a vit > l; b vit > l; l gpt dp2", batch=8)
    share_ = step_with(topology, {"a": (2, 0), "b": (1, 3)}, text=4).share("l", dp_rank=1, microbatch=0)
    assert (1,) == tuple(sample.id for sample in share_.samples)
    assert {"a": (0,), "b": (3,)} == share_.rows
    assert (7,) == share_.lengths
    assert ((0, 1, 2),) == share_.placeholders


def test_a_dp_rank_without_rows_is_idle() -> None:
    """A dp rank whose samples all lack the modality takes no part in that microbatch, and its share says so."""
    topology = job("vision vit dp2 > language; language gpt", batch=8)
    step = step_with(topology, {"vision": (0, 2, 0, 0, 1, 1, 1, 1)})
    assert frozenset({2, 3}) == step.active("vision", 0)
    assert frozenset({0, 2, 3}) == step.active("vision", 1)
    assert step.share("vision", dp_rank=0, microbatch=0).is_empty
    assert frozenset(range(4)) == step.active("language", 0)


def test_experts_keep_an_idle_dp_rank_busy() -> None:
    """Where experts are spread over two dp ranks, a dp rank without rows runs along while the other has some."""
    topology = job("vision vit dp2 ep2 x2 > language; language gpt", batch=8)
    step = step_with(topology, {"vision": (0, 2, 0, 0, 1, 1, 1, 1)})
    assert frozenset({0, 2, 3}) == step.active("vision", 0) == step.active("vision", 1)


def test_units_are_counted_over_the_step() -> None:
    """A language model counts its text, a regressor its rows times outputs, unless a sample says otherwise."""
    topology = job("v vit > l, r; l gpt; r regressor width6", batch=4)
    samples = tuple(Sample(id=i, length=3, rows={"v": i}) for i in range(3))
    samples += (Sample(id=3, length=3, rows={"v": 1}, units={"l": 0.5, "r": 0.0}),)
    assert {"l": 9.5, "r": 6.0 * (0 + 1 + 2)} == step_of(topology, samples).units


def test_a_sample_that_does_not_fit_is_named() -> None:
    """Placeholders that are not one per row are an error that names the sample and both counts."""
    topology = job("v vit > l; l gpt", batch=4)
    wrong = Sample(id=7, length=2, rows={"v": 3}, placeholders={"l": (0, 1)})
    with pytest.raises(PlanError, match="sample 7: has 2 placeholders for the 3 rows"):
        step_of(topology, (wrong,))
