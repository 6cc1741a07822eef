"""The rows of a tower: every position of its layers is a row or a class token, and counts are those of the model."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.job.models import Vit
from mimogrid.core.models.positions import windows
from mimogrid.core.models.tower import TowerRows, tower_rows


SIDES = st.integers(1, 4).map(lambda half: 2 * half)
GRIDS = st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), max_size=4)
SIZES = {"layers": 1, "hidden": 8, "heads": 2}


def rows_of(model: Vit, grids: list[tuple[int, ...]]) -> TowerRows:
    """The rows of a model without a stride."""
    return tower_rows(
        grids,
        merge=model.merge,
        pool=model.pool,
        window=model.window,
        class_token=model.class_token,
        emit_class_token=model.emit_class_token,
    )


@given(GRIDS, st.sampled_from(["plain", "emits", "drops", "merges", "windows"]))
def test_counts_are_those_of_the_model(grids: list[tuple[int, int, int]], kind: str) -> None:
    """Positions are those that attend, and emitted rows are those that the plan counts."""
    options = {
        "plain": {},
        "emits": {"class_token": True, "emit_class_token": True},
        "drops": {"class_token": True},
        "merges": {"merge": 2},
        "windows": {"merge": 2, "window": 2},
    }[kind]
    model = Vit(**SIZES, **options)
    found = rows_of(model, grids)
    assert found.length == sum(itertools.chain.from_iterable(map(model.spans, grids)))
    assert len(found.emitted) == found.group * sum(map(model.emission.rows, grids))
    assert sorted((*found.rows, *found.class_tokens)) == list(range(found.length))
    assert set(found.emitted) <= {*found.rows, *found.class_tokens}


@given(st.lists(st.integers(0, 9), max_size=5))
def test_what_is_averaged_stays_within_a_segment(lengths: list[int]) -> None:
    """A last position alone is dropped."""
    found = tower_rows([(length,) for length in lengths], pool=2)
    starts = itertools.accumulate(lengths, initial=0)
    pairs = [
        start + place
        for start, length in zip(starts, lengths, strict=False)
        for place in range(length // 2 * 2)
    ]
    assert list(found.emitted) == pairs


@given(GRIDS)
def test_positions_of_a_window_lie_side_by_side(grids: list[tuple[int, int, int]]) -> None:
    """The blocks of patches are in the order of the windows, and their rows come back in their own."""
    found = tower_rows(grids, merge=2, window=2)
    order = windows(grids, 2, 2).order
    patch_at = sorted(range(found.length), key=found.rows.__getitem__)
    assert [patch // 4 for patch in patch_at[::4]] == list(order)
    assert found.emitted == found.rows
