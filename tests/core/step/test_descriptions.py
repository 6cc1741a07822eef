"""Rows that come in are not rows that go out: what samples say of segments, and what is refused of it."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.models.segments import Emission
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


SEQUENCE = 64
SIZES: Mapping[str, Any] = {"layers": 1, "hidden": 8, "heads": 2}


def tower_of(options: Mapping[str, Any]) -> Topology:
    """A tower with these options that feeds a language model."""
    vision = ModuleSpec(model="vit", options=Vit(**SIZES, features=12, **options), feeds=("language",))
    language = ModuleSpec(model="gpt", options=Gpt(**SIZES, vocab=16))
    return assemble(
        JobSpec(
            modules={"vision": vision, "language": language},
            data=DataSpec(source="none"),
            batch=BatchSpec(global_size=1),
        ),
        SourceFacts(sequence=SEQUENCE),
    )


def described(*grids: SegmentGrid, **more: Any) -> Sample:
    """A sample with text and segments of these grids."""
    rows = {"vision": sum(map(math.prod, grids))}
    return Sample(**{"id": 7, "length": 3, "rows": rows, "segments": {"vision": grids}, **more})


EMITTED: dict[str, tuple[Mapping[str, Any], tuple[SegmentGrid, ...], int]] = {
    "one for each": ({}, ((5,), (1, 2, 3)), 11),
    "a class token that is dropped": ({"class_token": True}, ((1, 2, 2), (2, 2, 2)), 12),
    "and one that is emitted": ({"class_token": True, "emit_class_token": True}, ((1, 2, 2), (2, 2, 2)), 15),
    "merged": ({"merge": 2}, ((1, 4, 6), (3, 2, 2)), 9),
    "every other frame of a sound": ({"stem": "whisper"}, ((1,), (2,), (7,)), 4),
    "and of these the mean of two": ({"stem": "whisper", "pool": 2}, ((1,), (4,), (13,)), 4),
}


@pytest.mark.parametrize(("options", "grids", "rows"), EMITTED.values(), ids=EMITTED)
def test_rows_are_those_that_the_segments_emit(
    options: Mapping[str, Any], grids: tuple[SegmentGrid, ...], rows: int
) -> None:
    """A language model has a placeholder for each row that a tower emits, not for each that it reads."""
    step = step_of(tower_of(options), (described(*grids), described(id=8)))
    assert [{"vision": rows, "language": rows + 3}, {"vision": 0, "language": 3}] == list(step.rows_out)
    share = step.share("language", 0, 0)
    assert [len(places) for places in share.placeholders] == [rows, 0]


@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3) | st.tuples(st.integers(0, 50)),
    emission=st.builds(
        Emission, stride=st.integers(1, 3), merge=st.integers(1, 3), pool=st.integers(1, 3), extra=st.just(0)
    ),
)
def test_frames_are_emitted_alone(grid: SegmentGrid, emission: Emission) -> None:
    """A clip emits what its frames emit; nothing is made of nothing, and no row of more than all."""
    try:
        rows = emission.rows(grid)
    except ValueError:
        assert emission.merge > 1
        return
    assert 0 <= rows <= math.prod(grid)
    if len(grid) == 3:
        assert rows == grid[0] * emission.rows((1, *grid[1:]))


REFUSED: dict[str, tuple[Mapping[str, Any], Sample, str, str]] = {
    "rows unlike the segments": (
        {},
        described((1, 2, 2), rows={"vision": 5}),
        "has 5 rows, and segments of 4",
        "",
    ),
    "a grid of two sizes": ({}, described((2, 2)), "a segment of (2, 2), neither", ""),
    "frames without end": ({}, described((10**12, 1, 1)), "1,000,000,000,000 frames, more than 100,000", ""),
    "fewer rows than none": ({}, described((-1,)), "a segment of (-1,)", ""),
    "intervals unlike the segments": (
        {},
        described((1, 2, 2), intervals={"vision": (1.0, 2.0)}),
        "has 2 intervals for 1 segments",
        "",
    ),
    "sides that are not merged": (
        {"merge": 2},
        described((1, 2, 3)),
        "(1, 2, 3) cannot be merged 2 by 2",
        "of 2",
    ),
    "rows without a grid that are merged": (
        {"merge": 2},
        Sample(id=7, length=3, rows={"vision": 4}),
        "a grid of (4,) cannot be merged",
        "multiples of 2",
    ),
    "positions in a plane without one": (
        {"positions": "rotary_2d"},
        described((4,)),
        "no height and width",
        "",
    ),
    "an image that is too large": (
        {"positions": "learned", "position_count": 5, "class_token": True},
        described((1, 2, 3)),
        "needs 7 positions, and there are 5",
        "of 4 patches",
    ),
    "and one of another size": (
        {"positions": "learned", "position_count": 5, "class_token": True},
        described((1, 1, 3)),
        "needs 4 positions, and the table of 5",
        "of 4 patches",
    ),
    "a sound that is too long": (
        {"stem": "whisper", "position_count": 4},
        described((11,)),
        "needs 5 positions, and there are 4",
        "Cut the sound",
    ),
    "placeholders unlike the rows": (
        {"merge": 2},
        described((1, 4, 4), placeholders={"language": tuple(range(16))}),
        "has 16 placeholders for the 4 rows",
        "one placeholder for every row",
    ),
}


@pytest.mark.parametrize(("options", "sample", "message", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(
    options: Mapping[str, Any], sample: Sample, message: str, remedy: str
) -> None:
    """One problem names the sample, the numbers and the way out."""
    with pytest.raises(PlanError) as raised:
        step_of(tower_of(options), (sample,))
    (problem,) = raised.value.problems
    assert problem.where == "sample 7"
    assert message in problem.message
    assert remedy in problem.remedy


def test_the_largest_sample_of_a_source_fits_too() -> None:
    """What a source says of its samples is checked before any is described; without grids rows are one strip."""
    topology = tower_of({"merge": 2})
    facts = SourceFacts(sequence=SEQUENCE, length=4, rows={"vision": 12}, features={"vision": 12})
    assert () == problems_of(topology.spec, facts)
    (problem,) = problems_of(topology.spec, attrs.evolve(facts, segments={"vision": ((1, 3, 4),)}))
    assert problem.where == "data.source"
    assert "its largest sample has a segment for module 'vision' that it cannot read" in problem.message
    longer = attrs.evolve(facts, rows={"vision": 4 * SEQUENCE}, segments={"vision": ((1, 2, 2 * SEQUENCE),)})
    assert f"{SEQUENCE} rows and 4 text tokens" in problems_of(topology.spec, longer)[0].message
