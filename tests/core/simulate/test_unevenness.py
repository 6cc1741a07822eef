"""Uneven steps: factors of mean one, and losses that are kept apart and add up."""

import math
import statistics

import pytest
from hypothesis import given, settings

import scale
from jobs import job, program_for, program_of, step_with
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.pricing.flops import Load, module_units, of_units, sum_of
from mimogrid.core.schedule.actions import Compute, Kind, parse
from mimogrid.core.simulate.breakdown import ALL_CAUSES, JITTER, RAGGED, idle_s, idle_s_by_rank
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.unevenness import DurationFactors
from mimogrid.core.topology.topology import Stage
from timed import timed_jobs


def factors(duration_factors, stage="vision.0", kind=Kind.FORWARD):
    """The factors of a stage by dp rank and microbatch."""
    module = duration_factors.step.topology.modules[stage.split(".")[0]]
    return [
        [
            duration_factors.factor(Compute(kind, Stage(module.name, 0), k), dp_rank)
            for k in range(module.microbatches)
        ]
        for dp_rank in range(module.dp_size)
    ]


def operations(step, stage="vision.0"):
    """The operations of each share's forward, counted apart, by dp rank and microbatch."""
    topology = step.topology
    info = next(info for info in topology.stages.values() if str(info.stage) == stage)
    module = topology.modules[info.stage.module]
    return [
        [
            sum_of(
                of_units(
                    info, module_units(topology, module, Load.of(share.segments, causal=module.model.causal))
                )
            ).forward
            for k in range(module.microbatches)
            for share in [step.share(module.name, dp_rank, k)]
        ]
        for dp_rank in range(module.dp_size)
    ]


def assert_in_proportion(step, stage="vision.0"):
    """Factors are the operations of shares, over their mean where there are any."""
    found, counts = factors(DurationFactors(step, ragged=True), stage), operations(step, stage)
    mean = statistics.mean(count for of_dp_rank in counts for count in of_dp_rank if count)
    assert [[pytest.approx(count / mean) for count in of_dp_rank] for of_dp_rank in counts] == found


def test_ragged_dp_ranks_take_as_long_as_what_they_compute():
    """One sample each, of 1, 5, 2 and 4 rows; one that has more takes longer by more than its rows."""
    step = step_with(job("vision vit dp2 > z; z gpt", batch=4, microbatches=2), {"vision": (1, 5, 2, 4)})
    assert_in_proportion(step)
    (one, two), (five, four) = factors(DurationFactors(step, ragged=True))
    assert 5 * one < five
    assert 2 * two < four
    assert_in_proportion(step, "z.0")


def test_shares_of_uneven_numbers_of_samples_are_ragged():
    """Of three samples the second dp rank has two."""
    step = step_with(job("vision vit > z; z gpt dp2", batch=3, microbatches=1))
    assert [[2 / 3], [4 / 3]] == factors(DurationFactors(step, ragged=True), "z.0")


def test_segments_are_what_attends():
    """Samples of 1 and 5 rows are less than one of 6; a dp rank without rows counts for nothing."""
    topology = job("vision vit > z; z gpt", batch=6, microbatches=3)
    step = step_with(topology, {"vision": (1, 5, 0, 0, 6, 0)})
    assert_in_proportion(step)
    ((ragged, none, whole),) = factors(DurationFactors(step, ragged=True))
    assert 0.0 == none < ragged < whole


def test_dp_ranks_that_start_together_take_as_long_as_the_slowest():
    """Experts are spread over both dp ranks."""
    topology = job("vision vit dp2 ep2 x2 > z; z gpt", batch=2, microbatches=1)
    step = step_with(topology, {"vision": (1, 3)})
    ((slow,), (fast,)) = operations(step)[::-1]
    assert [[pytest.approx(2 * slow / (slow + fast))]] * 2 == factors(DurationFactors(step, ragged=True))


def test_jitter_is_log_normal_with_mean_one():
    """A thousand draws; the same seed gives the same ones, each action has its own."""
    step = step_with(job("vision vit dp4 > z; z gpt", batch=1000, microbatches=250))
    drawn = [factor for dp_rank in factors(DurationFactors(step, jitter=0.3)) for factor in dp_rank]
    assert 1.0 == pytest.approx(statistics.mean(drawn), abs=0.05)
    assert 0.3 == pytest.approx(statistics.stdev(map(math.log, drawn)), abs=0.03)
    assert len(drawn) == len(set(drawn))
    assert drawn == [factor for dp_rank in factors(DurationFactors(step, jitter=0.3)) for factor in dp_rank]
    for duration_factors, kind in (
        (DurationFactors(step, jitter=0.3, seed=1), Kind.FORWARD),
        (DurationFactors(step, jitter=0.3), Kind.BACKWARD),
    ):
        assert set(drawn).isdisjoint(
            factor for dp_rank in factors(duration_factors, kind=kind) for factor in dp_rank
        )


def test_a_compute_action_takes_its_factor_longer():
    """Joint actions of a tp group take as long on both ranks."""
    program = program_of("vision vit tp2 > z; z gpt", batch=1, microbatches=1)
    costs, duration_factors = (
        Costs(stages={"vision.0": StageCosts(forward=2.0)}),
        DurationFactors(program.routes.step, jitter=0.5),
    )
    action = parse("vision.0 F0")
    for rank in (0, 1):
        (event,) = [
            e
            for e in simulate(program, costs, duration_factors=duration_factors).events_of(rank)
            if e.action == action
        ]
        assert 2.0 * duration_factors.factor(action, 0) == event.end_s - event.begin_s


def test_idling_for_the_data_is_kept_apart_from_that_for_the_pipeline():
    """Two encoder dp ranks of 1 and 3 rows: the step waits for the second, and two ranks idle for as long."""
    program = program_of("a vit dp2 > z; z gpt", {"a": (1, 3)}, batch=2, microbatches=1)
    costs = Costs(stages={"a.0": StageCosts(forward=2.0), "z.0": StageCosts(forward=1.0)})
    duration_factors = DurationFactors(program.routes.step, ragged=True)
    timeline = simulate(program, costs, duration_factors=duration_factors)
    found = idle_s(timeline, idle_s_by_rank(timeline, costs, duration_factors))
    ((less,), (more,)) = factors(duration_factors, "a.0")
    assert 1.0 + 2.0 * more == timeline.step_s
    even = simulate(program, costs)
    assert sum(even.idle_s.values()) == pytest.approx(sum(found[cause] for cause in even.idle_s))
    assert (pytest.approx(2.0 * (more - less) + 2.0 * (more - 1.0)), 0.0) == (found[RAGGED], found[JITTER])


@settings(max_examples=scale.drawn(15))
@given(timed_jobs())
def test_causes_add_up_to_all_idling(drawn):
    """Rank by rank, and over all ranks; what is not uneven has no loss to it."""
    costs, duration_factors = drawn
    timeline = simulate(program_for(duration_factors.step), costs, duration_factors=duration_factors)
    by_rank = idle_s_by_rank(timeline, costs, duration_factors)
    for rank, causes in by_rank.items():
        assert set(ALL_CAUSES) == set(causes)
        assert timeline.step_s == pytest.approx(timeline.busy_s[rank] + sum(causes.values()))
    total = idle_s(timeline, by_rank)
    assert sum(total.values()) == pytest.approx(sum(timeline.idle_s.values()), rel=1e-6, abs=1e-6)
    assert duration_factors.jitter or total[JITTER] == 0.0
    assert duration_factors.ragged or total[RAGGED] == 0.0
