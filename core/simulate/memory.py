"""Memory: the bytes that a rank holds over a step, as far as a plan can know them.

Weights, gradients and what the optimizer keeps are there all the time. They follow from the table of parameters,
exactly. Other bytes come and go with the actions of a rank's timeline:

    RECV  .....  WAIT           a receive gets its buffer when it is posted; an action reads it after the wait
          F  ................  B  or I      what a forward saves for its backward, until that has ended (of a backward
                                            that is cut, until its last part has)
          I  ................  W            what the weight gradients need: inputs, and gradients of outputs
          SEND  ........  WAIT  a send keeps its buffer until it has been waited for
          F, B, I or W          temporaries of a compute action, while it runs

What a forward saves is an estimate, and so are temporaries (`footprint`). The allocator's losses are not included, nor
is a module of the user's own.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.job.models import Own
from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.pricing.footprint import (
    Computed,
    Kept,
    backward_temporaries,
    deferred_values,
    end_bytes,
    forward_temporaries,
    head_bytes,
    kept,
    logits_gradient_bytes,
    product_bytes,
    saved_values,
    widened_bytes,
)
from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import Action, Compute, Kind, Recv, Send, Transfer, Wait
from mimogrid.core.simulate.rank_classes import alike_in_bytes
from mimogrid.core.simulate.timeline import Timeline
from mimogrid.core.step.step import Step
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class Level:
    """The bytes that a rank holds from `at_s` on, because `action` takes some or gives some back."""

    at_s: float
    action: Action | None
    kept: Kept
    activations: int
    buffers: int
    temporaries: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.kept.bytes + self.moving

    @property
    def moving(self) -> int:
        """Those that come and go."""
        return self.activations + self.buffers + self.temporaries

    @property
    def parts(self) -> Mapping[str, int]:
        """The bytes by purpose."""
        return attrs.asdict(self.kept) | {
            "activations": self.activations,
            "buffers": self.buffers,
            "temporaries": self.temporaries,
        }


def trace(timeline: Timeline, rank: int) -> tuple[Level, ...]:
    """Return what a rank holds over time: a level for every action that changes it, in the order of its program.

    Of several levels at one moment all but the last have no width. They count all the same: a rank can run out of
    memory at each.
    """
    return tuple(_levels(timeline, rank))


def peaks(timeline: Timeline) -> dict[int, Level]:
    """Return the first of the highest levels of every rank."""
    classes = alike_in_bytes(timeline.program, timeline.classes)
    highest = {rank: max(_levels(timeline, rank), key=lambda level: level.moving) for rank in classes.members}
    return {rank: highest[leader] for rank, leader in classes.leader.items()}


def peak_bytes(timeline: Timeline) -> dict[int, int]:
    """Return the bytes that each rank holds at most."""
    return {rank: level.bytes for rank, level in peaks(timeline).items()}


def most_bytes(program: Program, rank: int, actions: Sequence[Action] | None = None) -> int:
    """Return the bytes that a rank holds at most. Only the order of its actions counts, not their times."""
    return kept(program.topology, rank).bytes + most_moving(program, rank, actions)


def most_moving(program: Program, rank: int, actions: Sequence[Action] | None = None) -> int:
    """Return those of `most_bytes` that come and go."""
    return max((change.moving for change in _changes(program, rank, actions)), default=0)


def bytes_between(program: Program, rank: int, known: dict[Hashable, int]) -> tuple[int, int]:
    """Return between which two numbers `most_bytes` is: with no message in a buffer, and with all of them at once.

    Neither needs the waits of the rank, so nothing is lowered. `known` has what ranks of the program hold that compute
    alike.
    """
    topology, order, routes = program.topology, program.order, program.routes
    messages = 0
    for info in topology.role(rank).stages:
        for link in (*topology.links_into(info.stage), *topology.links_from(info.stage)):
            times = routes.repeats(link).times
            for k, each in routes.firsts_of(rank, link, at_source=link.source == info.stage):
                size = sum(message_bytes(routes.step, message) for message in each)
                messages += times[k] * size * (2 if link in order.gradients else 1)
    computes = tuple(_computed(program, rank))
    if computes not in known:
        known[computes] = most_moving(program, rank, _actions_of(program, rank))
    least = kept(topology, rank).bytes + known[computes]
    return least, least + messages


def _computed(program: Program, rank: int) -> Iterator[Hashable]:
    """Yield all that the bytes of a rank's compute actions depend on."""
    step = program.routes.step
    for info in step.topology.role(rank).stages:
        module = step.topology.modules[info.stage.module]
        dp_rank = module.dp_rank_of(rank)
        firsts = sorted(set(step.alike(module.microbatches)))
        yield info.stage, step.active(module.name, dp_rank)
        yield tuple(Computed.of(step, module, dp_rank, k) for k in firsts)


def _actions_of(program: Program, rank: int) -> list[Compute]:
    """Return the compute actions of a rank, in order."""
    order, step = program.order, program.routes.step
    actions: list[Compute] = []
    for info in step.topology.role(rank).stages:
        module = step.topology.modules[info.stage.module]
        active = step.active(module.name, module.dp_rank_of(rank))
        actions += [action for action in order.of(info.stage) if action.microbatch in active]
    return sorted(actions, key=order.index.__getitem__)


def _levels(timeline: Timeline, rank: int) -> Iterator[Level]:
    events = timeline.events_of(rank)
    always = kept(timeline.program.topology, rank)
    yield Level(0.0, None, always, 0, 0, 0)
    for change in _changes(timeline.program, rank, [event.action for event in events]):
        event = events[change.place]
        at = event.begin_s if change.at_begin else event.end_s
        yield Level(at, event.action, always, change.activations, change.buffers, change.temporaries)


@attrs.frozen
class _Change:
    """The bytes that a rank holds after the begin, or the end, of the action at a place of its program."""

    place: int
    at_begin: bool
    activations: int
    buffers: int
    temporaries: int = 0

    @property
    def moving(self) -> int:
        """All of them."""
        return self.activations + self.buffers + self.temporaries


_Held = Callable[[Step, Stage, int, int], int]
"""Returns what each rank of a dp rank holds of a microbatch of a stage."""


def _changes(program: Program, rank: int, actions: Sequence[Action] | None = None) -> Iterator[_Change]:
    """Yield how the bytes of a rank change along its actions (default: those of its program)."""
    actions = program.of(rank) if actions is None else actions
    step = program.routes.step
    dp_ranks = {
        info.stage: step.topology.modules[info.stage.module].dp_rank_of(rank)
        for info in step.topology.role(rank).stages
    }
    last = {action.stage: action.kind for action in actions if isinstance(action, Compute)}
    alike = {stage: step.alike(step.topology.modules[stage.module].microbatches) for stage in dp_ranks}
    held: dict[tuple[_Held, Stage, int], int] = {}

    def bytes_held(of: _Held, stage: Stage, microbatch: int) -> int:
        """Return what is held of a microbatch; of those that are alike only the first is counted."""
        key = of, stage, alike[stage][microbatch]
        if key not in held:
            held[key] = of(step, stage, dp_ranks[stage], key[-1])
        return held[key]

    passing: dict[tuple[Kind, Stage, int], int] = {}
    sizes: dict[Hashable, int] = {}
    buffered: dict[Transfer, int] = {}
    activations = buffers = 0
    for place, action in enumerate(actions):
        at_begin = True
        match action:
            case Compute(kind=kind, stage=stage, microbatch=k):
                at_begin, trains = False, last[stage] is not Kind.FORWARD
                if kind is Kind.FORWARD and trains:
                    activations += bytes_held(saved_bytes, stage, k)
                one = kind, stage, alike[stage][k]
                if one not in passing:
                    passing[one] = temporary_bytes(step, action, dp_ranks[stage], trains=trains)
                yield _Change(
                    place, at_begin=True, activations=activations, buffers=buffers, temporaries=passing[one]
                )
                if kind is Kind.INPUT_GRADIENT:
                    activations += bytes_held(deferred_bytes, stage, k)
                if kind in {Kind.INPUT_GRADIENT, Kind.BACKWARD}:
                    activations -= bytes_held(saved_bytes, stage, k)
                elif kind is Kind.WEIGHT_GRADIENT:
                    activations -= bytes_held(deferred_bytes, stage, k)
            case Wait(transfer=transfer):
                at_begin = False
                buffers -= buffered.pop(transfer)
            case Send() | Recv() as transfer:
                buffered[transfer] = transfer_bytes(program, rank, transfer, sizes)
                buffers += buffered[transfer]
            case _:
                continue
        yield _Change(place, at_begin, activations, buffers)


def saved_bytes(step: Step, stage: Stage, dp_rank: int, microbatch: int) -> int:
    """Return what each rank of a dp rank saves of a microbatch for the backward of a stage; 0 without a backward."""
    topology = step.topology
    module, info = topology.modules[stage.module], topology.stages[stage]
    if isinstance(module.model, Own) or not info.backward:
        return 0
    recompute = topology.spec.modules[module.name].recompute
    computed = Computed.of(step, module, dp_rank, microbatch)
    of_layers = VALUE_BYTES[topology.spec.precision] * saved_values(module, info, computed, recompute)
    return round(of_layers + end_bytes(topology, info, computed))


def temporary_bytes(step: Step, action: Compute, dp_rank: int, *, trains: bool) -> int:
    """Return the bytes of temporaries of a compute action on each rank of a dp rank; `trains`: it has a backward."""
    topology, stage = step.topology, action.stage
    module, info = topology.modules[stage.module], topology.stages[stage]
    if isinstance(module.model, Own) or (action.kind is Kind.FORWARD and trains):
        return 0
    computed = Computed.of(step, module, dp_rank, action.microbatch)
    width, recompute = VALUE_BYTES[topology.spec.precision], topology.spec.modules[module.name].recompute
    match action.kind:
        case Kind.FORWARD:
            found = width * forward_temporaries(module, info, computed)
        case Kind.INPUT_GRADIENT:  # What the head needs stays for the weight gradient.
            found = width * backward_temporaries(module, info, computed, recompute)
        case Kind.BACKWARD | Kind.BACKWARD_PART:
            layers = width * backward_temporaries(module, info, computed, recompute)
            freed = head_bytes(topology, info, computed)
            found = max(layers - freed, logits_gradient_bytes(topology, info, computed))
        case Kind.WEIGHT_GRADIENT:
            found = 0.0
    product = 0 if action.kind in {Kind.FORWARD, Kind.INPUT_GRADIENT} else product_bytes(topology, stage)
    if action.kind is not Kind.WEIGHT_GRADIENT:
        product = max(product, widened_bytes(topology, stage))
    return round(found) + product


def deferred_bytes(step: Step, stage: Stage, dp_rank: int, microbatch: int) -> int:
    """Return what each rank of a dp rank keeps of a microbatch between the halves of a stage's split backward."""
    topology = step.topology
    module, info = topology.modules[stage.module], topology.stages[stage]
    if isinstance(module.model, Own):
        return 0
    values = deferred_values(module, info, Computed.of(step, module, dp_rank, microbatch))
    return round(VALUE_BYTES[topology.spec.precision] * values)


def transfer_bytes(program: Program, rank: int, transfer: Transfer, known: dict[Hashable, int]) -> int:
    """Return the bytes that a rank sends or receives in a transfer; `known` has those of transfers that are alike."""
    first = program.routes.first(link_of(program.topology, transfer), transfer.microbatch)
    key = rank, transfer.stage, transfer.peer, transfer.at_source, first
    if key not in known:
        messages = program.messages_of(rank, transfer)
        known[key] = sum(message_bytes(program.routes.step, message) for message in messages)
    return known[key]
