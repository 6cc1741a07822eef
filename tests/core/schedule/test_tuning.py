"""Auto: it finds an order without the idle time of a fixed warm-up depth, within memory, and the same on all ranks."""

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES
from hashseeds import printed
from jobs import job, program_for, step_with
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.job.models import Gpt
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    ScheduleSpec,
    SourceFacts,
)
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.schedule.issue_policy import ISSUE_POLICIES, IssuePolicy, issue_queues_of
from mimogrid.core.schedule.layer_split import topology_of
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.schedule.scheduler import TimedWork, lower_bound_s, retimed, schedule
from mimogrid.core.schedule.tuning import best_named, bytes_needed, timed_by, tuned
from mimogrid.core.schedule.work import unit_seconds, work_of
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.topology.parse import assemble, parse
from mimogrid.core.topology.topology import Stage, Topology
from scale import drawn


ENCODER = Stage("v", 0)
NAMED = sorted(ISSUE_POLICIES)


def priced(topology: Topology, name: str, costs: Costs | None = None, cap: float | None = None) -> Topology:
    """Return a job under another schedule, with costs for it to go by."""
    schedule = attrs.evolve(topology.spec.schedule, name=name, costs=costs, memory_gb=cap)
    return assemble(attrs.evolve(topology.spec, schedule=schedule), topology.source)


def nearly_balanced(encoder: float, microbatches: int) -> tuple[Topology, Costs]:
    """An encoder stage before four of a language model, which take 1 s forward and 2 s backward."""
    topology = job("v vit > l; l gpt pp4", microbatches=microbatches, batch=microbatches)
    stages = {str(stage): StageCosts(forward=1.0, backward=2.0) for stage in topology.stages}
    return topology, Costs(stages=stages | {"v.0": StageCosts(forward=encoder, backward=2 * encoder)})


TABLE = {
    (1.25, 16): (1.136, 1.082, 1.062, 1.041, 1.021),
    (1.5, 8): (1.120, 1.080, 1.040, 1.000),
    (1.5, 16): (1.083, 1.062, 1.042, 1.021, 1.000),
    (2.0, 8): (1.083, 1.042, 1.000),
    (1.0, 8): (1.000,),
}
"""Ratio to the lower bound by extra microbatches in flight, for an encoder's forward seconds and microbatches."""


@pytest.mark.parametrize(("encoder", "microbatches"), TABLE)
def test_in_flight_limits_of_one_stage(encoder: float, microbatches: int) -> None:
    """A nearly balanced encoder wants more in flight than its depth, and `auto` finds how much."""
    topology, costs = nearly_balanced(encoder, microbatches)
    timed = timed_by(work_of(topology, training=True, splits=False), costs)
    for extra_in_flight, ratio in enumerate(TABLE[encoder, microbatches]):
        queues = issue_queues_of(
            timed.work, IssuePolicy(extra_in_flight={ENCODER: extra_in_flight})
        ).by_pp_rank
        order = schedule(timed, queues)
        assert ratio == round(retimed(timed, order, queues) / lower_bound_s(timed, order), 3)
    auto = priced(topology, "auto", costs)
    assert 1.0 == simulate(program_for(step_with(auto)), costs).ratio_to_bound


def test_the_same_for_all_stages_gives_nothing() -> None:
    """More in flight on all stages is no faster; it must be on the right stage."""
    topology, costs = nearly_balanced(2.0, 8)
    timed = timed_by(work_of(topology, training=True, splits=False), costs)
    last = Stage("l", 3)  # what the last stage gets, those before it get, too
    each = [
        issue_queues_of(timed.work, IssuePolicy(extra_in_flight={last: extra_in_flight})).by_pp_rank
        for extra_in_flight in range(4)
    ]
    ends = [retimed(timed, schedule(timed, queues), queues) for queues in each]
    assert ends[:1] * 4 == ends


def costs_for(topology: Topology) -> st.SearchStrategy[Costs]:
    """Draw costs: with halves of backwards or without, with edges that take time or not."""
    second = st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, 3.0])
    halves = st.builds(StageCosts, forward=second, input_gradient=second, weight_gradient=second)
    whole = st.builds(StageCosts, forward=second, backward=second)
    stages = st.fixed_dictionaries({str(stage): halves | whole for stage in topology.stages})
    edge = st.builds(EdgeCosts, latency=st.sampled_from([0.0, 0.25]))
    return st.builds(Costs, stages=stages, edge=edge)


@settings(max_examples=drawn(10))
@given(st.data(), st.sampled_from(sorted(CASES)), st.sampled_from([4, 8]))
def test_never_slower_than_the_best_named_order(data: st.DataObject, case: str, microbatches: int) -> None:
    """With any costs, on its own clock; in the simulator, which times single dp ranks, it is at most 10 % slower."""
    topology = job(CASES[case], microbatches=microbatches, batch=48)
    costs = data.draw(costs_for(topology))
    auto = priced(topology, "auto", costs)
    assert tuned(auto).end_s <= best_named(auto).end_s
    seconds = {
        name: simulate(program_for(step_with(priced(topology, name, costs))), costs).step_s
        for name in (*NAMED, "auto")
    }
    assert seconds["auto"] <= min(seconds[name] for name in NAMED) * 1.1


def test_all_ranks_find_the_same() -> None:
    """The order depends on the job only: other processes, with other hash seeds, find the same one."""
    code = (
        "from test_tuning import nearly_balanced, order_of, priced\n"
        "topology, costs = nearly_balanced(1.5, 16); print(*order_of(priced(topology, 'auto', costs)).actions)"
    )
    assert 1 == len(printed(code, __file__))


def big(name: str, cap: float | None = None) -> Topology:
    """Return a language model that needs some memory, on four stages."""
    options = Gpt(layers=4, hidden=256, heads=4, vocab=64)
    spec = JobSpec(
        modules={"l": ModuleSpec(model="gpt", options=options, grid=GridSpec(pp=4))},
        data=DataSpec(source="x"),
        batch=BatchSpec(global_size=16, microbatches=16),
        schedule=ScheduleSpec(name=name, memory_gb=cap),
    )
    return parse(spec, SourceFacts(sequence=512))


def test_a_cap_on_memory_is_kept() -> None:
    """With less memory fewer microbatches are in flight, and the order just fits."""
    orders = {name: order_of(big(name)) for name in NAMED}
    needs = {
        name: max(bytes_needed(big(name), order.max_in_flight, order.split).values())
        for name, order in orders.items()
    }
    cap = 0.9 * needs["1f1b"] / 1e9
    order = order_of(big("auto", cap))
    assert (
        max(bytes_needed(big("auto"), order.max_in_flight, order.split).values())
        <= cap * 1e9
        < min(needs.values())
    )
    assert tuned(big("auto", cap)).end_s > tuned(big("auto")).end_s


@pytest.mark.parametrize("name", ["1f1b", "auto"])
def test_what_cannot_fit_is_said(name: str) -> None:
    """An order over the cap is an error that names the rank, the bytes and the way out."""
    with pytest.raises(
        PlanError, match=r"needs [\d.]+ GB on rank \d: [\d.]+ GB for weights.* the cap is 0\.001 GB"
    ):
        order_of(big(name, 0.001))


def half_frozen(name: str, split: tuple[int, ...] | None = None) -> JobSpec:
    """Return a job of 24 frozen and 24 trained layers on four ranks, with 32 microbatches."""
    frozen = ("embedding.*", *(f"layers.{i}.*" for i in range(24)))
    options = Gpt(layers=48, hidden=8, heads=2, vocab=16)
    return JobSpec(
        modules={
            "l": ModuleSpec(model="gpt", options=options, grid=GridSpec(pp=4), frozen=frozen, split=split)
        },
        data=DataSpec(source="x"),
        batch=BatchSpec(global_size=32, microbatches=32),
        schedule=ScheduleSpec(name=name),
    )


def test_frozen_layers_count_for_what_they_are() -> None:
    """A split by forward and backward time is 1.44 times as fast as an even one, and `auto` finds it."""
    facts = SourceFacts(sequence=64)

    def step_s(spec: JobSpec) -> float:
        topology = parse(spec, facts)
        return simulate(program_for(step_with(topology)), assumed(topology)).step_s

    even, fair = step_s(half_frozen("1f1b")), step_s(half_frozen("1f1b", (24, 8, 8, 8)))
    chosen = topology_of(half_frozen("auto"), facts).spec
    assert 1.44 == round(even / fair, 2)
    assert step_s(chosen) <= fair


def test_layers_that_do_not_divide_are_cut_all_the_same() -> None:
    """Under `auto` five layers go on three ranks, and a split in the job stays as it is."""
    facts = SourceFacts(sequence=64)
    five = attrs.evolve(
        half_frozen("auto").modules["l"], frozen=False, options=Gpt(layers=5, hidden=8, heads=2, vocab=16)
    )
    spec = attrs.evolve(half_frozen("auto"), modules={"l": attrs.evolve(five, grid=GridSpec(pp=3))})
    assert 5 == sum(topology_of(spec, facts).spec.modules["l"].split or ())
    written = half_frozen("auto", (1, 1, 1, 45))
    assert written == topology_of(written, facts).spec


CAPPED = (
    "v vit dp2 m4 > l; l gpt pp4 dp2",
    "v vit dp2 m2 > l; l gpt pp2 dp2 chunks2",
    "v vit dp2 m4 > l; a vit dp2 m2 @0 > l; l gpt pp4 @0",
    "v vit pp2 m4 > l; l gpt pp2 > g; g regressor m16",
    "v vit dp2 m16 frozen > l; l gpt pp3",
)


@settings(max_examples=drawn(6), deadline=None)
@given(st.sampled_from(CAPPED), st.floats(0.0, 1.1))
def test_any_cap_gives_an_order_or_an_error(text: str, part: float) -> None:
    """For any cap below what an order without a cap needs, `auto` fits or raises an error."""
    topology = job(text, microbatches=8, batch=64)
    always = max(bytes_needed(topology, {}, ()).values())
    free = order_of(topology)
    most = max(bytes_needed(topology, free.max_in_flight, free.split).values())
    cap = always + part * (most - always)
    try:
        order = order_of(priced(topology, "auto", cap=cap / 1e9))
    except PlanError as error:
        where = {problem.where for problem in error.problems}
    else:
        where = set[str]()
        assert max(bytes_needed(topology, order.max_in_flight, order.split).values()) <= cap * (1 + 1e-9)
    assert where <= {"schedule.memory_gb"}


@given(st.sampled_from(CAPPED), st.integers(1, 8), st.booleans())
def test_any_limit_gives_an_order(text: str, limit: int, splits: bool) -> None:
    """With any limit there is an order: as many microbatches are in flight as the fed stages need."""
    work = work_of(job(text, microbatches=8, batch=64), training=True, splits=splits)
    timed = TimedWork(work, unit_seconds(work))
    order = schedule(timed, issue_queues_of(work, IssuePolicy(splits=splits, limit=limit)).by_pp_rank)
    assert list(range(len(work.actions))) == sorted(order)
