"""Experts: who holds which, who computes together because of it, and who speaks for a shard."""

import collections

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import job, program_for, program_of, step_with
from mimogrid.core.base.experts import TOGETHER, ep_dp_ranks_of, expert_view
from mimogrid.core.base.grid import Axis, Grid
from mimogrid.core.job.models import Gpt
from mimogrid.core.program.lower import Program
from mimogrid.core.program.verify import verify
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.topology.groups import groups_of
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.reductions import counts_in_norm, is_written_by


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def spread(draw: st.DrawFn) -> Topology:
    """A language model with experts laid over a stage's ranks in any way."""
    tp, cp, dp, pp = (draw(st.sampled_from(sizes)) for sizes in ([1, 2, 4], [1, 2], [1, 2, 3, 4], [1, 2]))
    ep = draw(st.sampled_from(_divisors(tp * cp * dp)))
    expert_tp = draw(st.sampled_from(_divisors(tp * cp * dp // ep)))
    order = ",".join(draw(st.permutations(["tp", "cp", "dp", "pp"])))
    sizes = f"tp{tp} cp{cp} dp{dp} pp{pp} ep{ep} expert_tp{expert_tp} x{ep * draw(st.integers(1, 3))}"
    return job(f"language gpt {sizes} order={order} @3", batch=8, microbatches=2)


# -- dp ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "expert_tp", "ep", "expected"),
    [
        ({"tp": 1, "dp": 4}, 1, 2, [(0, 1), (0, 1), (2, 3), (2, 3)]),
        ({"tp": 2, "dp": 2}, 1, 2, [(0,), (1,)]),
        ({"tp": 2, "dp": 2}, 2, 2, [(0, 1), (0, 1)]),
        ({"dp": 2, "tp": 2}, 1, 2, [(0, 1), (0, 1)]),
        ({"tp": 2, "dp": 3}, 1, 3, [(0, 1, 2)] * 3),
        ({"tp": 3, "dp": 4}, 1, 2, [(0, 1), (0, 1), (2, 3), (2, 3)]),
        ({"tp": 2, "pp": 2, "dp": 2}, 1, 4, [(0, 1), (0, 1)]),
    ],
)
def test_dp_ranks_whose_experts_are_spread_over_each_other_compute_together(
    axes: dict[str, int], expert_tp: int, ep: int, expected: list[tuple[int, ...]]
) -> None:
    """Groups that meet in a dp rank join all their dp ranks."""
    grid = Grid(tuple(Axis(name, size) for name, size in axes.items()))
    assert tuple(expected) == ep_dp_ranks_of(grid, expert_view(grid, expert_tp=expert_tp, ep=ep))


@settings(max_examples=50)
@given(spread())
def test_what_computes_together_starts_together(topology: Topology) -> None:
    """Whoever tokens may cross to is a member of the joint action, and it of the same one."""
    module = topology.modules["language"]
    program = program_on(topology)
    assert module.experts is not None
    for action in program.order.actions[:2]:
        assert isinstance(action, Compute)
        for rank in module.grid.ranks:
            if module.position(rank)["pp"] == action.stage.pp:
                joint = program.joint(rank, action)
                assert set(joint) >= {*module.experts.group_of(rank, TOGETHER), *tp_cp_ranks(topology, rank)}
                assert all(set(joint) == set(program.joint(other, action)) for other in joint)


def test_a_dp_rank_without_rows_runs_along() -> None:
    """It has the actions of the dp rank that has some, and the program is sound."""
    text = "vision vit dp4 x2 ep2 > language; language gpt @4"
    program = program_of(text, {"vision": (3, 0, 0, 0)}, batch=16, microbatches=4)
    computes = {rank: [a for a in program.of(rank) if isinstance(a, Compute)] for rank in range(4)}
    assert computes[0] == computes[1] != []
    assert [] == computes[2] == computes[3]
    assert () == verify(program)


# -- shards ------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(spread())
def test_every_shard_of_an_expert_is_held_by_its_copies_and_counted_once(topology: Topology) -> None:
    """Of the ranks that hold it one enters the norm; of the ranks with any shard of it one writes it."""
    module = topology.modules["language"]
    assert module.experts is not None
    copies, shards = module.experts.extent("expert_dp"), module.experts.extent("expert_tp")
    held, counted, written = (collections.Counter[tuple[str, int]]() for _ in range(3))
    for rank in module.grid.ranks:
        position = module.position(rank)
        info = module.stages[position["pp"]]
        for parameter in module.held(info, position["ep"]):
            if parameter.expert is not None:
                shard = (parameter.name, position["expert_tp"])
                held[shard] += 1
                counted[shard] += counts_in_norm(position, info, parameter)
                written[parameter.name, 0] += is_written_by(position, info, parameter)
    names = {p.name: p for p in module.parameters if p.expert is not None}
    assert {(name, shard): copies for name in names for shard in range(shards)} == held
    for (name, shard), count in counted.items():
        assert count == (names[name].tp_dim is not None or shard == 0)
    assert dict.fromkeys(((name, 0) for name in names), 1) == written


@settings(max_examples=50)
@given(spread())
def test_what_is_no_expert_is_held_by_all(topology: Topology) -> None:
    """Experts are spread; norms, attention and routers are not."""
    module = topology.modules["language"]
    for rank in module.grid.ranks:
        position = module.position(rank)
        info = module.stages[position["pp"]]
        held = [p.name for p in module.held(info, position["ep"]) if p.expert is None]
        assert [p.name for p in info.parameters if p.expert is None] == held


@settings(max_examples=50)
@given(spread())
def test_every_group_that_experts_need_is_planned(topology: Topology) -> None:
    """Tokens cross, shards are gathered, copies are reduced in groups that exist; sums are over them."""
    module = topology.modules["language"]
    assert module.experts is not None
    planned = {(rank,) for rank in module.grid.ranks} | {g for slot in groups_of(topology) for g in slot}
    program = program_on(topology)
    for rank in module.grid.ranks:
        for axes in (TOGETHER, ("expert_tp",), ("expert_dp",)):
            assert module.experts.group_of(rank, axes) in planned
        sums = {program.joint(rank, reduce) for reduce in program.sums(rank)}
        spans = {module.experts.group_of(rank, "expert_dp"), module.grid.group_of(rank, ("cp", "dp"))}
        spans |= {module.grid.group_of(rank, ("tp", "cp", "dp"))}  # of a router
        assert {group for group in spans if len(group) > 1} == sums
        assert sums <= planned


def test_a_router_is_partial_wherever_tp_deals_tokens() -> None:
    """Not only under sequence parallelism; an expert's bias never is."""
    module = job("language gpt tp2 x2").modules["language"]
    partial = [p.name for p in module.parameters if module.is_partial(p)]
    assert ["layers.0.mlp.router.weight"] == partial
    parallel = job("language gpt tp2 x2 sp").modules["language"]
    assert not any(p.expert is not None for p in parallel.parameters if parallel.is_partial(p))


def test_a_frozen_module_has_no_auxiliary_loss() -> None:
    """And a dense one has none, whatever it says."""
    model = Gpt(layers=1, hidden=8, heads=2, vocab=8, experts=2, aux_loss=0.1)
    expected = {"language gpt x2": 0.1, "language gpt x2 frozen": 0.0, "language gpt": 0.0}
    for text, weight in expected.items():
        module = job(text).modules["language"]
        assert weight == attrs.evolve(module, model=model).aux_loss


def program_on(topology: Topology) -> Program:
    """The program of a step of two samples each."""
    return program_for(step_with(topology))


def tp_cp_ranks(topology: Topology, rank: int) -> tuple[int, ...]:
    """The ranks that hold a rank's dp rank."""
    module = topology.modules["language"]
    position = module.position(rank)
    return module.tp_cp_ranks(module.stages[position["pp"]].stage, position["dp"])
