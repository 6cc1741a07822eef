"""Memory: the bytes that a rank holds over a step, as far as a plan can know them.

Some are there all the time: weights, gradients, and what the optimizer keeps, the two moments of Adam. They follow
from the table of parameters, exactly. Others come and go with the actions of a rank's timeline:

    RECV  .....  WAIT           a receive is given its buffer when it is posted; what has arrived, an action reads
          F  ................  B  or I      what a forward keeps for its backward, until that is through
          I  ................  W            what the gradients of weights are made of, inputs and gradients of outputs
          SEND  ........  WAIT  a send keeps its buffer until it is waited for

What a forward keeps is an estimate (`footprint`). Temporary buffers and the allocator's losses are not in it, nor is
a module of the user's own.
"""

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.job.models import Own
from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.pricing.footprint import Kept, kept, noted_values, saved_values
from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import Action, Compute, Kind, Recv, Send, Transfer, Wait
from mimogrid.core.simulate.rank_timelines import Timeline
from mimogrid.core.step.step import Step
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Stage


@attrs.frozen
class Level:
    """From `at_s` on a rank holds these bytes, because `action` took some or gave some back."""

    at_s: float
    action: Action | None
    kept: Kept
    activations: int
    buffers: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.kept.bytes + self.activations + self.buffers

    @property
    def parts(self) -> Mapping[str, int]:
        """What they are for."""
        return attrs.asdict(self.kept) | {"activations": self.activations, "buffers": self.buffers}


def levels(timeline: Timeline, rank: int) -> tuple[tuple[float, int], ...]:
    """Return the bytes of a rank over time, (from when on, how many), in the order of its program.

    Of several at one moment all but the last have no width, but they are there: a rank can run out of memory in one.
    """
    return tuple((level.at_s, level.bytes) for level in trace(timeline, rank))


def trace(timeline: Timeline, rank: int) -> tuple[Level, ...]:
    """Return what a rank holds over time, a level for every action that changes it."""
    return tuple(_levels(timeline, rank))


def peaks(timeline: Timeline) -> dict[int, Level]:
    """Return the first of the highest levels of every rank. Ranks of one class that hold as much are asked once."""
    known: dict[Hashable, Level] = {}
    found: dict[int, Level] = {}
    for rank in timeline.classes.leader:
        key = _like(timeline, rank)
        if key not in known:
            known[key] = max(_levels(timeline, rank), key=lambda level: level.activations + level.buffers)
        found[rank] = known[key]
    return found


def peak_bytes(timeline: Timeline) -> dict[int, int]:
    """Return the bytes that each rank holds at most."""
    return {rank: level.bytes for rank, level in peaks(timeline).items()}


def most_bytes(program: Program, rank: int) -> int:
    """Return the bytes that a rank holds at most; only the order of its actions counts, not when they are."""
    held = max((change.activations + change.buffers for change in _changes(program, rank)), default=0)
    return kept(program.topology, rank).bytes + held


def bytes_in_flight(program: Program, rank: int) -> int:
    """Return the bytes that a rank holds at most, but for messages: the compute actions of its order are enough."""
    order = program.order
    lists = [order.of(info.stage) for info in program.topology.stages_of(rank)]
    computed = lists[0] if len(lists) == 1 else sorted(itertools.chain(*lists), key=order.index.__getitem__)
    held = max((change.activations for change in _changes(program, rank, computed)), default=0)
    return kept(program.topology, rank).bytes + held


def _levels(timeline: Timeline, rank: int) -> Iterator[Level]:
    events = timeline.events_of(rank)
    always = kept(timeline.program.topology, rank)
    yield Level(0.0, None, always, 0, 0)
    for change in _changes(timeline.program, rank, [event.action for event in events]):
        event = events[change.place]
        at = event.begin_s if change.takes else event.end_s
        yield Level(at, event.action, always, change.activations, change.buffers)


@attrs.frozen
class _Change:
    """After the action at a place, which takes bytes as it begins or gives some back as it ends, this is held."""

    place: int
    takes: bool
    activations: int
    buffers: int


def _changes(program: Program, rank: int, actions: Sequence[Action] | None = None) -> Iterator[_Change]:
    """Yield how what a rank holds changes along its actions (default: those of its program)."""
    actions = program.of(rank) if actions is None else actions
    step = program.routes.step
    dp_ranks = {
        info.stage: step.topology.modules[info.stage.module].dp_rank_of(rank)
        for info in step.topology.stages_of(rank)
    }
    last = {action.stage: action.kind for action in actions if isinstance(action, Compute)}
    sizes: dict[Hashable, int] = {}
    moved: dict[Transfer, int] = {}
    activations = buffers = 0
    for place, action in enumerate(actions):
        takes = True
        match action:
            case Compute(kind=Kind.FORWARD, stage=stage, microbatch=k):
                if last[stage] is Kind.FORWARD:
                    continue
                activations += saved_bytes(step, stage, dp_ranks[stage], k)
            case Compute(kind=Kind.INPUT_GRADIENT, stage=stage, microbatch=k):
                takes = False
                activations += noted_bytes(step, stage, dp_ranks[stage], k)
                activations -= saved_bytes(step, stage, dp_ranks[stage], k)
            case Compute(kind=kind, stage=stage, microbatch=k):
                takes = False
                left = saved_bytes if kind is Kind.BACKWARD else noted_bytes
                activations -= left(step, stage, dp_ranks[stage], k)
            case Wait(transfer=transfer):
                takes = False
                buffers -= moved.pop(transfer)
            case Send() | Recv() as transfer:
                moved[transfer] = _moved_bytes(program, rank, transfer, sizes)
                buffers += moved[transfer]
            case _:
                continue
        yield _Change(place, takes, activations, buffers)


def saved_bytes(step: Step, stage: Stage, dp_rank: int, microbatch: int) -> int:
    """Return what a dp rank of a stage keeps of a microbatch for its backward, on each rank; 0 where there is none."""
    topology = step.topology
    module, info = topology.modules[stage.module], topology.stages[stage]
    if isinstance(module.model, Own) or not info.backward:
        return 0
    recompute = topology.spec.modules[module.name].recompute
    values = saved_values(module, info, step.hidden_shape(stage, dp_rank, microbatch), recompute)
    return round(VALUE_BYTES[topology.spec.precision] * values)


def noted_bytes(step: Step, stage: Stage, dp_rank: int, microbatch: int) -> int:
    """Return what a dp rank of a stage keeps between the halves of a split backward, on each rank."""
    topology = step.topology
    module, info = topology.modules[stage.module], topology.stages[stage]
    if isinstance(module.model, Own):
        return 0
    values = noted_values(module, info, step.hidden_shape(stage, dp_rank, microbatch))
    return round(VALUE_BYTES[topology.spec.precision] * values)


def _moved_bytes(program: Program, rank: int, transfer: Transfer, known: dict[Hashable, int]) -> int:
    """The bytes of a transfer; `known` are those of transfers that are alike."""
    first = program.routes.first(link_of(program.topology, transfer), transfer.microbatch)
    key = transfer.stage, transfer.peer, transfer.at_source, first
    if key not in known:
        messages = program.messages_of(rank, transfer)
        known[key] = sum(message_bytes(program.routes.step, message) for message in messages)
    return known[key]


def _like(timeline: Timeline, rank: int) -> Hashable:
    """What two ranks have in common only if they hold the same over time."""
    first = timeline.classes.leader[rank]
    if timeline.by_dp_ranks or len(timeline.classes.members[first]) == 1:
        return first
    routes = timeline.program.routes
    topology, step = routes.step.topology, routes.step
    facts: list[Hashable] = [first]
    for info in topology.stages_of(rank):
        module = topology.modules[info.stage.module]
        dp_rank = module.dp_rank_of(rank)
        firsts = set(step.alike(module.microbatches))
        facts += [step.shape(module.name, dp_rank, k) for k in range(module.microbatches) if k in firsts]
        for link in (*topology.links_into(info.stage), *topology.links_from(info.stage)):
            side = routes.reaching if link.target == info.stage else routes.leaving
            for k in routes.firsts(link):
                messages = side(link, k, dp_rank).get(rank, ())
                facts.append(sum(message_bytes(step, message) for message in messages))
    return tuple(facts)
