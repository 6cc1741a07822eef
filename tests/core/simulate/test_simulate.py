"""The simulator against the closed forms of pipelines, and against its own lower bound."""

import itertools

import attrs
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

import scale
import timed
from jobs import job, program_for, program_of, step_with
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.pricing.unknown_names import unknown_names
from mimogrid.core.program.replay import replay
from mimogrid.core.schedule.actions import Compute, Kind, Reduce, Send, parse
from mimogrid.core.simulate.breakdown import shares
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.timeline import by_rank


CHAINS = [(2, 2), (4, 8), (4, 16), (8, 16), (8, 32), (4, 2)]


def chain(stages, microbatches, schedule="1f1b", forward=1.0, backward=2.0, **costs):
    """Simulate equal stages on a chain."""
    options = {"batch": microbatches, "microbatches": microbatches, "schedule": schedule}
    program = program_of(f"language gpt pp{stages}", **options)
    of_stage = StageCosts(forward=forward, backward=backward)
    stage_costs = {str(stage): of_stage for stage in program.topology.stages}
    return simulate(program, Costs(stages=stage_costs, **costs))


def encoder_then_four(forward, backward, microbatches):
    """Simulate an encoder before four language stages of (1, 2)."""
    program = program_of(
        "vision vit > language; language gpt pp4", batch=microbatches, microbatches=microbatches
    )
    stages = {f"language.{i}": StageCosts(forward=1.0, backward=2.0) for i in range(4)}
    stages["vision.0"] = StageCosts(forward=forward, backward=backward)
    return simulate(program, Costs(stages=stages))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "microbatches"), CHAINS)
def test_equal_stages_take_the_time_of_the_closed_form(schedule, stages, microbatches):
    """(M + P - 1)(f + b), with a bubble of (P - 1) / (M + P - 1), and no order could be faster."""
    timeline = chain(stages, microbatches, schedule)
    assert (microbatches + stages - 1) * 3.0 == timeline.step_s
    assert (stages - 1) / (microbatches + stages - 1) == pytest.approx(timeline.bubble, rel=1e-12)
    assert 1.0 == timeline.ratio_to_bound


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 8), (3, 4, 12)])
def test_interleaved_stages_take_the_time_of_the_closed_form(stages, chunks, microbatches):
    """(vM + P - 1)(f + b) / v, with a bubble of (P - 1) / vM of the work.

    The chunks of rank r hold 2 (P - r - 1) + (v - 1) P + 1 microbatches between them.
    """
    program = program_of(
        f"language gpt pp{stages} chunks{chunks}",
        batch=microbatches,
        microbatches=microbatches,
        schedule="interleaved",
    )
    of_chunk = StageCosts(forward=1.0, backward=2.0)
    timeline = simulate(program, Costs(stages={str(stage): of_chunk for stage in program.topology.stages}))
    assert (chunks * microbatches + stages - 1) * 3.0 == timeline.step_s
    work = microbatches * chunks * 3.0
    assert (stages - 1) / (chunks * microbatches) == (timeline.step_s - work) / work
    for rank in range(stages):
        held = most = 0
        for event in timeline.events_of(rank):
            if isinstance(event.action, Compute):
                held += 1 if event.action.kind is Kind.FORWARD else -1
                most = max(most, held)
        assert min(2 * (stages - rank - 1) + (chunks - 1) * stages + 1, chunks * microbatches) == most


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 12), (3, 12)])
def test_split_backwards_leave_the_bubble_of_the_closed_form(stages, microbatches):
    """ZB-H1: (P - 1)(f + i - w) of idling on every rank; no order could leave less, as all ranks end together."""
    text = f"language gpt pp{stages}"
    program = program_of(text, batch=microbatches, microbatches=microbatches, schedule="zb-h1")
    equal = StageCosts(forward=1.0, input_gradient=1.0, weight_gradient=1.0)
    timeline = simulate(program, Costs(stages={str(stage): equal for stage in program.topology.stages}))
    idle = {sum(causes.values()) for causes in timeline.idle_s_by_rank.values()}
    assert {(stages - 1) * (1.0 + 1.0 - 1.0)} == idle
    assert 1.0 == timeline.ratio_to_bound


@pytest.mark.parametrize(("stages", "microbatches"), CHAINS)
def test_1f1b_holds_as_many_microbatches_as_a_stage_is_deep(stages, microbatches):
    """min(M, distance to the loss); GPipe holds all of them."""
    peaks = chain(stages, microbatches).peak_in_flight
    assert [min(microbatches, stages - i) for i in range(stages)] == [peaks[s] for s in sorted(peaks)]
    peaks = chain(stages, microbatches, "gpipe").peak_in_flight
    assert {microbatches} == set(peaks.values())


def test_parallel_encoders_hold_as_many_microbatches_as_they_are_deep():
    """Depth is the longest path to the loss, so a short encoder beside a long one is bounded by its own."""
    program = program_of("a vit pp2 > c; b vit > c; c gpt pp2", batch=8, microbatches=8)
    peaks = {str(s): peak for s, peak in simulate(program, assumed(program.topology)).peak_in_flight.items()}
    assert {"a.0": 4, "a.1": 3, "b.0": 3, "c.0": 2, "c.1": 1} == peaks


@pytest.mark.parametrize(
    ("forward", "backward", "microbatches", "ratio"),
    [(1.25, 2.5, 16, 1.136), (1.5, 3, 8, 1.120), (1.5, 3, 16, 1.083), (2, 4, 8, 1.083), (1, 2, 8, 1.000)],
)
def test_an_encoder_that_is_slower_costs_what_the_textbook_warm_up_costs(
    forward, backward, microbatches, ratio
):
    """A table of unit-time simulations, for an encoder before four language stages."""
    assert ratio == round(encoder_then_four(forward, backward, microbatches).ratio_to_bound, 3)


def test_latency_does_not_amortise_over_microbatches():
    """Eight stages, a quarter of a forward: 1.145 times the time without it at 16, 1.146 at 64."""
    factors = [chain(8, m, edge=EdgeCosts(latency=0.25)).step_s / ((m + 7) * 3) for m in (16, 64)]
    assert [1.145, 1.146] == [round(factor, 3) for factor in factors]


def test_a_frozen_encoder_three_times_as_long_in_forward_is_free():
    """It costs its first forward and nothing more, and holds nothing for a backward."""
    program = program_of("vision vit frozen > language; language gpt pp2", batch=16, microbatches=16)
    free = Costs(stages={f"language.{i}": StageCosts(forward=1.0, backward=2.0) for i in range(2)})
    slow = attrs.evolve(free, stages=free.stages | {"vision.0": StageCosts(forward=3.0, backward=6.0)})
    # The projector trains, so it has a backward: only the encoder before it does not.
    assert all(
        action.stage.module != "vision" or "F" == action.kind.value for action in program.order.actions
    )
    assert simulate(program, free).step_s + 3.0 == simulate(program, slow).step_s


@pytest.mark.parametrize(
    ("encoder", "language", "step_s", "bubble"),
    [((4.0, 2), (4.0, 2), 404, 0.366), ((8.0, 1), (8 / 3, 3), 280, 0.086)],
)
def test_layers_that_are_frozen_are_split_by_forward_and_backward(encoder, language, step_s, bubble):
    """8 frozen and 8 trainable layers on 4 ranks: 404 where each module gets half of them, 280 for 1 and 3."""
    (of_vision, few), (of_language, many) = encoder, language
    text = f"vision vit pp{few} frozen > language; language gpt pp{many}"
    program = program_of(text, batch=32, microbatches=32)
    stages = {f"vision.{i}": StageCosts(forward=of_vision) for i in range(few)}
    stages |= {
        f"language.{i}": StageCosts(forward=of_language, backward=2 * of_language) for i in range(many)
    }
    timeline = simulate(program, Costs(stages=stages))
    assert step_s == pytest.approx(timeline.step_s, rel=1e-12)
    assert bubble == round(timeline.bubble, 3)


quarters = st.integers(0, 12).map(lambda n: n / 4)


@settings(max_examples=scale.drawn(25))
@given(st.lists(st.tuples(quarters, quarters), min_size=2, max_size=5), st.integers(1, 6), quarters)
def test_the_lower_bound_of_a_chain_is_the_formula(stages, microbatches, latency):
    """Of every stage: all its work; all forwards, then down and back; down and back, then all backwards.

    Each comes after a head and before a tail.
    """
    program = program_of(f"language gpt pp{len(stages)}", batch=microbatches, microbatches=microbatches)
    costs = {f"language.{i}": StageCosts(forward=f, backward=b) for i, (f, b) in enumerate(stages)}
    timeline = simulate(program, Costs(stages=costs, edge=EdgeCosts(latency=latency)))
    bounds = []
    for i, (f, b) in enumerate(stages):
        head = sum(f for f, _ in stages[:i]) + i * latency
        tail = sum(b for _, b in stages[:i]) + i * latency
        down = sum(f + b + 2 * latency for f, b in stages[i + 1 :])
        bounds += [microbatches * (f + b), microbatches * f + down + b, f + down + microbatches * b]
        bounds[-3:] = [head + bound + tail for bound in bounds[-3:]]
    assert max(bounds) == timeline.lower_bound_s


def test_gradients_are_summed_and_weights_updated_at_the_end():
    """Where there is more than one dp rank, after the last backward of a stage; each rank steps all of its stages.

    Those of one group follow each other, beside what the ranks compute: `c` is summed from 4 to 8, `a` from 8 on,
    though its last backward ends at 6.
    """
    stages = {
        "a.0": StageCosts(forward=1.0, backward=2.0, reduce=0.5, update=0.25),
        "c.0": StageCosts(forward=1.0, backward=2.0, reduce=4.0, update=0.125),
    }
    dp_ranks = program_of("a vit dp2 > c; c gpt", batch=2, microbatches=1)
    timeline = simulate(dp_ranks, Costs(stages=stages))
    assert 6 + 0.5 + 0.25 == timeline.step_s == timeline.lower_bound_s
    assert ["a.0 WAIT_REDUCE0", "NORM", "UPDATE"] == [
        str(event.action) for event in timeline.events_of(0)[-3:]
    ]
    assert [0.5, 0.0, 0.25] == [event.end_s - event.begin_s for event in timeline.events_of(0)[-3:]]
    together = program_of("a vit dp2 @0 > c; c gpt dp2 @0", batch=2, microbatches=1)
    timeline = simulate(together, Costs(stages=stages))
    assert 4 + 4.5 + 0.375 == timeline.step_s == timeline.lower_bound_s


def test_the_critical_path_is_what_the_step_waits_for():
    """An encoder, its message, and the language model; not the encoder that is through before."""
    program = program_of("a vit > c; b vit > c; c gpt", batch=1, microbatches=1)
    stages = {
        name: StageCosts(forward=seconds) for name, seconds in (("a.0", 1.0), ("b.0", 3.0), ("c.0", 2.0))
    }
    timeline = simulate(program, Costs(stages=stages, edges={"b -> c": EdgeCosts(latency=0.5)}))
    segments = [
        (segment.rank, str(segment.action), segment.begin_s, segment.end_s)
        for segment in timeline.critical_path
    ]
    forth, back = "b.0 SEND_F0 -> c.0", "c.0 SEND_B0 -> b.0"
    assert [
        (1, "b.0 F0", 0.0, 3.0),
        (1, forth, 3.0, 3.5),
        (2, "c.0 F0", 3.5, 5.5),
        (2, back, 5.5, 6.0),
    ] == segments
    assert {"b.0": 3.0, "c.0": 2.0, "b -> c": 1.0} == shares(timeline)


def test_bandwidth_is_bytes_over_time_and_a_channel_carries_one_message_after_the_other():
    """Two dp ranks of one value each: 2 rows of 8 values of 4 bytes take 64 bytes."""
    program = program_of("vision vit > language; language gpt", batch=2, microbatches=1)
    costs = Costs(
        stages={"vision.0": StageCosts(forward=1.0), "language.0": StageCosts(forward=1.0)},
        edge=EdgeCosts(latency=0.5, bytes_per_s=16.0),
    )
    timeline = simulate(program, costs)
    # 2 samples x 2 rows x 8 wide x 4 bytes = 128 bytes = 8 s, there and back.
    assert [8.5, 8.5] == [message.end_s - message.begin_s for message in timeline.message_intervals]
    assert 1 + 8.5 + 1 + 8.5 == timeline.step_s
    assert 1.0 == timeline.ratio_to_bound


def test_a_channel_carries_one_message_after_the_other():
    """The second of two messages of 8 s each, sent 1 s after the first, arrives 8 s after it."""
    program = program_of("vision vit > language; language gpt", batch=4, microbatches=2, schedule="gpipe")
    costs = Costs(stages={"vision.0": StageCosts(forward=1.0)}, edge=EdgeCosts(bytes_per_s=16.0))
    forth = [message for message in simulate(program, costs).message_intervals if message.transfer.at_source]
    assert [(1.0, 9.0), (2.0, 17.0)] == [(message.begin_s, message.end_s) for message in forth]


def test_without_overlap_a_sender_stands_still_while_it_sends():
    """The second forward begins when the first has arrived."""
    text = "vision vit > language; language gpt"
    program = program_of(text, batch=4, microbatches=4, schedule="gpipe")
    stages = {"vision.0": StageCosts(forward=1.0), "language.0": StageCosts(forward=1.0)}

    def begins(overlap):
        timeline = simulate(program, Costs(stages=stages, edge=EdgeCosts(latency=0.5, overlap=overlap)))
        of_vision = by_rank(timeline.events)[0]
        return [e.begin_s for e in of_vision if isinstance(e.action, Compute) and e.action.kind.value == "F"]

    assert [0.0, 1.0, 2.0, 3.0] == begins(True)
    assert [0.0, 1.5, 3.0, 4.5] == begins(False)


def test_ranks_share_cores_evenly():
    """Four ranks that compute at once on two cores take twice as long, and no longer than that."""
    program = program_of("vision vit dp4 > language; language gpt @4", batch=4, microbatches=1)
    stages = {"vision.0": StageCosts(forward=3.0)}
    assert 3.0 == simulate(program, Costs(stages=stages)).step_s
    assert 3.0 == simulate(program, Costs(stages=stages, cores=4)).step_s
    halved = simulate(program, Costs(stages=stages, cores=2))
    assert 6.0 == halved.step_s == halved.lower_bound_s


def test_a_core_is_given_on_when_a_rank_is_through():
    """Work of 1 and of 3 on one core: the first ends at 2, the second at 4."""
    program = program_of("a vit > c; b vit > c; c gpt", batch=1, microbatches=1)
    stages = {"a.0": StageCosts(forward=1.0), "b.0": StageCosts(forward=3.0)}
    ends = {str(e.action): e.end_s for e in simulate(program, Costs(stages=stages, cores=1)).events}
    assert (2.0, 4.0) == (ends["a.0 F0"], ends["b.0 F0"])


def test_as_many_cores_as_ranks_are_no_limit():
    """The event-driven clock and the plain one agree."""
    program = program_of(
        "a vit dp2 pp2 > c; b vit > c; c gpt tp2 pp2", {"a": (2, 0, 3), "b": (1, 0)}, batch=8
    )
    costs = attrs.evolve(assumed(program.topology), edge=EdgeCosts(latency=0.25, bytes_per_s=512.0))
    plain = simulate(program, costs)
    shared = simulate(program, attrs.evolve(costs, cores=program.topology.world_size))
    assert [(e.rank, e.action) for e in plain.events] == [(e.rank, e.action) for e in shared.events]
    assert [e.end_s for e in plain.events] == pytest.approx([e.end_s for e in shared.events])


def test_idle_and_busy_time_are_the_whole_time():
    """Every second of every rank is either work or idling for one cause, and causes are the ones expected."""
    timeline = chain(4, 8)
    assert 4 * timeline.step_s == sum(timeline.busy_s.values()) + sum(timeline.idle_s.values())
    assert {"warm_up": 18.0, "edge": 0.0, "slower_module": 0.0, "drain": 18.0} == timeline.idle_s
    slowed = encoder_then_four(2, 4, 8)
    assert 0 < slowed.idle_s["slower_module"]
    assert 0 < chain(4, 8, edge=EdgeCosts(latency=0.25)).idle_s["edge"]


def test_a_program_that_never_ends_is_not_timed():
    """The rank that is stuck is named."""
    program = program_of("vision vit > language; language gpt", batch=1, microbatches=1)
    stuck = {0: (parse("vision.0 F0"),), 1: (parse("language.0 RECV_F0 <- vision.0"),)}
    stuck[1] += (parse("language.0 WAIT_RECV_F0 <- vision.0"),)
    with pytest.raises(ValueError, match="rank 1 never gets past"):
        simulate(program, Costs(), stuck)


def test_assumed_costs_count_the_gradients_that_are_wanted():
    """Nothing where nothing before trains and all is frozen; for what is frozen later on, inputs only."""
    topology = job("a vit > b; b block frozen > c; d vit frozen > c; c gpt pp2")
    costs = {
        name: (of.forward, of.input_gradient, of.weight_gradient)
        for name, of in assumed(topology).stages.items()
    }
    assert {"a.0": (1, 1, 1), "b.0": (1, 1, 0), "d.0": (1, 0, 0), "c.0": (1, 1, 1), "c.1": (1, 1, 1)} == costs


def test_costs_of_what_the_job_does_not_have_are_misfits():
    """The error has the nearest name."""
    topology = job("vision vit > language; language gpt pp2")
    costs = Costs(
        stages={"visio.0": StageCosts(), "language.1": StageCosts()},
        edges={
            "vision -> language": EdgeCosts(),
            "language.0 -> language.1": EdgeCosts(),
            "a -> b": EdgeCosts(),
        },
    )
    places = [(problem.where, problem.remedy) for problem in unknown_names(costs, topology)]
    assert ('stages."visio.0"', "Did you mean 'vision.0'?") == places[0]
    assert ['stages."visio.0"', 'edges."a -> b"'] == [where for where, _ in places]


# -- any job -----------------------------------------------------------------------------------------------

seconds = st.integers(0, 6).map(lambda n: n / 2)


@st.composite
def timed_jobs(draw):
    """A small job over any graph of up to four modules, with costs."""
    count = draw(st.integers(1, 3))
    names = "abc"[:count]
    lines = []
    for i, name in enumerate(names):
        later = [*names[i + 1 :], "z"]
        feeds = [f for f in later if draw(st.booleans())] or [draw(st.sampled_from(later))]
        kind = "block" if any(f" > {name}" in line or f", {name}" in line for line in lines) else "vit"
        axes = f"dp{draw(st.integers(1, 3))} pp{draw(st.integers(1, 2))} tp{draw(st.integers(1, 2))}"
        frozen = " frozen" if draw(st.booleans()) else ""
        place = " @0" if draw(st.booleans()) else ""
        own = f" m{draw(st.sampled_from([2, 4]))}"
        lines.append(f"{name} {kind} {axes}{own}{place}{frozen} > {', '.join(feeds)}")
    lines.append(f"z gpt dp{draw(st.integers(1, 2))} pp{draw(st.integers(1, 2))}")
    rows = {name: draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)) for name in names}
    schedule = draw(st.sampled_from(["1f1b", "gpipe"]))
    topology = job("; ".join(lines), batch=12, microbatches=draw(st.sampled_from([2, 4])), schedule=schedule)
    rows = {name: counts for name, counts in rows.items() if name in topology.graph.sources}
    edge = EdgeCosts(
        latency=draw(seconds), bytes_per_s=draw(st.sampled_from([64.0, 1e9])), overlap=draw(st.booleans())
    )
    keys = ("forward", "backward", "reduce", "update")
    stages = {str(s): StageCosts(**{key: draw(seconds) for key in keys}) for s in topology.stages}
    cores = draw(st.sampled_from([None, 1, 2.5]))
    note(f"{'; '.join(lines)} {rows} {schedule}")
    return program_for(step_with(topology, rows)), Costs(stages=stages, edge=edge, cores=cores)


@settings(max_examples=scale.drawn(25))
@given(timed_jobs())
def test_no_step_beats_the_lower_bound(drawn):
    """The bound is a bound for any graph, grid, absence, latency and number of cores."""
    program, costs = drawn
    timeline = simulate(program, costs)
    assert timeline.ratio_to_bound >= 1 - 1e-9


@settings(max_examples=scale.drawn(15))
@given(timed.timed_jobs())
def test_no_uneven_step_beats_the_lower_bound(drawn):
    """With chunks, experts, context and sequence parallelism, ragged dp ranks and jitter, either."""
    costs, duration_factors = drawn
    timeline = simulate(program_for(duration_factors.step), costs, duration_factors=duration_factors)
    assert timeline.ratio_to_bound >= 1 - 1e-9


@settings(max_examples=scale.drawn(15))
@given(timed_jobs())
def test_the_critical_path_fills_the_step(drawn):
    """A segment begins when the one before it ends, and each is an action of its rank, or what it has posted."""
    program, costs = drawn
    timeline = simulate(program, costs)
    segments = timeline.critical_path
    ends = [0.0, *(segment.end_s for segment in segments)]
    assert [segment.begin_s for segment in segments] == ends[:-1]
    assert timeline.step_s == ends[-1]
    begins = {(event.rank, event.action): event.begin_s for event in timeline.events}
    for segment in segments:
        posted = isinstance(segment.action, Send | Reduce)
        assert (
            begins[segment.rank, segment.action] <= segment.begin_s
            if posted
            else begins[segment.rank, segment.action] == segment.begin_s
        )


@settings(max_examples=scale.drawn(25))
@given(timed_jobs())
def test_the_simulated_order_is_the_program(drawn):
    """Each rank's events are its program, in order, one after the other; no time is lost or counted twice."""
    program, costs = drawn
    timeline = simulate(program, costs)
    for rank, events in by_rank(timeline.events).items():
        assert program.of(rank) == tuple(event.action for event in events)
        for event, following in itertools.pairwise(events):
            assert event.begin_s <= event.end_s <= following.begin_s + 1e-9
    whole = timeline.step_s * len(program.topology.ranks)
    assert whole == pytest.approx(sum(timeline.busy_s.values()) + sum(timeline.idle_s.values()))
    walked = replay(program, {rank: program.of(rank) for rank in program.topology.ranks})
    assert len(walked.started) == len(timeline.events)
