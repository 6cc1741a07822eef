"""Collapsed programs: one rank for all of a dp rank, in exactly the same time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scale
from jobs import job, program_for, step_with
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.simulate.collapse import collapse_tp_cp
from mimogrid.core.simulate.simulation import simulate
from timed import rank_by_rank


JOBS = (
    "v vit tp2 dp4 > l; l gpt tp4 width8 heads4 dp2 pp2",
    "v vit dp3 > l; l gpt tp2 dp2 pp3",
    "v vit tp2 pp2 > l; a vit dp4 frozen > l; l gpt tp2 cp2 pp2",
    "v vit tp2 dp2 m8 > l; l gpt tp2 pp2 chunks2",
    "v vit dp2 > l; l gpt tp2 dp3 > g; g regressor tp2 dp2",
)
seconds = st.sampled_from([0.0, 0.5, 1.0, 2.5])


def whole(text: str, schedule: str, rows: list[int]) -> Program:
    """The program of a step with ragged rows."""
    words = text.replace("width8 heads4 ", "")
    topology = job(words, schedule=schedule, microbatches=4, batch=48)
    return program_for(step_with(topology, dict.fromkeys(topology.graph.sources, rows)))


@settings(max_examples=scale.drawn(10))
@given(
    st.data(),
    st.sampled_from(JOBS),
    st.sampled_from(["1f1b", "gpipe", "zb-h1"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.sampled_from([0.0, 0.3]),
)
def test_the_same_time(
    data: st.DataObject, text: str, schedule: str, rows: list[int], latency: float
) -> None:
    """Whatever rows samples have, a rank for each dp rank takes as long as all its ranks do, at work and idle."""
    program = whole(text, schedule, rows)
    stages = {
        str(stage): StageCosts(
            forward=data.draw(seconds), input_gradient=data.draw(seconds), weight_gradient=data.draw(seconds)
        )
        for stage in program.topology.stages
    }
    costs = Costs(stages=stages, edge=EdgeCosts(latency=latency))
    classes = collapse_tp_cp(program, costs)
    assert classes
    expected = rank_by_rank(program, costs)
    found = simulate(program, costs, classes=classes)
    assert (expected.step_s, expected.lower_bound_s) == (found.step_s, found.lower_bound_s)
    assert expected.busy_s == found.busy_s
    assert expected.peak_in_flight == found.peak_in_flight


@pytest.mark.parametrize(
    "costs",
    [
        Costs(edge=EdgeCosts(bytes_per_s=1e9)),
        Costs(edge=EdgeCosts(latency=1.0, overlap=False)),
        Costs(cores=2),
    ],
)
def test_where_messages_count_nothing_is_collapsed(costs: Costs) -> None:
    """Bandwidth, blocked senders and shared cores tell the ranks of a dp rank apart."""
    assert collapse_tp_cp(whole(JOBS[0], "1f1b", [2, 5]), costs) is None


@pytest.mark.parametrize("text", ["v vit tp2 > l; l gpt tp2 @0", "l gpt tp2 dp2 ep2 x4", "l gpt dp4"])
def test_shared_ranks_experts_and_dp_ranks_of_one_rank_stay(text: str) -> None:
    """Colocated modules and experts on several ranks do not collapse; nor do dp ranks that have one rank each."""
    assert collapse_tp_cp(whole(text, "1f1b", [2, 5]), Costs()) is None
