"""Stages at work: one module stage of this rank, with what it holds for each microbatch in flight.

A stage gathers its inputs, runs its network forward or backward, and hands out what the program sends on. A
backward comes whole or in two halves (see `weight_grads`): the first gives the gradients of the inputs, and what of
the microbatch is not needed for the second goes with it.

At a bridge every rank receives an equal part of its dp rank's rows; the ranks along tp and cp then gather the
whole among themselves, forward at the target and backward at the source.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.samples import prefix_sums
from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import Compute, Direction, Kind, Recv, Send
from mimogrid.core.step.routes import Message, RowRange, RowSlice, row_ranges
from mimogrid.core.step.seeds import Seeds, seeds_of
from mimogrid.core.step.step import aux_name
from mimogrid.core.topology.topology import Link, Module, StageInfo
from mimogrid.core.update.reductions import loss_scale
from mimogrid.shell.megatron.draws import begin_draws
from mimogrid.shell.megatron.weight_grad_store import WeightGrads, flush
from mimogrid.shell.modules import StageModule
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy
from mimogrid.shell.runtime.data import Loader
from mimogrid.shell.world.groups import ModuleGroups


Arrivals = dict[tuple[Link, Direction], list[tuple[int, torch.Tensor]]]


@attrs.define(eq=False)
class InFlight:
    """What a stage holds of a microbatch: inputs and outputs by name, and what has arrived for it.

    After the backward, the gradients of the inputs stand in their place. Rows arrive in pieces, each with
    the row of the step at which it begins; hidden states arrive whole, at 0. `products` are those that the
    first half of a backward leaves to the second.
    """

    inputs: dict[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])
    outputs: dict[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])
    arrived: Arrivals = attrs.field(factory=Arrivals)
    products: WeightGrads = attrs.field(factory=WeightGrads)


class StageRunner:
    """A stage of this rank, over the steps of a run."""

    def __init__(
        self,
        *,
        rank: int,
        module: Module,
        info: StageInfo,
        network: StageModule,
        groups: ModuleGroups,
        dtype: torch.dtype,
    ) -> None:
        self.rank = rank
        self.module = module
        self.info = info
        self.network = network
        self.groups = groups
        self.dtype = dtype
        self._position = module.grid.position(rank)
        self._dp_rank = self._position["dp"]

    def begin(
        self,
        program: Program,
        loader: Loader,
        index: int = 0,
        *,
        loss_scale: float = 1.0,
        loss: Loss | None = weighted_cross_entropy,
    ) -> None:
        """Make ready for step `index`; `loss`, `aux` and `answers` are those of the step from now on.

        Every loss is multiplied by `loss_scale` before its backward; that of a language model is `loss`. Without one
        nothing is compared with targets: a last stage keeps what it would have judged.
        """
        self._judges = loss is not None
        if loss is not None:
            # A loss may be a module, which the network would take for a part of itself.
            self.network.loss = functools.partial(loss)
        self._index = index
        self.network.loss_scale = loss_scale
        self._loader = loader
        if self.network.training != program.order.training:
            self.network.train(program.order.training)
        self._program = program
        self._step = program.routes.step
        self._topology = program.topology
        self._in_flight: dict[int, InFlight] = {}
        self.loss: torch.Tensor | None = None
        self.aux: torch.Tensor | None = None
        self.answers: dict[int, torch.Tensor] = {}

    def compute(self, action: Compute) -> None:
        """Run a microbatch forward, or backward in whole or in half."""
        match action.kind:
            case Kind.FORWARD:
                self._forward(action.microbatch)
            case Kind.BACKWARD | Kind.INPUT_GRADIENT:
                self._backward(action.microbatch)
            case Kind.WEIGHT_GRADIENT:
                flush(self._in_flight[action.microbatch].products)

    # -- forward and backward ------------------------------------------------------------------------------

    def _forward(self, microbatch: int) -> None:
        share = self._step.share(self.module.name, self._dp_rank, microbatch)
        held = self._held(microbatch)
        trains = self.info.stage in self._program.order.backward
        if self.info.first:
            held.inputs |= self._loader.inputs(self.module, share, entire=self.network.reads_entire)
        for link in self._topology.links_into(self.info.stage):
            incoming = self._gather(held, link, Direction.FORWARD, microbatch)
            incoming.requires_grad_(link in self._program.order.gradients)
            held.inputs[link.source.module] = incoming
        with_targets = self._judges and self.info.last
        targets = self._loader.targets(self.module, share) if with_targets else {}
        if self.network.draws and self._program.order.training:
            begin_draws(self._seeds(microbatch), self._loader.device)
        with torch.set_grad_enabled(trains), self._weight_grads(microbatch):
            held.outputs = self.network(held.inputs | targets, share)
        if "loss" in held.outputs:
            loss = held.outputs["loss"].detach()
            self.loss = loss if self.loss is None else self.loss + loss
        if aux_name(self.module.name) in held.outputs:
            aux = held.outputs.pop(aux_name(self.module.name))
            self.aux = aux if self.aux is None else self.aux + aux
        if "logits" in held.outputs and self.groups.tp_cp_ranks.rank() == 0:
            self.answers[microbatch] = held.outputs["logits"]
        if not trains:
            held.inputs.clear()
            sent_on = {link.target.module for link in self._topology.links_from(self.info.stage)}
            held.outputs = {name: rows for name, rows in held.outputs.items() if name in sent_on}

    def _backward(self, microbatch: int) -> None:
        held = self._in_flight[microbatch]
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for link in self._topology.links_from(self.info.stage):
            if link in self._program.order.gradients:
                roots.append(held.outputs[link.target.module])
                gradients.append(self._gather(held, link, Direction.BACKWARD, microbatch))
        if "loss" in held.outputs:
            units = self._step.units[self.module.name]
            scale = self.network.loss_scale * loss_scale(self._topology, self.module.name, units)
            roots.append(held.outputs["loss"])
            gradients.append(torch.full_like(held.outputs["loss"], scale))
        pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if r.requires_grad]
        if pairs:  # A loss, or rows of the user's own, may hang on nothing that trains.
            with self._weight_grads(microbatch):
                torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        held.outputs.clear()
        held.inputs = {
            link.source.module: _gradient(held.inputs[link.source.module])
            for link in self._topology.links_into(self.info.stage)
            if link in self._program.order.gradients
        }

    def _weight_grads(self, microbatch: int) -> AbstractContextManager[None]:
        """Open the weight-grad store for a microbatch, if there is a second half for its products."""
        if self.info.stage not in self._program.order.split:
            return contextlib.nullcontext()
        return self.network.weight_grads.open(self._held(microbatch).products)

    def last_tokens(self, microbatch: int, logits: torch.Tensor) -> tuple[range, torch.Tensor]:
        """Return which samples of the step a dp rank has in a microbatch, and the likeliest token after each.

        `logits` are [T, V], sample after sample.
        """
        lengths = self._step.share(self.module.name, self._dp_rank, microbatch).lengths
        ends = torch.tensor(prefix_sums(lengths)[1:], device=logits.device) - 1
        which = self.module.samples(self._dp_rank, microbatch, len(self._step.samples))
        return which, logits[ends].argmax(dim=-1)

    def _seeds(self, microbatch: int) -> Seeds:
        seed = self._topology.spec.seed
        return seeds_of(seed, self.info.stage, self._position, step=self._index, microbatch=microbatch)

    # -- what crosses the stage's borders ------------------------------------------------------------------

    def shapes(self, recv: Recv) -> list[tuple[Message, tuple[int, ...]]]:
        """Return the messages of a receive with the shape of each."""
        link = link_of(self._topology, recv)
        messages = self._program.messages_of(self.rank, recv)
        if link.edge:
            return [(message, (message.rows, link.edge.width)) for message in messages]
        hidden = self._step.hidden_shape(self.info.stage, self._dp_rank, recv.microbatch)
        return [(message, hidden) for message in messages]

    def deliver(self, recv: Recv, messages: list[tuple[Message, torch.Tensor]]) -> None:
        """Take what a receive has brought, piece by piece, to the microbatches that need it."""
        link = link_of(self._topology, recv)
        for message, tensor in messages:
            if link.edge is None:
                self._arrive(recv.microbatch, link, recv.direction, 0, tensor)
                continue
            pieces = tensor.split([piece.stop - piece.start for piece in message.pieces])
            for piece, rows in zip(message.pieces, pieces, strict=True):
                forward = recv.direction is Direction.FORWARD
                microbatch = recv.microbatch if forward else piece.microbatch
                self._arrive(microbatch, link, recv.direction, piece.start, rows)

    def payload(self, send: Send) -> list[tuple[Message, torch.Tensor]]:
        """Return the messages of a send with the tensor of each; let go of what no later send takes."""
        link = link_of(self._topology, send)
        messages = [
            (message, self._outgoing(link, send, message))
            for message in self._program.messages_of(self.rank, send)
        ]
        if send.direction is Direction.BACKWARD:
            del self._in_flight[send.microbatch].inputs[link.source.module]
        elif self.info.stage not in self._program.order.backward:
            self._let_go(link, send.microbatch)
        return messages

    def _let_go(self, link: Link, microbatch: int) -> None:
        """Drop the rows for a target that a backward does not begin at, up to the target's microbatch."""
        own, target = self.module.microbatches, self._topology.modules[link.target.module].microbatches
        for number, held in self._in_flight.items():
            if (number + 1) * target <= (microbatch + 1) * own:
                held.outputs.pop(link.target.module, None)

    def _outgoing(self, link: Link, send: Send, message: Message) -> torch.Tensor:
        forward = send.direction is Direction.FORWARD
        if link.edge is None:
            return self._value(link, send.microbatch, forward=forward)
        pieces = []
        for piece in message.pieces:
            microbatch = piece.microbatch if forward else send.microbatch
            whole = self._value(link, microbatch, forward=forward)
            pieces.append(self._rows(whole, link, microbatch, piece))
        return torch.cat(pieces)

    def _value(self, link: Link, microbatch: int, *, forward: bool) -> torch.Tensor:
        """Return what a stage hands on for a microbatch: an output, or the gradient of an input."""
        held = self._in_flight[microbatch]
        if forward:
            return held.outputs[link.target.module].detach()
        return held.inputs[link.source.module]

    def _rows(self, whole: torch.Tensor, link: Link, microbatch: int, piece: RowSlice) -> torch.Tensor:
        """Cut a piece out of all the rows that this dp rank has at a link in a microbatch of its own."""
        first = next(self._parts(link, microbatch)).start
        return whole[piece.start - first : piece.stop - first]

    def _gather(self, held: InFlight, link: Link, direction: Direction, microbatch: int) -> torch.Tensor:
        """Return all of a dp rank's rows of a link: this rank's part, and those of the ranks that share it."""
        arrived = sorted(held.arrived.pop((link, direction), ()), key=lambda piece: piece[0])
        if link.edge is None:
            return arrived[0][1] if arrived else self._no_hidden(microbatch)
        sizes = [part.stop - part.start for part in self._parts(link, microbatch)]
        empty = torch.empty(0, link.edge.width, dtype=self.dtype, device=self._loader.device)
        mine = torch.cat([empty, *(rows for _, rows in arrived)])
        return mine if len(sizes) == 1 else all_gather_rows(mine, sizes, self.groups.tp_cp_ranks)

    def _no_hidden(self, microbatch: int) -> torch.Tensor:
        """Hidden states of a dp rank without rows, which runs along with dp ranks that have some."""
        shape = self._step.hidden_shape(self.info.stage, self._dp_rank, microbatch)
        return torch.zeros(shape, dtype=self.dtype, device=self._loader.device)

    def _parts(self, link: Link, microbatch: int) -> Iterator[RowRange]:
        return row_ranges(self._step, self.module, link, microbatch, self._dp_rank)

    def _arrive(
        self, microbatch: int, link: Link, direction: Direction, start: int, tensor: torch.Tensor
    ) -> None:
        arrived = self._held(microbatch).arrived
        arrived.setdefault((link, direction), []).append((start, tensor))

    def _held(self, microbatch: int) -> InFlight:
        return self._in_flight.setdefault(microbatch, InFlight())


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of an input; zeros where nothing of it was used (no rows)."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def all_gather_rows(mine: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Gather parts of unequal length, [sizes[i], W] each, into [sum(sizes), W]; padded on the way."""
    longest = max(sizes)
    if longest == 0:
        return mine
    padded = mine.new_zeros(longest, mine.shape[1])
    padded[: len(mine)] = mine
    every = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(every, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])
