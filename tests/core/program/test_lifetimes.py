"""Lifetimes: a rank frees every tensor once, after its last use, whatever the schedule."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs
from mimogrid.core.program.lifetimes import Content, Held, releases
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Action, Compute, Direction, Kind, Send, parse


CHAIN = "v vit > l; l gpt pp2"


def freed(program: Program, rank: int) -> dict[str, list[str]]:
    """What a rank frees after its actions, in words."""
    table = releases(program, rank, program.of(rank))
    return {str(action): [_named(held) for held in of] for action, of in table.items()}


def _named(held: Held) -> str:
    link = f" {held.link}" if held.link else ""
    return f"{held.content.value} {held.microbatch}{link}"


def test_a_stage_that_trains_holds_until_the_backward() -> None:
    """Outputs are freed by the backward and not by their send; gradients of inputs by the send."""
    found = freed(jobs.program_of(CHAIN), 1)
    assert "l.0 F0" not in found
    assert "l.0 SEND_F0 -> l.1" not in found
    assert ["input 0 v.0 -> l.0", "output 0 l.0 -> l.1"] == found["l.0 B0"]
    assert ["gradient 0 v.0 -> l.0"] == found["l.0 SEND_B0 -> v.0"]


def test_the_last_stage_holds_its_loss_until_the_backward() -> None:
    """A loss has no link."""
    assert ["input 1 l.0 -> l.1", "loss 1"] == freed(jobs.program_of(CHAIN), 2)["l.1 B1"]


def test_a_stage_that_does_not_train_holds_until_the_send() -> None:
    """A frozen source lets go of its output when it is sent; a last stage of its loss at once."""
    program = jobs.program_of("v vit frozen > l; l gpt pp2")
    assert ["output 2 v.0 -> l.0"] == freed(program, 0)["v.0 SEND_F2 -> l.0"]
    forwards = jobs.program_for(program.routes.step, training=False)
    assert ["loss 0"] == freed(forwards, 2)["l.1 F0"]
    assert ["output 0 l.0 -> l.1"] == freed(forwards, 1)["l.0 SEND_F0 -> l.1"]


def test_an_output_is_held_for_the_last_send_that_takes_of_it() -> None:
    """A microbatch of the source may be in several of the target, and the other way round."""
    in_two = freed(jobs.program_of("v vit frozen m2 > l; l gpt m4"), 0)
    assert ["output 0 v.0 -> l.0"] == in_two["v.0 SEND_F1 -> l.0"]
    assert "v.0 SEND_F0 -> l.0" not in in_two
    of_two = freed(jobs.program_of("v vit frozen m4 > l; l gpt m2"), 0)
    assert ["output 0 v.0 -> l.0", "output 1 v.0 -> l.0"] == of_two["v.0 SEND_F0 -> l.0"]


def test_what_nobody_uses_is_freed_where_it_is_made() -> None:
    """Rows that no target takes, because the rank's samples have none."""
    program = jobs.program_of("v vit dp2 > l; l gpt", rows={"v": (0, 0, 0, 0, 2, 2, 2, 2)})
    for rank in program.topology.ranks:
        made = {held for of in releases(program, rank, program.of(rank)).values() for held in of}
        assert made == {held for action in program.of(rank) for held in _made(program, rank, action)}


@given(schedule=st.sampled_from(["gpipe", "1f1b", "zb-h1"]), training=st.booleans(), data=st.data())
def test_everything_is_freed_once_and_never_used_again(
    schedule: str, training: bool, data: st.DataObject
) -> None:
    """For any schedule, of every rank: the table holds each tensor once, after the last action that uses it."""
    text = data.draw(
        st.sampled_from([CHAIN, "v vit dp2 m2 > l; l gpt pp2", "v vit frozen m8 > l; l gpt dp2"])
    )
    program = jobs.program_for(jobs.program_of(text, schedule=schedule).routes.step, training=training)
    for rank in program.topology.ranks:
        actions = program.of(rank)
        table = releases(program, rank, actions)
        held: set[Held] = set()
        for action in actions:
            held |= set(_made(program, rank, action))
            assert set(_read(program, rank, action)) <= held, action
            assert set(table.get(action, ())) <= held, action
            held -= set(table.get(action, ()))
        assert not held


def _made(program: Program, rank: int, action: Action) -> Iterator[Held]:
    """What an action makes, in words of its own."""
    topology, gradients = program.topology, program.order.gradients
    match action:
        case Compute(Kind.FORWARD, stage, k):
            yield from (
                Held(stage, Content.INPUT, k, i) for i in topology.links_into(stage) if i in gradients
            )
            yield from (Held(stage, Content.OUTPUT, k, link) for link in topology.links_from(stage))
            if topology.stages[stage].last:
                yield Held(stage, Content.LOSS, k)
        case Compute(Kind.BACKWARD | Kind.INPUT_GRADIENT, stage, k):
            yield from (
                Held(stage, Content.GRADIENT, k, i) for i in topology.links_into(stage) if i in gradients
            )
        case _:
            pass


def _read(program: Program, rank: int, action: Action) -> Iterator[Held]:
    """What an action reads, in words of its own."""
    topology = program.topology
    match action:
        case Compute(Kind.BACKWARD | Kind.INPUT_GRADIENT, stage, k):
            yield from _made(program, rank, Compute(Kind.FORWARD, stage, k))
        case Send(stage, direction, k, peer):
            for message in program.messages_of(rank, action):
                if direction is Direction.BACKWARD:
                    yield Held(stage, Content.GRADIENT, k, topology.link_between[peer, stage])
                for piece in message.pieces if direction is Direction.FORWARD else ():
                    yield Held(stage, Content.OUTPUT, piece.microbatch, topology.link_between[stage, peer])
        case _:
            pass


@pytest.mark.parametrize("line", ["l.0 W1", "NORM", "l.0 REDUCE0", "l.0 WAIT_RECV_F0 <- v.0"])
def test_other_actions_use_nothing_that_is_held(line: str) -> None:
    """What has arrived and what is left for the second half of a backward are consumed by one action each."""
    program = jobs.program_of(CHAIN, schedule="zb-h1")
    assert {} == dict(releases(program, 1, [parse(line)]))
