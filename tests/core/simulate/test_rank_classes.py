"""Rank classes: one rank stands for its class, and nothing is lost by it."""

import attrs
from hypothesis import given, settings

import scale
from jobs import program_for, program_of
from mimogrid.core.job.costs import Costs, EdgeCosts
from mimogrid.core.simulate.rank_classes import alike_in_time
from mimogrid.core.simulate.simulation import rank_classes_of, simulate
from mimogrid.core.simulate.unevenness import DurationFactors
from timed import rank_by_rank, timed_jobs


def sizes(program, costs=None, marks=None):
    """How many ranks each class has."""
    return sorted(map(len, alike_in_time(program, costs or Costs(), marks).members.values()))


def test_dp_ranks_that_are_alike_are_one_class():
    """Whatever they exchange with their neighbours, and however many of them there are."""
    assert [1, 1] == sizes(program_of("a vit > z; z gpt", batch=8))
    assert [8, 8, 8] == sizes(program_of("a vit dp8 > z; z gpt dp8 pp2", batch=64))
    # Four senders for each language dp rank: two ranks along tp, two halves of what they get.
    assert [4, 16] == sizes(program_of("a vit dp16 > z; z gpt dp2 tp2", batch=64))


def test_positions_of_a_fan_in_that_differ_are_classes_of_their_own():
    """Of three dp ranks that feed two, the middle one sends to both; every three and two are like these."""
    assert [1] * 5 == sizes(program_of("a vit dp3 > z; z gpt dp2", batch=24, microbatches=4))
    assert [7] * 5 == sizes(program_of("a vit dp21 > z; z gpt dp14", batch=168, microbatches=4))


def test_dp_ranks_with_other_samples_are_apart():
    """A dp rank without rows does not even have the actions."""
    program = program_of("a vit dp4 > z; z gpt dp4", {"a": (2, 0, 2, 2)}, batch=16, microbatches=4)
    assert [1, 1, 3, 3] == sizes(program)


def test_sizes_count_where_they_take_time():
    """Dp ranks with more rows than others are like them until a message takes longer for it."""
    program = program_of("a vit dp4 > z; z gpt dp4", {"a": (2, 5, 2, 2)}, batch=16, microbatches=4)
    assert [4, 4] == sizes(program)
    assert [1, 1, 3, 3] == sizes(program, Costs(edge=EdgeCosts(bytes_per_s=1e9)))


def test_ranks_that_compute_together_are_alike_for_their_peers():
    """Two tp ranks are fed unequal parts, and are apart; those of the next stage hear from both at the same time."""
    program = program_of("a vit > z; z gpt tp2 pp2", {"a": (3,)}, batch=4, microbatches=4)
    slow = EdgeCosts(bytes_per_s=1e9)
    assert [1, 1, 1, 2] == sizes(program, Costs(edge=slow))
    assert [1, 1, 1, 1, 1] == sizes(program, Costs(edge=attrs.evolve(slow, overlap=False)))


def test_dp_ranks_that_take_longer_than_others_are_apart():
    """And so are those that they feed."""
    program = program_of("a vit dp4 > z; z gpt dp4", {"a": (2, 5, 2, 2)}, batch=16, microbatches=4)
    ragged, jitter = (
        DurationFactors(program.routes.step, ragged=True),
        DurationFactors(program.routes.step, jitter=0.1),
    )
    assert [1, 1, 3, 3] == sizes(program, marks=ragged.mark)
    assert [1] * 8 == sizes(program, marks=jitter.mark)


def test_a_world_of_like_dp_ranks_has_no_more_classes_for_being_larger():
    """That is why its simulation takes no longer."""
    line = "a vit dp{0} > z; b vit dp{1} pp2 > z; z gpt dp{2} pp2 tp2"
    few, many = (sizes(program_of(line.format(4 * n, n, 2 * n), batch=16 * n)) for n in (1, 8))
    assert len(few) == len(many)
    assert [8 * size for size in few] == many


@settings(max_examples=scale.drawn(15))
@given(timed_jobs())
def test_classes_are_timed_like_their_ranks(drawn):
    """Every event, every message, and the lower bound: the same numbers, to the last digit."""
    costs, duration_factors = drawn
    program = program_for(duration_factors.step)
    folded = simulate(program, costs, duration_factors=duration_factors)
    whole = rank_by_rank(program, costs, duration_factors=duration_factors)
    assert all(program.of(rank) == program.of(first) for rank, first in folded.classes.leader.items())
    assert whole.events == folded.events
    assert set(whole.message_intervals) == set(folded.message_intervals)
    assert whole.step_s == folded.step_s
    assert whole.lower_bound_s == folded.lower_bound_s
    assert whole.busy_s == folded.busy_s
    assert whole.idle_s_by_rank == folded.idle_s_by_rank
    assert whole.peak_in_flight == folded.peak_in_flight


def test_classes_can_be_had_before_the_walk():
    """The walk goes by the classes that it is given, and finds the same ones itself."""
    program = program_of("a vit dp8 > z; z gpt dp8 pp2", batch=64)
    classes = rank_classes_of(program, Costs())
    assert classes is simulate(program, Costs(), classes=classes).classes
    assert classes.members == simulate(program, Costs()).classes.members
