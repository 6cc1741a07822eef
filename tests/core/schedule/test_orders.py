"""Orders: the classic schedules come out exactly, over chains and over any module graph."""

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES
from jobs import job
from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.schedule.work import work_of
from mimogrid.core.topology.topology import Topology
from scale import drawn


def picture(topology: Topology, *, training: bool = True) -> str:
    """Write what each stage does, one line a stage."""
    order = order_of(topology, training=training)
    width = max(len(str(stage)) for stage in topology.stages)
    return "\n".join(
        f"{stage!s:{width}} |  " + "  ".join(f"{a.kind.value}{a.microbatch}" for a in order.of(stage))
        for stage in topology.stages
    )


def check(schedule: str, text: str, *, microbatches: int, expect: str, training: bool = True) -> None:
    """Compare a picture with the one expected."""
    topology = job(text, microbatches=microbatches, batch=8 * microbatches, schedule=schedule)
    assert textwrap.dedent(expect).strip() == picture(topology, training=training)


def test_1f1b() -> None:
    """1F1B: stage s of P warms up with P - s forwards, then turns about."""
    check(
        "1f1b",
        "l gpt pp2",
        microbatches=2,
        expect="""
        l.0 |  F0  F1  B0  B1
        l.1 |  F0  B0  F1  B1
        """,
    )
    check(
        "1f1b",
        "l gpt pp4",
        microbatches=6,
        expect="""
        l.0 |  F0  F1  F2  F3  B0  F4  B1  F5  B2  B3  B4  B5
        l.1 |  F0  F1  F2  B0  F3  B1  F4  B2  F5  B3  B4  B5
        l.2 |  F0  F1  B0  F2  B1  F3  B2  F4  B3  F5  B4  B5
        l.3 |  F0  B0  F1  B1  F2  B2  F3  B3  F4  B4  F5  B5
        """,
    )


def test_gpipe() -> None:
    """GPipe: all forwards, then all backwards."""
    check(
        "gpipe",
        "l gpt pp3",
        microbatches=3,
        expect="""
        l.0 |  F0  F1  F2  B0  B1  B2
        l.1 |  F0  F1  F2  B0  B1  B2
        l.2 |  F0  F1  F2  B0  B1  B2
        """,
    )


def test_fewer_microbatches_than_stages() -> None:
    """No stage waits for forwards that never come."""
    check(
        "1f1b",
        "l gpt pp3",
        microbatches=1,
        expect="""
        l.0 |  F0  B0
        l.1 |  F0  B0
        l.2 |  F0  B0
        """,
    )


def test_encoders_of_unequal_depth() -> None:
    """Warm-up is the distance to the loss: both last encoder stages run three ahead, not the shallow one four."""
    check(
        "1f1b",
        CASES["unequal encoders"],
        microbatches=5,
        expect="""
        image.0    |  F0  F1  F2  F3  B0  F4  B1  B2  B3  B4
        image.1    |  F0  F1  F2  B0  F3  B1  F4  B2  B3  B4
        audio.0    |  F0  F1  F2  B0  F3  B1  F4  B2  B3  B4
        language.0 |  F0  F1  B0  F2  B1  F3  B2  F4  B3  B4
        language.1 |  F0  B0  F1  B1  F2  B2  F3  B3  F4  B4
        """,
    )


def test_skip_edge() -> None:
    """With an edge around the middle module the longest path to the loss counts."""
    check(
        "1f1b",
        CASES["skip edge"],
        microbatches=4,
        expect="""
        vision.0   |  F0  F1  F2  B0  F3  B1  B2  B3
        middle.0   |  F0  F1  B0  F2  B1  F3  B2  B3
        language.0 |  F0  B0  F1  B1  F2  B2  F3  B3
        """,
    )


def test_frozen_modules_have_no_backward() -> None:
    """A frozen encoder runs forwards only; behind a trained one, a frozen language model passes gradients on."""
    check(
        "1f1b",
        "v vit frozen > l; l gpt pp2",
        microbatches=3,
        expect="""
        v.0 |  F0  F1  F2
        l.0 |  F0  F1  B0  F2  B1  B2
        l.1 |  F0  B0  F1  B1  F2  B2
        """,
    )
    check(
        "1f1b",
        "v vit > l; l gpt frozen",
        microbatches=2,
        expect="""
        v.0 |  F0  F1  B0  B1
        l.0 |  F0  B0  F1  B1
        """,
    )


def test_a_frozen_encoder_does_not_run_away() -> None:
    """Its limit bounds how far its outputs run ahead of their readers."""
    topology = job("v vit frozen > l; l gpt", microbatches=16, batch=16)
    actions = [a for a in order_of(topology).actions if a.kind is Kind.FORWARD]
    ahead = most = 0
    for action in actions:
        ahead += 1 if action.stage.module == "v" else -1
        most = max(most, ahead)
    assert most <= 2


def test_evaluation_runs_forwards_only() -> None:
    """Without training every stage runs its forwards, and nothing flows back."""
    check(
        "1f1b",
        "v vit > l; l gpt pp2",
        microbatches=3,
        training=False,
        expect="""
        v.0 |  F0  F1  F2
        l.0 |  F0  F1  F2
        l.1 |  F0  F1  F2
        """,
    )
    order = order_of(job("v vit > l; l gpt pp2"), training=False)
    assert (frozenset(), frozenset()) == (order.backward, order.gradients)


def test_in_flight_limits_count_samples() -> None:
    """A stage with microbatches twice as large has as many in flight as cover its readers' limits, and one more."""
    topology = job("a vit m2 > l; b vit m8 > l; l gpt pp2", batch=16, microbatches=4)
    expected = {"a.0": 2, "b.0": 5, "l.0": 2, "l.1": 1}
    assert expected == {
        str(stage): max_in_flight for stage, max_in_flight in order_of(topology).max_in_flight.items()
    }


def test_an_encoder_with_twice_the_microbatches() -> None:
    """The encoder forwards both halves of a microbatch before its reader starts, and gets gradients for both."""
    check(
        "1f1b",
        "v vit m4 > l; l gpt",
        microbatches=2,
        expect="""
        v.0 |  F0  F1  F2  B0  F3  B1  B2  B3
        l.0 |  F0  B0  F1  B1
        """,
    )


def test_colocated_stages_take_turns() -> None:
    """Stages that share a rank never overlap, and together do what each does alone."""
    topology = job("v vit > l; l gpt @0", microbatches=2, batch=8)
    assert ["v.0 F0", "l.0 F0", "l.0 B0", "v.0 F1"] == list(map(str, order_of(topology).actions))[:4]


@settings(max_examples=drawn(40))
@given(
    st.sampled_from(sorted(CASES)), st.sampled_from(["1f1b", "gpipe"]), st.sampled_from([4, 8]), st.booleans()
)
def test_every_order_is_complete_and_possible(
    case: str, schedule: str, microbatches: int, training: bool
) -> None:
    """Every order has all actions once, each after those that it needs, and no stage exceeds its limit in flight."""
    topology = job(CASES[case], schedule=schedule, microbatches=microbatches, batch=48)
    order = order_of(topology, training=training)
    done: set[Compute] = set()
    flying = dict.fromkeys(topology.stages, 0)
    max_in_flight = order.max_in_flight
    work = work_of(topology, training=training, splits=False)
    needs = {work.actions[i]: {work.actions[j] for j in needs} for i, needs in enumerate(work.needs)}
    for action in order.actions:
        assert action not in done
        assert done >= needs[action]
        done.add(action)
        if action.stage in order.backward:
            flying[action.stage] += 1 if action.kind is Kind.FORWARD else -1
            assert flying[action.stage] <= max_in_flight[action.stage]
    expected = {
        Compute(kind, stage, k)
        for stage in topology.stages
        for k in range(topology.modules[stage.module].microbatches)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
        if kind is Kind.FORWARD or stage in order.backward
    }
    assert expected == done


@pytest.mark.parametrize("stages", [1, 2, 5, 16])
@pytest.mark.parametrize("microbatches", [1, 3, 16, 64])
def test_chains_in_flight(stages: int, microbatches: int) -> None:
    """On a chain of P stages, stage s has P - s microbatches in flight at most, and as many if there are."""
    order = order_of(job(f"l gpt pp{stages}", microbatches=microbatches, batch=microbatches))
    for stage in range(stages):
        flying = most = 0
        for action in order.actions:
            if action.stage.pp == stage:
                flying += 1 if action.kind is Kind.FORWARD else -1
                most = max(most, flying)
        assert min(stages - stage, microbatches) == most
