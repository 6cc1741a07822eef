"""Every order of the box, for up to 16 stages and 64 microbatches, is proved sound; and which need two queues."""

import pytest

from jobs import legal, program_for, program_of
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.program.verify import in_flight, verify


THERE = tuple(name for name in SCHEDULES if legal("l gpt", schedule=name))
CHUNKS = {4: "pp2 chunks2", 8: "pp4 chunks2", 16: "pp4 chunks4"}


@pytest.mark.parametrize("microbatches", [1, 3, 16, 64])
@pytest.mark.parametrize("stages", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("schedule", THERE)
def test_a_pipeline_of_any_length_is_sound(schedule: str, stages: int, microbatches: int) -> None:
    """Training and evaluating; interleaved with chunks where microbatches come in whole groups."""
    interleaves = schedule == "interleaved" and stages in CHUNKS and microbatches % 4 == 0
    text = f"l gpt {CHUNKS[stages]}" if interleaves else f"l gpt pp{stages}"
    program = program_of(text, batch=microbatches, microbatches=microbatches, schedule=schedule)
    assert () == verify(program) == verify(program_for(program.routes.step, training=False))
    for stage, most in in_flight(program).items():
        assert 0 < most <= min(program.order.max_in_flight[stage], microbatches)


@pytest.mark.parametrize("schedule", THERE)
def test_which_orders_need_a_channel_for_each_direction(schedule: str) -> None:
    """All that send gradients back to where rows come from: receives are posted ahead of the sends they answer."""
    for stages in (1, 2, 4):
        program = program_of(f"l gpt pp{stages}", schedule=schedule)
        assert (stages == 1) == (not verify(program, strict=True))
        assert () == verify(program_for(program.routes.step, training=False), strict=True)
