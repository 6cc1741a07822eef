"""Lifetimes: which tensors a rank holds between its actions, and the action after which it frees each.

A stage holds a tensor from the action that makes it to the last action of the rank's program that uses it:

    language.0 F1               makes the inputs and outputs of microbatch 1
    language.0 SEND_F1          uses an output; if the stage trains, so does its backward
    language.0 B1               uses inputs, outputs and loss; makes the gradients of the inputs
    language.0 SEND_B1          uses a gradient

So the table follows from the program alone. The shell frees what the table says and keeps no account of its own.
"""

import enum
import functools
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import Action, Compute, Direction, Kind, Send
from mimogrid.core.topology.topology import Link, Stage


class Content(enum.Enum):
    """What a held tensor is to its stage."""

    INPUT = "input"
    OUTPUT = "output"
    LOSS = "loss"
    GRADIENT = "gradient"


@attrs.frozen(cache_hash=True)
class Held:
    """A tensor that a stage holds of one of its own microbatches.

    `link` is the link that an input or its gradient belongs to, or the one that an output leaves on. A loss has none.
    """

    stage: Stage
    content: Content
    microbatch: int
    link: Link | None = None


@functools.lru_cache(maxsize=1 << 14)  # Each step asks for the same ones again.
def held(stage: Stage, content: Content, microbatch: int, link: Link | None = None) -> Held:
    """Return the name of a held tensor: the same value each time, whose hash is known."""
    return Held(stage, content, microbatch, link)


Releases = Mapping[Action, tuple[Held, ...]]
"""The tensors that a rank frees after each of its actions."""


def releases(program: Program, rank: int, actions: Iterable[Action]) -> Releases:
    """Return what a rank frees after each of its actions; `actions` are those of its program, in their order."""
    last = {used: action for action in actions for used in _uses(program, rank, action)}
    table: dict[Action, tuple[Held, ...]] = {}
    for used, action in last.items():
        table[action] = (*table.get(action, ()), used)
    return table


def _uses(program: Program, rank: int, action: Action) -> Iterator[Held]:
    """Yield the held tensors that an action makes or reads."""
    match action:
        case Compute(Kind.FORWARD | Kind.BACKWARD | Kind.INPUT_GRADIENT as kind, stage, microbatch):
            yield from _computed(program, stage, microbatch, is_backward=kind is not Kind.FORWARD)
        case Send(stage, Direction.BACKWARD, microbatch):
            yield held(stage, Content.GRADIENT, microbatch, link_of(program.topology, action))
        case Send(stage, Direction.FORWARD):
            link = link_of(program.topology, action)
            for message in program.messages_of(rank, action):
                yield from (held(stage, Content.OUTPUT, k, link) for k in message.made_by)
        case _:
            pass


def _computed(program: Program, stage: Stage, microbatch: int, *, is_backward: bool) -> Iterator[Held]:
    topology, gradients = program.topology, program.order.gradients
    for link in topology.links_into(stage):
        if link in gradients:
            yield held(stage, Content.INPUT, microbatch, link)
            if is_backward:
                yield held(stage, Content.GRADIENT, microbatch, link)
    for link in topology.links_from(stage):
        yield held(stage, Content.OUTPUT, microbatch, link)
    if topology.stages[stage].last:
        yield held(stage, Content.LOSS, microbatch)
