"""A record describes a sample; segments stand where their placeholders do."""

import itertools

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.data.record import Record, expanded, placed, runs_of
from mimogrid.core.models.network import Model, Placeholder, PublishedModule


TOWER = PublishedModule(model="vit", options={"layers": 1, "hidden": 4, "heads": 1, "merge": 2})
EARS = attrs.evolve(TOWER, options={"layers": 1, "hidden": 4, "heads": 1, "stem": "whisper"})
IMAGE, VIDEO, SOUND = 90, 91, 92
MODEL = Model(
    modules={"vision": TOWER, "audio": EARS},
    placeholders={
        "image": Placeholder(module="vision", token=IMAGE),
        "video": Placeholder(module="vision", token=VIDEO),
        "audio": Placeholder(module="audio", token=SOUND),
    },
)


@given(st.sets(st.integers(0, 60)))
def test_runs_are_positions(positions: set[int]) -> None:
    """Runs are the shortest way to write positions, and are read back to them."""
    ascending = sorted(positions)
    runs = runs_of(ascending)
    assert list(expanded(runs)) == ascending
    assert all(first + count < other for (first, count), (other, _) in itertools.pairwise(runs))


def test_segments_of_all_kinds_come_in_the_order_of_the_text() -> None:
    """An image and a video of one module come as they stand in the text."""
    tokens = [1, SOUND, SOUND, 2, VIDEO, VIDEO, 3, IMAGE, IMAGE, IMAGE, 4]
    grids = {"image": [(1, 2, 2), (1, 2, 4)], "video": [(2, 2, 2)], "audio": [(3,)]}
    found = placed(tokens, MODEL, grids)
    assert found == (("audio", 0), ("video", 0), ("image", 0), ("image", 1))
    at = [i for i, token in enumerate(tokens) if token >= IMAGE]
    record = Record(
        id="a",
        length=4,
        units=1.0,
        kinds=tuple(kind for kind, _ in found),
        grids=tuple(grids[kind][number] for kind, number in found),
        runs=runs_of(at),
    )
    sample = record.described(7, MODEL, "language")
    assert sample.id == 7
    assert sample.rows == {"audio": 3, "vision": 20}
    assert sample.segments == {"audio": ((3,),), "vision": ((2, 2, 2), (1, 2, 2), (1, 2, 4))}
    assert sample.placeholders == {"language": tuple(at)}
    assert sample.units == {"language": 1.0}


def test_a_text_alone_lacks_every_modality() -> None:
    """There is no entry for what a sample lacks."""
    sample = Record(id="a", length=4, units=2.0).described(0, MODEL, "language")
    assert (sample.rows, sample.placeholders, sample.segments) == ({}, {}, {})


@pytest.mark.parametrize(
    ("tokens", "grids"),
    [
        ([IMAGE], {}),
        ([IMAGE, IMAGE], {"image": [(1, 2, 2)]}),
        ([IMAGE], {"image": [(1, 2, 4)]}),
        ([1], {"image": [(1, 2, 2)]}),
        ([IMAGE], {"image": [(1, 2, 2)], "video": [(1, 2, 2)]}),
    ],
)
def test_placeholders_that_do_not_match_the_segments_are_refused(
    tokens: list[int], grids: dict[str, list[tuple[int, ...]]]
) -> None:
    """Every placeholder has a row, and every row a placeholder."""
    with pytest.raises(ValueError, match="placeholder"):
        placed(tokens, MODEL, grids)
