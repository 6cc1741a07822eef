"""Soundness: every program that is planned passes `verify`; the only sweep over layouts, schedules and rows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES, worlds
from jobs import legal, program_for, program_of
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.program.verify import in_flight, verify, verify_each
from scale import drawn, nightly_only


THERE = tuple(name for name in SCHEDULES if legal("l gpt", schedule=name))
NAMED = tuple(name for name in THERE if name not in {"interleaved", "auto"})
ROWS = {"vision": (4, 3, 0, 0, 1), "image": (0, 2, 1), "audio": (1, 0, 0, 3), "a": (2, 0), "b": (0, 0, 5)}


# -- layouts and rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", NAMED)
def test_every_case_is_sound(case: str, schedule: str) -> None:
    """Every known layout makes a sound program, also those that hang or fail in other systems."""
    for rows in (ROWS, *nightly_only([{}])):
        assert () == verify(program_of(CASES[case], rows, batch=48, microbatches=4, schedule=schedule))


@pytest.mark.parametrize("counts", [(4, 3, 4, 3), (2, 0, 2, 0), (0, 0, 0, 0), (0, 1, 1, 1)])
@pytest.mark.parametrize("case", ["dp2 1", "dp4 1", "1 dp2", "dp3 dp2", "colocated tp2dp4 tp4dp2"])
def test_ragged_and_absent_rows(case: str, counts: tuple[int, ...]) -> None:
    """Fan-in and fan-out are sound with ragged rows, with images on half the samples, and without any."""
    assert () == verify(program_of(CASES[case], {"vision": counts}, batch=48))


def test_counts_that_do_not_divide() -> None:
    """Three microbatches against two: a dp rank's part of a message may be made before the parts of other dp ranks.

    Here dp rank 1 makes its part of a's first microbatch before it makes b's second microbatch. The receiver waits for
    dp rank 0, and posts the two the other way round.
    """
    for feeds in ("a, b", "b, a"):
        text = f"vision vit dp2 m3 @0 > {feeds}; a regressor m2 @2; b regressor m3 @2"
        assert () == verify(program_of(text, batch=12, microbatches=6))


@settings(max_examples=drawn(25))
@given(
    worlds(),
    st.sampled_from((*NAMED, "auto")),
    st.lists(st.sampled_from((0, 1, 4)), min_size=1, max_size=24),
    st.booleans(),
)
def test_any_world_is_sound(text: str, schedule: str, rows: list[int], training: bool) -> None:
    """Any graph on any grids, with any microbatches and rows; `verify` agrees with `verify_each`."""
    step = program_of(text, {"a": rows, "b": rows[::-1]}, batch=24, schedule=schedule).routes.step
    program = program_for(step, training=training)
    assert () == verify(program) == verify_each(program)


# -- pipelines of any length -------------------------------------------------------------------------------

CHUNKS = {4: "pp2 chunks2", 8: "pp4 chunks2", 16: "pp4 chunks4"}
LENGTHS = [
    *((schedule, stages, count) for schedule in THERE for stages in (1, 2, 4, 16) for count in (1, 3, 16)),
    *(
        nightly_only([(schedule, stages, 64) for schedule in THERE for stages in (1, 8, 16)])
        or [("1f1b", 16, 64)]
    ),
]


@pytest.mark.parametrize(("schedule", "stages", "microbatches"), LENGTHS)
def test_a_pipeline_of_any_length_is_sound(schedule: str, stages: int, microbatches: int) -> None:
    """Training and evaluating; interleaved with chunks if microbatches come in complete groups."""
    interleaves = schedule == "interleaved" and stages in CHUNKS and microbatches % 4 == 0
    text = f"l gpt {CHUNKS[stages]}" if interleaves else f"l gpt pp{stages}"
    program = program_of(text, batch=microbatches, microbatches=microbatches, schedule=schedule)
    assert () == verify(program) == verify(program_for(program.routes.step, training=False))
    for stage, most in in_flight(program).items():
        assert 0 < most <= min(program.order.max_in_flight[stage], microbatches)


CHUNKED = [
    (pipeline, chunks, encoder, generator, schedule)
    for pipeline in (2, 4)
    for chunks in (2, 3)
    for encoder in ("", "v vit pp1 > l; ", "v vit pp3 > l; ", "v vit pp2 chunks2 > l; ")
    for generator in ("", " > g; g regressor pp1", " > g; g regressor pp4")
    for schedule in ("interleaved", "gpipe")
]


@pytest.mark.parametrize(
    ("pipeline", "chunks", "encoder", "generator", "schedule"), nightly_only(CHUNKED) or CHUNKED[::7]
)
def test_any_graph_with_chunks_is_sound(
    pipeline: int, chunks: int, encoder: str, generator: str, schedule: str
) -> None:
    """Encoders before an interleaved module and generators behind it neither starve it nor deadlock."""
    text, count = f"{encoder}l gpt pp{pipeline} chunks{chunks}{generator}", 3 * pipeline
    assert () == verify(program_of(text, microbatches=count, batch=count, schedule=schedule))


# -- one queue for each pair of ranks ----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", THERE)
def test_which_orders_need_a_channel_for_each_direction(schedule: str) -> None:
    """All that send gradients back: receives are posted ahead of the sends that they answer."""
    for stages in (1, 2, 4):
        program = program_of(f"l gpt pp{stages}", schedule=schedule)
        assert (stages == 1) == (not verify(program, strict=True))
        assert () == verify(program_for(program.routes.step, training=False), strict=True)
