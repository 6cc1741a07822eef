"""Memory over time: what is there all the time, and what comes and goes with the actions of a timeline."""

import itertools

import attrs
from hypothesis import given, settings

import scale
from jobs import program_for, program_of
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.pricing.footprint import kept, most_bytes_in_flight
from mimogrid.core.simulate.fullest import fullest_ranks
from mimogrid.core.simulate.memory import (
    bytes_between,
    deferred_bytes,
    most_bytes,
    peak_bytes,
    peaks,
    saved_bytes,
    trace,
)
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.parse import assemble
from timed import rank_by_rank, timed_jobs


def timeline_of(text, rows=None, **options):
    """Simulate a job with the costs assumed."""
    program = program_of(text, rows, **options)
    return simulate(program, assumed(program.topology))


def test_weights_gradients_and_moments_are_there_all_the_time():
    """One value each for weights and gradients of what trains, two for the moments of Adam; 4 bytes each."""
    timeline = timeline_of("vision vit > language; language gpt")
    values = sum(
        p.shape[0] * (p.shape[1] if len(p.shape) > 1 else 1)
        for p in timeline.program.topology.modules["vision"].parameters
    )
    found = kept(timeline.program.topology, 0)
    assert (4 * values, 4 * values, 8 * values) == (found.weights, found.gradients, found.optimizer)
    frozen = timeline_of("vision vit frozen > language; language gpt frozen")
    found = kept(frozen.program.topology, 0)
    assert (0, 0) == (found.gradients, found.optimizer)


def test_tp_ranks_hold_less():
    """The matrices are cut, the norms are not."""
    whole = kept(timeline_of("language gpt").program.topology, 0)
    cut = kept(timeline_of("language gpt tp2 width4").program.topology, 0)
    assert whole.weights / 2 < cut.weights < whole.weights


def test_activations_are_held_from_forward_to_backward():
    """1F1B on two stages: the first holds two microbatches at most, the last one; GPipe all four."""
    for schedule, most in (("1f1b", (2, 1)), ("gpipe", (4, 4))):
        timeline = timeline_of("language gpt pp2", batch=4, microbatches=4, schedule=schedule)
        step = timeline.program.routes.step
        for info in timeline.program.topology.modules["language"].stages:
            rank = info.stage.pp
            one = saved_bytes(step, info.stage, 0, 0)
            assert 0 < one
            assert most[rank] * one == max(level.activations for level in trace(timeline, rank))


def test_a_peak_names_its_moment_and_action():
    """Of two encoders before a step of one microbatch, the second begins when the first is through."""
    timeline = timeline_of("a vit @0 > c; b vit @0 > c; c gpt @1", batch=1, microbatches=1)
    peak = peaks(timeline)[0]
    assert peak in trace(timeline, 0)
    assert peak.bytes == sum(peak.parts.values()) == peak_bytes(timeline)[0]
    assert ("b.0 F0", 1.0) == next(
        (str(one.action), one.at_s)
        for one in trace(timeline, 0)
        if one.activations == max(level.activations for level in trace(timeline, 0))
    )


def test_what_trains_nothing_keeps_nothing():
    """A frozen encoder has buffers in flight, and no activations."""
    timeline = timeline_of("vision vit frozen > language; language gpt", batch=4, microbatches=4)
    stage = timeline.program.topology.modules["vision"].stages[0].stage
    assert not timeline.program.topology.stages[stage].backward
    assert {0} == {level.activations for level in trace(timeline, 0)}
    assert 0 < max(level.buffers for level in trace(timeline, 0))


def test_a_message_has_a_buffer_at_both_ends_until_it_is_waited_for():
    """Two rows of 8 values of 4 bytes: 64 bytes; the receive is posted before the data is sent."""
    program = program_of("vision vit > language; language gpt", batch=1, microbatches=1)
    costs = Costs(
        stages={"vision.0": StageCosts(forward=3.0), "language.0": StageCosts(forward=2.0)},
        edge=EdgeCosts(latency=1.0),
    )
    timeline = simulate(program, costs)
    held = {
        rank: [(one.at_s, one.buffers, str(one.action)) for one in trace(timeline, rank)] for rank in (0, 1)
    }
    assert (0.0, 64, "language.0 RECV_F0 <- vision.0") in held[1]
    assert (4.0, 0, "language.0 WAIT_RECV_F0 <- vision.0") in held[1]
    # The buffer of the gradient that is to come is there already.
    assert (3.0, 128, "vision.0 SEND_F0 -> language.0") in held[0]


def test_ranks_of_one_class_hold_what_each_has_to_hold():
    """Where messages take no time, dp ranks that have more rows keep the time of the others."""
    rows = (2, 2, 1, 3, 5, 5, 2, 2)  # two samples for each dp rank
    timeline = timeline_of("a vit dp4 > z; z gpt dp4", {"a": rows}, batch=32, microbatches=4)
    assert [(0, 1, 2, 3), (4, 5, 6, 7)] == list(timeline.classes.members.values())
    found = peak_bytes(timeline)
    assert found[0] == found[1] == found[3] < found[2]
    assert found[4] == found[5] == found[7] < found[6]
    whole = peak_bytes(rank_by_rank(timeline.program, assumed(timeline.program.topology)))
    assert whole == found


@settings(max_examples=scale.drawn(12))
@given(timed_jobs())
def test_leaders_hold_what_their_classes_hold(drawn):
    """At every moment and on every rank; in the end no more than in the beginning."""
    costs, duration_factors = drawn
    program = program_for(duration_factors.step)
    folded = simulate(program, costs, duration_factors=duration_factors)
    whole = rank_by_rank(program, costs, duration_factors=duration_factors)
    assert peak_bytes(whole) == peak_bytes(folded)
    for rank in program.topology.ranks:
        found = trace(folded, rank)
        assert found == trace(whole, rank)
        assert found[0].bytes == found[-1].bytes == min(level.bytes for level in found)
        assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(found))


@settings(max_examples=scale.drawn(12))
@given(timed_jobs())
def test_the_fullest_rank_is_found_without_lowering_all(drawn):
    """Every rank holds what it does between its bounds, and none with a module holds more than the fullest."""
    program = program_for(drawn[1].step)
    held = {rank: most_bytes(program, rank) for rank in program.topology.ranks}
    known: dict[object, int] = {}
    for rank, found in held.items():
        least, most = bytes_between(program, rank, known)
        assert least <= found <= most
    for name, fullest in fullest_ranks(program).items():
        ranks = program.topology.modules[name].grid.ranks
        assert max(held[rank] for rank in ranks) == fullest.bytes == held[fullest.rank]


def test_a_message_is_held_until_its_own_peer_answers():
    """Rank 0 sends to the rank that answers it, rank 1 to another: it holds what it sent for longer."""
    program = program_of("a vit dp2 pp2 @0 > z; z gpt dp4 @0", {"a": [6]}, batch=16)
    held = [most_bytes(program, rank) for rank in range(4)]
    assert held[0] < held[1]
    assert max(held) == fullest_ranks(program)["a"].bytes


def test_a_split_backward_keeps_inputs_and_gradients_of_products():
    """Between its halves: of every matrix [out, in] that trains as many values a position as out + in."""
    timeline = timeline_of("language gpt pp2", batch=4, microbatches=4, schedule="zb-h1")
    step = timeline.program.routes.step
    for info in timeline.program.topology.modules["language"].stages:
        positions, samples, _ = step.hidden_shape(info.stage, 0, 0)
        matrices = [p for p in info.parameters if len(p.shape) == 2 and p.layer != "first"]
        values = positions * samples * sum(sum(p.shape) for p in matrices)
        assert 4 * values == deferred_bytes(step, info.stage, 0, 0)
        rank = info.stage.pp
        left = [level for level in trace(timeline, rank) if str(level.action).endswith(("I0", "W0"))]
        assert left[0].activations >= deferred_bytes(step, info.stage, 0, 0)
        assert 0 == trace(timeline, rank)[-1].activations


def test_recomputation_does_not_shrink_what_is_left_to_the_second_half():
    """Full recomputation keeps little between forward and backward, and all between the two halves."""
    program = program_of("language gpt pp2", batch=4, microbatches=4, schedule="zb-h1")
    spec = program.topology.spec
    modules = {name: attrs.evolve(m, recompute="full") for name, m in spec.modules.items()}
    topology = assemble(attrs.evolve(spec, modules=modules), program.topology.source)
    step = step_of(topology, program.routes.step.samples)
    for stage in topology.stages:
        assert deferred_bytes(program.routes.step, stage, 0, 0) == deferred_bytes(step, stage, 0, 0)
        assert saved_bytes(step, stage, 0, 0) < deferred_bytes(step, stage, 0, 0)
        whole = most_bytes_in_flight(topology, stage)
        assert whole < most_bytes_in_flight(topology, stage, split=True)
