"""Order: the compute actions of a step in one global order, and the transfers that may surround each of them.

An order depends on the job only, so all steps of a job share it. The rows of a step decide which of the possible
transfers exist: a dp rank without rows in a microbatch has none for it (`program.lower`).
"""

import functools
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.base.samples import overlapping
from mimogrid.core.schedule.actions import Compute, Direction, Kind, Recv, Send, Transfer, Wait
from mimogrid.core.topology.topology import Link, Stage, Topology


@attrs.frozen(eq=False)
class PossibleTransfer:
    """A transfer that the ranks of a stage post if the step has messages for it.

    Attributes:
        transfer: The send or receive.
        wait: The action that waits for it.
        link: The link that it is on.
        at_source: Whether the stage is the link's source.
        has_reply: Whether gradients come back on the link, so that a send is answered by a receive.
        place: Sort key: by when the data is made. It is the same at both ends of the link.
        peer_starts: Where in the order the peer stage computes each of its microbatches, in this direction.
    """

    transfer: Transfer
    wait: Wait
    link: Link
    at_source: bool
    has_reply: bool
    place: tuple[int, int, int]
    peer_starts: tuple[int, ...]


@attrs.frozen(eq=False)
class Slot:
    """A compute action, its index in the order, and the transfers that it may read and send."""

    action: Compute
    start: int
    receives: tuple[PossibleTransfer, ...]
    sends: tuple[PossibleTransfer, ...]


@attrs.frozen
class Cut:
    """A place where the last backward of a stage is cut, so that sums of gradients run beside the rest of it (`cuts`).

    Attributes:
        layer: The layer below which it is cut, by its number in the module; the end of the stage counts as a layer. The
            gradients down to it are complete.
        buckets: The buckets that are complete there, and at no cut before.
        share: The share of the backward's time from the cut before to this one.
    """

    layer: int
    buckets: tuple[int, ...]
    share: float


@attrs.frozen(eq=False)
class Order:
    """The compute actions of a step in one global order.

    Attributes:
        topology: The job's; the order fits every topology with the same stages, links and microbatches.
        training: False for an order of forwards only; then logits take the place of losses.
        actions: In the order in which they may start.
        backward: The stages that run a backward: something in them or upstream trains.
        split: The stages of `backward` that run it in two halves.
        gradients: The links on which gradients flow back.
        max_in_flight: The most microbatches that each stage has in flight. For a stage without backward, the most
            outputs that wait to be read.
        cuts: Where the last backward of a stage is cut, from the end of the stage on; no entry: nowhere.
    """

    topology: Topology
    training: bool
    actions: tuple[Compute, ...]
    backward: frozenset[Stage]
    split: frozenset[Stage]
    gradients: frozenset[Link]
    max_in_flight: Mapping[Stage, int]
    cuts: Mapping[Stage, tuple[Cut, ...]] = attrs.field(factory=dict[Stage, tuple[Cut, ...]])
    _slots: dict[Stage, tuple[Slot, ...]] = attrs.field(
        factory=dict[Stage, tuple[Slot, ...]], init=False, repr=False
    )

    @functools.cached_property
    def index(self) -> Mapping[Compute, int]:
        """The index of each action."""
        return {action: i for i, action in enumerate(self.actions)}

    @functools.cached_property
    def starts(self) -> Mapping[tuple[Stage, Direction], tuple[int, ...]]:
        """For each stage and direction, the index of each microbatch: its forward, or its gradients of inputs."""
        kinds = {
            Kind.FORWARD: Direction.FORWARD,
            Kind.BACKWARD: Direction.BACKWARD,
            Kind.INPUT_GRADIENT: Direction.BACKWARD,
        }
        starts: dict[tuple[Stage, Direction], dict[int, int]] = {}
        for action, i in self.index.items():
            if action.kind in kinds:
                starts.setdefault((action.stage, kinds[action.kind]), {})[action.microbatch] = i
        return {key: tuple(places[k] for k in range(len(places))) for key, places in starts.items()}

    def cuts_of(self, stage: Stage, microbatch: int) -> tuple[Cut, ...]:
        """Return the cuts of a microbatch; only the last backward of a stage has any."""
        cuts = self.cuts.get(stage, ())
        return cuts if cuts and microbatch == self.of(stage)[-1].microbatch else ()

    def parts(self, action: Compute) -> tuple[Compute, ...]:
        """Return what ranks run for an action of the order: its parts down to each cut, and at last the action."""
        if action.kind is not Kind.BACKWARD or action.stage not in self.cuts:
            return (action,)
        stage, k = action.stage, action.microbatch
        upper = (Compute(Kind.BACKWARD_PART, stage, k, cut.layer) for cut in self.cuts_of(stage, k))
        return (*upper, action)

    def share(self, part: Compute) -> float:
        """Return the share of an action's time that one of its `parts` takes."""
        if part.kind is Kind.BACKWARD_PART:
            return next(cut.share for cut in self.cuts[part.stage] if cut.layer == part.layer)
        if part.kind is not Kind.BACKWARD:
            return 1.0
        return 1.0 - sum(cut.share for cut in self.cuts_of(part.stage, part.microbatch))

    def completes(self, part: Compute, bucket: int) -> bool:
        """Whether the gradients of a bucket of a stage are complete after a part of its last action, and not before."""
        layer = part.layer if part.kind is Kind.BACKWARD_PART else None
        return self._complete_at.get((part.stage, bucket)) == layer

    @functools.cached_property
    def _complete_at(self) -> Mapping[tuple[Stage, int], int]:
        """The layer of the cut at which the gradients of a bucket are complete; no entry: at the end."""
        return {
            (stage, bucket): cut.layer
            for stage, cuts in self.cuts.items()
            for cut in cuts
            for bucket in cut.buckets
        }

    def of(self, stage: Stage) -> tuple[Compute, ...]:
        """Return the actions of a stage, in order."""
        return self._by_stage.get(stage, ())

    @functools.cached_property
    def _by_stage(self) -> Mapping[Stage, tuple[Compute, ...]]:
        found: dict[Stage, list[Compute]] = {}
        for action in self.actions:
            found.setdefault(action.stage, []).append(action)
        return {stage: tuple(actions) for stage, actions in found.items()}

    def slots(self, stage: Stage) -> tuple[Slot, ...]:
        """Return the actions of a stage with their possible transfers. They are equal for all ranks and steps."""
        if stage not in self._slots:
            self._slots[stage] = tuple(_slots(self, stage))
        return self._slots[stage]


def _slots(order: Order, stage: Stage) -> Iterator[Slot]:
    known: dict[Transfer, PossibleTransfer] = {}

    def possible(transfer: Transfer, link: Link) -> PossibleTransfer:
        if transfer not in known:
            known[transfer] = _possible_transfer(order, transfer, link)
        return known[transfer]

    for action in order.of(stage):
        receives = tuple(possible(transfer, link) for transfer, link in _reads(order, action))
        sends = tuple(possible(transfer, link) for transfer, link in _makes(order, action))
        yield Slot(action, order.index[action], receives, sends)


def _reads(order: Order, action: Compute) -> Iterator[tuple[Recv, Link]]:
    """Yield the receives that an action may read, with their links."""
    stage, k = action.stage, action.microbatch
    if action.kind is Kind.FORWARD:
        for link in order.topology.links_into(stage):
            yield Recv(stage, Direction.FORWARD, k, link.source), link
    elif action.kind is not Kind.WEIGHT_GRADIENT:
        for link, target_k in _outgoing(order.topology, stage, k):
            if link in order.gradients:
                yield Recv(stage, Direction.BACKWARD, target_k, link.target), link


def _makes(order: Order, action: Compute) -> Iterator[tuple[Send, Link]]:
    """Yield the sends whose data an action may complete, with their links."""
    stage, k = action.stage, action.microbatch
    if action.kind is Kind.FORWARD:
        for link, target_k in _outgoing(order.topology, stage, k):
            yield Send(stage, Direction.FORWARD, target_k, link.target), link
    elif action.kind is not Kind.WEIGHT_GRADIENT:
        for link in order.topology.links_into(stage):
            if link in order.gradients:
                yield Send(stage, Direction.BACKWARD, k, link.source), link


def _outgoing(topology: Topology, stage: Stage, microbatch: int) -> Iterator[tuple[Link, int]]:
    """Yield the links that an output leaves on, with the microbatches of their targets that it is part of."""
    for link in topology.links_from(stage):
        source, target = topology.modules[link.source.module], topology.modules[link.target.module]
        for k in overlapping(microbatch, source.microbatches, target.microbatches):
            yield link, k


def _possible_transfer(order: Order, transfer: Transfer, link: Link) -> PossibleTransfer:
    modules, starts = order.topology.modules, order.starts
    direction, k = transfer.direction, transfer.microbatch
    if direction is Direction.FORWARD:
        source, target = modules[link.source.module], modules[link.target.module]
        last = overlapping(k, target.microbatches, source.microbatches)[-1]
        made_at = starts[link.source, direction][last]
    else:
        made_at = starts[link.target, direction][k]
    return PossibleTransfer(
        transfer,
        Wait(transfer),
        link,
        at_source=transfer.stage == link.source,
        has_reply=link in order.gradients,
        place=(made_at, order.topology.links.index(link), k),
        peer_starts=starts[transfer.peer, direction],
    )
