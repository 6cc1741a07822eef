"""Lockstep: rank classes of like ranks take as long as all ranks by themselves, where they have like peers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import job, program_for, step_with
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.simulate.lockstep import lockstep, lower_bound_s
from timed import rank_by_rank


APART = (
    "v vit dp2 > l; l gpt pp2 dp2",
    "v vit tp2 dp4 > l; l gpt pp3 dp2",
    "v vit dp4 m16 > l; l gpt pp2 dp2 chunks2",
    "v vit dp4 frozen > l; l gpt tp2 pp2 dp2",
    "v vit tp2 m2 frozen > l; a vit dp4 > l; l gpt tp2 pp2 dp2",
    "v vit dp2 > l; l gpt pp2 dp2 > g; g regressor dp4",
)
SHARED = (
    "v vit dp8 @0 > l; l gpt pp4 dp2 @0",
    "v vit dp2 @0 > l; l gpt pp4 dp2 @0",
    "v vit cp2 dp4 @0 > l; l gpt tp2 pp4 @0",
    "v vit dp2 m2 @0 frozen > l; l gpt pp2 dp4 @0",
    "v vit dp8 m2 @0 > l; a vit dp2 @8 > l; l gpt pp4 dp2 @0",
)
seconds = st.sampled_from([0.0, 0.5, 1.0, 2.5])


def priced(data: st.DataObject, text: str, schedule: str, *, edge: EdgeCosts) -> tuple[Program, Costs]:
    """A program of a step with like samples, and costs for it."""
    topology = job(text, schedule=schedule, microbatches=8, batch=64, sharded=data.draw(st.booleans()))
    drawn = {
        str(stage): StageCosts(
            forward=data.draw(seconds),
            input_gradient=data.draw(seconds),
            weight_gradient=data.draw(seconds),
            reduce=data.draw(seconds),
            gather=data.draw(seconds),
            update=data.draw(seconds),
        )
        for stage in topology.stages
    }
    return program_for(step_with(topology)), Costs(stages=drawn, edge=edge)


ORDERS = st.sampled_from(["1f1b", "gpipe", "zb-h1", "zb-h2"])


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(APART), ORDERS)
def test_the_same_time_apart(data: st.DataObject, text: str, schedule: str) -> None:
    """Where modules share no ranks and messages take no time, a rank class takes as long as its ranks do alone."""
    program, costs = priced(data, text, schedule, edge=EdgeCosts())
    expected, found = rank_by_rank(program, costs), lockstep(program, costs)
    assert expected.step_s == pytest.approx(found.step_s)
    for ranks, busy_s in zip(found.rank_classes, found.busy_s, strict=True):
        assert [pytest.approx(busy_s)] * len(ranks) == [expected.busy_s[rank] for rank in ranks]


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from((*APART, *SHARED)), ORDERS)
def test_never_faster(data: st.DataObject, text: str, schedule: str) -> None:
    """A rank class waits for all that its ranks wait for, and no step is faster than its lower bound."""
    speed = data.draw(st.sampled_from([float("inf"), 1e9, 1e8]))
    edge = EdgeCosts(latency=data.draw(st.sampled_from([0.0, 0.1])), bytes_per_s=speed)
    program, costs = priced(data, text, schedule, edge=edge)
    expected, found = rank_by_rank(program, costs), lockstep(program, costs)
    assert expected.step_s <= found.step_s * (1 + 1e-9)
    assert lower_bound_s(program, costs, found) <= expected.step_s * (1 + 1e-9)
