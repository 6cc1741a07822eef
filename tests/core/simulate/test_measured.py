"""Measured steps: clocks, messages on their way, and the costs that follow."""

import attrs
import pytest

from jobs import program_of
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.schedule.actions import Norm, Update, WaitReduce, parse
from mimogrid.core.simulate.measured import mean_costs, measured, on_one_clock
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.timeline import EDGE, Event, by_rank


JOB = "vision vit dp2 > language; language gpt pp2"


def simulated(schedule="1f1b", latency=0.0, **options):
    """A program with a timeline in which everything takes time, and its costs."""
    program = program_of(JOB, schedule=schedule, **options)
    stages = {
        name: attrs.evolve(costs, reduce=0.5, update=0.25)
        for name, costs in assumed(program.topology).stages.items()
    }
    costs = Costs(stages=stages, edge=EdgeCosts(latency=latency))
    return program, simulate(program, costs), costs


def shifted(events, by):
    """The events of each rank on a clock of its own."""
    return [attrs.evolve(e, begin_s=e.begin_s + by[e.rank], end_s=e.end_s + by[e.rank]) for e in events]


def test_a_step_that_was_simulated_is_measured_as_such():
    """Times, idling and its causes: a clock cannot distinguish when a message left from when it was ready."""
    program, timeline, _ = simulated()
    ran = measured(program, timeline.events)
    assert timeline.events == ran.events
    assert (timeline.step_s, timeline.busy_s) == (ran.step_s, ran.busy_s)
    assert all(timeline.idles_of(rank) == ran.idles_of(rank) for rank in program.topology.ranks)


def test_who_waits_for_a_message_that_is_on_its_way_idles_for_it():
    """Both ends had posted it, and one of them waits."""
    program, timeline, _ = simulated(latency=0.125)
    ran = measured(program, timeline.events)
    assert ran.idle_s[EDGE] > 0
    assert ran.idle_s[EDGE] == pytest.approx(timeline.idle_s[EDGE])
    for ours, theirs in zip(ran.message_intervals, timeline.message_intervals, strict=True):
        assert (ours.transfer, ours.begin_s) == (theirs.transfer, theirs.begin_s)
        assert ours.end_s >= theirs.end_s


def test_one_clock_stays_as_it_is():
    """Whatever it says at the begin of the step; a rank that is late to leave is late."""
    _, timeline, _ = simulated()
    late = [
        attrs.evolve(e, end_s=e.end_s + 0.125 * e.rank) if isinstance(e.action, Norm) else e
        for e in shifted(timeline.events, dict.fromkeys(range(4), 1000.0))
    ]
    assert by_rank(late) == on_one_clock(by_rank(late))


def test_clocks_that_cannot_be_one_are_set_by_the_norm():
    """Ranks 2 and 3 are on a host that was started an hour later."""
    program, timeline, _ = simulated()
    ran = measured(program, shifted(timeline.events, {0: 0.0, 1: 0.0, 2: -3600.0, 3: -3600.0}))
    assert timeline.step_s == pytest.approx(ran.step_s)
    for ours, theirs in zip(timeline.events, ran.events, strict=True):
        assert ours.begin_s == pytest.approx(theirs.begin_s, abs=1e-9)
    ends = {event.end_s for event in ran.events if isinstance(event.action, Norm)}
    assert max(ends) == pytest.approx(min(ends))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_costs_that_follow_from_a_step_are_those_it_was_made_with(schedule):
    """Simulating again takes as long: what a plan and its measurement differ in is waiting."""
    program, timeline, costs = simulated(schedule)
    found = mean_costs(timeline.events)
    again = simulate(program, found)
    assert timeline.step_s == pytest.approx(again.step_s)
    for name, of_stage in found.stages.items():
        assert of_stage.forward == costs.of(name).forward
        assert of_stage.whole_backward == costs.of(name).whole_backward
        assert 0.25 == of_stage.update
        assert of_stage.reduce == (0.5 if name == "vision.0" else 0.0)


def test_a_mean_is_over_microbatches_and_dp_ranks_and_a_sum_is_that_of_the_last_dp_rank():
    """Who came first has waited in it; an update is shared by the stages of a rank."""
    stage = parse("a.0 F0").stage
    events = [
        Event(0, parse("a.0 F0"), 0, 1),
        Event(1, parse("a.0 F0"), 0, 3),
        Event(0, parse("b.0 F0"), 1, 2),
        Event(0, WaitReduce(stage, 0), 2, 4),
        Event(1, WaitReduce(stage, 0), 3, 4),
        Event(0, Update(), 4, 5),
        Event(1, Update(), 4, 6),
    ]
    costs = mean_costs(events)
    assert StageCosts(forward=2.0, reduce=1.0, update=1.25) == costs.of("a.0")
    assert StageCosts(forward=1.0, update=0.5) == costs.of("b.0")
