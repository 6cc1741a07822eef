"""Zero-bubble orders: idle time and microbatches in flight are those of the literature."""

import pytest

from jobs import job, program_for, step_with
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.program.verify import verify
from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.topology.topology import Topology


def idle_between(topology: Topology, of_stage: StageCosts) -> float:
    """Simulate a chain of equal stages; return how long a rank idles at most between its first and last action."""
    costs = Costs(stages={str(stage): of_stage for stage in topology.stages})
    timeline = simulate(program_for(step_with(topology)), costs)
    computes = [event for event in timeline.events if isinstance(event.action, Compute)]
    spans = {
        rank: (
            min(e.begin_s for e in computes if e.rank == rank),
            max(e.end_s for e in computes if e.rank == rank),
        )
        for rank in topology.ranks
    }
    return max(end - begin - timeline.busy_s[rank] for rank, (begin, end) in spans.items())


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (4, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize(("forward", "inputs", "weights"), [(1, 1, 1), (1, 1.25, 0.75), (2, 2.5, 1.5)])
@pytest.mark.parametrize(("schedule", "put_off"), [("zb-h1", 1), ("zb-h2", 2)])
def test_idle_on_a_chain(
    *,
    schedule: str,
    put_off: int,
    stages: int,
    microbatches: int,
    forward: float,
    inputs: float,
    weights: float,
) -> None:
    """A rank idles (P - 1)(f + b_in - w) under ZB-H1, and (P - 1)(f + b_in - 2w) under ZB-H2 (arXiv 2401.10241)."""
    topology = job(f"l gpt pp{stages}", microbatches=microbatches, batch=microbatches, schedule=schedule)
    costs = StageCosts(forward=forward, input_gradient=inputs, weight_gradient=weights)
    assert (stages - 1) * (forward + inputs - put_off * weights) == idle_between(topology, costs)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_in_flight(stages: int) -> None:
    """ZB-H1 has P microbatches in flight on every rank, 1F1B's most; ZB-H2 has 2P - 1."""
    for schedule, most in (("zb-h1", stages), ("zb-h2", 2 * stages - 1)):
        topology = job(f"l gpt pp{stages}", microbatches=4 * stages, batch=4 * stages, schedule=schedule)
        assert [most] * stages == [order_of(topology).max_in_flight[stage] for stage in topology.stages]


def test_what_cannot_be_put_off_is_not_split() -> None:
    """Frozen stages that pass gradients on, and stages with costs for complete backwards only, are not split."""
    order = order_of(job("v vit > l; l gpt frozen pp2", schedule="zb-h1"))
    kinds = {str(stage): {action.kind for action in order.of(stage)} for stage in order.backward}
    assert {Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT} == kinds["v.0"]
    assert {Kind.FORWARD, Kind.BACKWARD} == kinds["l.0"] == kinds["l.1"]


@pytest.mark.parametrize(
    "text", ["l gpt pp4 chunks2", "v vit pp2 > l; l gpt pp2 chunks4 > g; g regressor pp2"]
)
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2", "auto"])
def test_chunks(text: str, schedule: str) -> None:
    """Modules with virtual stages split their backwards too."""
    topology = job(text, schedule=schedule, microbatches=8, batch=8)
    assert order_of(topology).split
    assert () == verify(program_for(step_with(topology)))
