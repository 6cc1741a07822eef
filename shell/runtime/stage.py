"""Stages: one module stage of this rank, and what it holds in a step.

A `StageRunner` stays over a run: the network, and the process groups that it computes over. A `StageStep` is that stage
in one step. It gathers its inputs, runs the network forward or backward, and hands out what the program sends. A
backward runs whole or in two halves (see `weight_grad_store`): the first half computes the gradients of the inputs, the
second those of the weights. Or it runs part by part, from the end of the stage down to each cut that the forward made.
Where a network could not cut its forward, the part runs on to the next cut, or to the begin of the stage.

On a bridge every rank receives an equal part of its dp rank's rows. The ranks along tp and cp then gather the whole
from each other, in the forward at the target and in the backward at the source.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.samples import prefix_sums
from mimogrid.core.job.models import Own
from mimogrid.core.program.lifetimes import Content, Held, held
from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import Compute, Direction, Kind, Recv, Send
from mimogrid.core.step.routes import Message, RowRange, RowSlice, row_ranges
from mimogrid.core.step.seeds import Seeds, draw_key, seeds_of
from mimogrid.core.step.step import Share, Step, aux_name
from mimogrid.core.topology.topology import Link, Module, StageInfo
from mimogrid.core.update.reductions import loss_scale
from mimogrid.shell.megatron.cache import Cache
from mimogrid.shell.megatron.draws import begin_draws
from mimogrid.shell.megatron.weight_grad_store import WeightGrads, flush
from mimogrid.shell.modules.interface import MadeCut, StageModule
from mimogrid.shell.modules.loss import Loss, StepLoss, weighted_cross_entropy
from mimogrid.shell.runtime.data import Loader
from mimogrid.shell.world.groups import ModuleGroups


_Given = tuple[torch.Tensor, torch.Tensor]
"""A tensor that a backward goes on from, and its gradient."""

Arrivals = dict[tuple[int, Link, Direction], list[tuple[int, torch.Tensor]]]
"""What receives have brought, by microbatch and link. Rows come in pieces, each with the row of the step at which it
begins; hidden states come whole, at 0."""


@attrs.frozen(eq=False, kw_only=True)
class StageRunner:
    """A stage of this rank, over the steps of a run."""

    rank: int
    module: Module
    info: StageInfo
    network: StageModule
    groups: ModuleGroups
    dtype: torch.dtype

    def begin(
        self,
        program: Program,
        loader: Loader,
        index: int = 0,
        *,
        loss_scale: float = 1.0,
        loss: Loss | None = weighted_cross_entropy,
        generates: bool = False,
        cache: Cache | None = None,
    ) -> "StageStep":
        """Return the stage in step `index`, and set the network's loss and mode for it.

        Every loss is multiplied by `loss_scale` before its backward. `loss` is the loss of language models; without it
        a last stage loads no targets and computes no loss, and keeps its logits. Modules of the user's that have a
        loss then rest, or, if the step generates, return a prediction. With a `cache` a language model goes on from it.
        """
        if loss is not None:
            self.network.loss = StepLoss(loss)
        self.network.loss_scale = loss_scale
        self.network.generates, self.network.cache = generates, cache
        if self.network.training != program.order.training:
            self.network.train(program.order.training)
        position = self.module.grid.position(self.rank)
        return StageStep(self, program, loader, index, loss_scale, loss is not None, generates, position)


@attrs.frozen(eq=False)
class StageStep:
    """A stage in one step.

    Attributes:
        runner: the stage.
        program: the program of the step.
        loader: what loads the inputs and targets of the stage.
        index: the number of the step, from which random draws follow.
        loss_scale: what losses are multiplied by before their backward.
        with_targets: whether a last stage computes a loss.
        generates: whether a module of the user's that has a loss returns a prediction in its place.
        position: the rank's place along each axis of the module's grid.
        tensors: what the stage holds, until the program says that it is freed (`core.program.lifetimes`).
        weight_grads: by microbatch, what the first half of a backward leaves to the second.
        cuts: by microbatch, the cuts of its forward that its backward has not come to.
        left: by microbatch, what its backward goes on from: tensors with their gradients.
        arrived: what has arrived for computations that have not begun.
        losses: this rank's part of each loss so far, by the names of `Step.units`.
        logits: the logits [T, V] of each microbatch, on the first rank of a dp rank of a last stage without targets.
        predictions: the predictions [samples, ...] of each microbatch, of a module that generates.
    """

    runner: StageRunner
    program: Program
    loader: Loader
    index: int
    loss_scale: float
    with_targets: bool
    generates: bool
    position: Mapping[str, int]
    tensors: dict[Held, torch.Tensor] = attrs.field(factory=dict[Held, torch.Tensor])
    weight_grads: dict[int, WeightGrads] = attrs.field(factory=dict[int, WeightGrads])
    cuts: dict[int, list[MadeCut]] = attrs.field(factory=dict[int, list[MadeCut]])
    left: dict[int, list[_Given]] = attrs.field(factory=dict[int, list[_Given]])
    arrived: Arrivals = attrs.field(factory=Arrivals)
    losses: dict[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])
    logits: dict[int, torch.Tensor] = attrs.field(factory=dict[int, torch.Tensor])
    predictions: dict[int, torch.Tensor] = attrs.field(factory=dict[int, torch.Tensor])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what crosses the stage's borders."""
        return self.runner.dtype

    @property
    def dp_rank(self) -> int:
        """The stage's position along dp."""
        return self.position["dp"]

    def compute(self, action: Compute) -> None:
        """Run a microbatch forward, or backward in whole or in half."""
        match action.kind:
            case Kind.FORWARD:
                self._forward(action.microbatch)
            case Kind.BACKWARD_PART:
                self._descend(action.microbatch, action.layer)
            case Kind.BACKWARD | Kind.INPUT_GRADIENT:
                self._backward(action.microbatch)
            case Kind.WEIGHT_GRADIENT:
                flush(self.weight_grads.pop(action.microbatch))

    def release(self, tensor: Held) -> None:
        """Free a tensor; the stage has none where it computed no loss."""
        self.tensors.pop(tensor, None)

    # -- forward and backward ------------------------------------------------------------------------------

    def _forward(self, microbatch: int) -> None:
        runner, order, topology = self.runner, self.program.order, self.program.topology
        share, inputs = self._share(microbatch), dict[str, torch.Tensor]()
        if runner.info.first:
            inputs |= self.loader.inputs(runner.module, share, entire=runner.network.reads_entire)
        for link in topology.links_into(runner.info.stage):
            incoming = self._gather(link, Direction.FORWARD, microbatch)
            incoming.requires_grad_(link in order.gradients)
            inputs[link.source.module] = incoming
            if link in order.gradients:
                self.tensors[self._held(Content.INPUT, microbatch, link)] = incoming
        if self._rests:
            return
        if runner.info.last and self._reads_beside:
            inputs |= self.loader.targets(runner.module, share)
        if order.training:
            seed = topology.spec.seed
            runner.network.draw_key = draw_key(seed, runner.module.name, step=self.index)
            if runner.network.draws:
                begin_draws(self._seeds(microbatch), self.loader.device)
        trains = runner.info.stage in order.backward
        layers = [cut.layer for cut in order.cuts_of(runner.info.stage, microbatch)]
        with (
            torch.set_grad_enabled(trains),
            self._noting_weight_grads(microbatch),
            runner.network.cut_before(layers) as cuts,
        ):
            outputs = runner.network(inputs, share)
        if cuts:
            self.cuts[microbatch] = cuts
        for link in topology.links_from(runner.info.stage):
            self.tensors[self._held(Content.OUTPUT, microbatch, link)] = outputs[link.target.module]
        self._keep_losses(outputs, microbatch)

    @property
    def _rests(self) -> bool:
        """Whether the stage computes nothing: it has only a loss of the user's, which nobody asks for."""
        model = self.runner.module.model
        return isinstance(model, Own) and model.has_loss and not (self.with_targets or self.generates)

    @property
    def _reads_beside(self) -> bool:
        """Whether a last stage loads targets, or what a module of the user's reads beside the rows that feed it."""
        return self.with_targets or isinstance(self.runner.module.model, Own)

    def _keep_losses(self, outputs: dict[str, torch.Tensor], microbatch: int) -> None:
        """Add up the losses of a forward; keep the loss for its backward, and logits for a forward-only step."""
        name = self.runner.module.name
        if "loss" in outputs:
            self.tensors[self._held(Content.LOSS, microbatch)] = outputs["loss"]
            self._add(name, outputs["loss"].detach())
        if aux_name(name) in outputs:
            self._add(aux_name(name), outputs[aux_name(name)])
        if "logits" in outputs and self.runner.groups.tp_cp_ranks.rank() == 0:
            self.logits[microbatch] = outputs["logits"]
        if self.generates and "prediction" in outputs:
            self.predictions[microbatch] = outputs["prediction"]

    def _add(self, name: str, loss: torch.Tensor) -> None:
        self.losses[name] = self.losses[name] + loss if name in self.losses else loss

    def _backward(self, microbatch: int) -> None:
        """Run a backward, or what its parts have left of it, and keep the gradients of the inputs."""
        self._descend(microbatch)
        del self.left[microbatch]
        for link in self.program.topology.links_into(self.runner.info.stage):
            if link in self.program.order.gradients:
                leaf = self.tensors[self._held(Content.INPUT, microbatch, link)]
                self.tensors[self._held(Content.GRADIENT, microbatch, link)] = _gradient(leaf)

    def _descend(self, microbatch: int, layer: int | None = None) -> None:
        """Run a backward on from where it is: down to a layer, or to the begin of the stage."""
        if microbatch not in self.left:
            self.left[microbatch] = list(self._given(microbatch))
        left, cuts = self.left[microbatch], self.cuts.get(microbatch, [])
        while left:
            with self._noting_weight_grads(microbatch):
                torch.autograd.backward([root for root, _ in left], [gradient for _, gradient in left])
            left.clear()
            if cuts:
                cut = cuts.pop()
                left.append((cut.hidden, _gradient(cut.leaf)))
                if layer is not None and cut.layer <= layer:
                    return

    def _given(self, microbatch: int) -> Iterator[_Given]:
        """Yield what a backward begins from: outputs and the loss, each with its gradient."""
        stage, topology = self.runner.info.stage, self.program.topology
        for link in topology.links_from(stage):
            if link in self.program.order.gradients:
                output = self.tensors[self._held(Content.OUTPUT, microbatch, link)]
                gradient = self._gather(link, Direction.BACKWARD, microbatch)
                if output.requires_grad:  # Rows of the user's own may not depend on anything that trains.
                    yield output, gradient
        loss = self.tensors.get(self._held(Content.LOSS, microbatch))
        if loss is not None and loss.requires_grad:  # Nor may a loss.
            units = self.program.routes.step.units[stage.module]
            scale = self.loss_scale * loss_scale(topology, stage.module, units)
            yield loss, torch.full_like(loss, scale)

    def _noting_weight_grads(self, microbatch: int) -> AbstractContextManager[None]:
        """Open the weight-grad store for a microbatch whose backward is split."""
        if self.runner.info.stage not in self.program.order.split:
            return contextlib.nullcontext()
        return self.runner.network.weight_grads.open(self.weight_grads.setdefault(microbatch, []))

    def last_logits(self, microbatch: int) -> tuple[range, torch.Tensor]:
        """Return which samples of the step a dp rank has in a microbatch, and the logits [B, V] behind each."""
        logits_TV, name = self.logits[microbatch], self.runner.module.name
        ends = torch.tensor(prefix_sums(self._share(microbatch).lengths)[1:], device=logits_TV.device) - 1
        which = self.program.routes.step.samples_of(name, self.dp_rank, microbatch)
        return which, logits_TV[ends]

    def sample_logits(self, microbatch: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the place of each sample of a dp rank in the step, and its logits [T, V]."""
        parts = self.logits[microbatch].split(self._share(microbatch).lengths)
        places = self.program.routes.step.samples_of(self.runner.module.name, self.dp_rank, microbatch)
        return zip(places, parts, strict=True)

    def sample_predictions(self, microbatch: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the place of each sample of a dp rank in the step, and its prediction."""
        places = self.program.routes.step.samples_of(self.runner.module.name, self.dp_rank, microbatch)
        return zip(places, self.predictions[microbatch], strict=True)

    def _share(self, microbatch: int) -> Share:
        return self.program.routes.step.share(self.runner.module.name, self.dp_rank, microbatch)

    def _seeds(self, microbatch: int) -> Seeds:
        seed, stage = self.program.topology.spec.seed, self.runner.info.stage
        return seeds_of(seed, stage, self.position, step=self.index, microbatch=microbatch)

    def _held(self, content: Content, microbatch: int, link: Link | None = None) -> Held:
        return held(self.runner.info.stage, content, microbatch, link)

    # -- what crosses the stage's borders ------------------------------------------------------------------

    def shapes(self, recv: Recv) -> list[tuple[Message, tuple[int, ...]]]:
        """Return the messages of a receive with the shape of each."""
        link = link_of(self.program.topology, recv)
        messages = self.program.messages_of(self.runner.rank, recv)
        if link.edge:
            return [(message, (message.rows, link.edge.width)) for message in messages]
        hidden = self._hidden_shape(recv.microbatch)
        return [(message, hidden) for message in messages]

    def deliver(self, recv: Recv, messages: list[tuple[Message, torch.Tensor]]) -> None:
        """Take what a receive has brought, piece by piece, to the microbatches that need it."""
        link = link_of(self.program.topology, recv)
        for message, tensor in messages:
            if link.edge is None:
                self._arrive(recv.microbatch, link, recv.direction, 0, tensor)
                continue
            sizes = [piece.stop - piece.start for piece in message.pieces]
            pieces = tensor.split(sizes) if len(sizes) > 1 else (tensor,)
            for piece, rows in zip(message.pieces, pieces, strict=True):
                forward = recv.direction is Direction.FORWARD
                microbatch = recv.microbatch if forward else piece.microbatch
                self._arrive(microbatch, link, recv.direction, piece.start, rows)

    def payload(self, send: Send) -> list[tuple[Message, torch.Tensor]]:
        """Return the messages of a send with the tensor of each."""
        link = link_of(self.program.topology, send)
        messages = self.program.messages_of(self.runner.rank, send)
        return [(message, self._outgoing(link, send, message)) for message in messages]

    def _outgoing(self, link: Link, send: Send, message: Message) -> torch.Tensor:
        forward = send.direction is Direction.FORWARD
        if link.edge is None:
            return self._sent(link, send.microbatch, forward=forward)
        pieces = []
        for piece in message.pieces:
            microbatch = piece.microbatch if forward else send.microbatch
            whole = self._sent(link, microbatch, forward=forward)
            pieces.append(self._rows(whole, link, microbatch, piece))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _sent(self, link: Link, microbatch: int, *, forward: bool) -> torch.Tensor:
        """Return what a stage sends of a microbatch: an output, or the gradient of an input."""
        content = Content.OUTPUT if forward else Content.GRADIENT
        return self.tensors[self._held(content, microbatch, link)].detach()

    def _rows(self, whole: torch.Tensor, link: Link, microbatch: int, piece: RowSlice) -> torch.Tensor:
        """Cut a piece out of all the rows that this dp rank has at a link in a microbatch of its own."""
        assert link.edge
        step, name = self.program.routes.step, self.runner.module.name
        first, _ = step.rows_of(link.edge.source, step.samples_of(name, self.dp_rank, microbatch))
        return whole[piece.start - first : piece.stop - first]

    def _gather(self, link: Link, direction: Direction, microbatch: int) -> torch.Tensor:
        """Return all of a dp rank's rows of a link: this rank's part, and those of the ranks that share it."""
        arrived = sorted(self.arrived.pop((microbatch, link, direction), ()), key=lambda piece: piece[0])
        if link.edge is None:
            return arrived[0][1] if arrived else self._no_hidden(microbatch)
        sizes = [part.stop - part.start for part in self._parts(link, microbatch)]
        empty = torch.empty(0, link.edge.width, dtype=self.dtype, device=self.loader.device)
        mine = torch.cat([empty, *(rows for _, rows in arrived)])
        return mine if len(sizes) == 1 else all_gather_rows(mine, sizes, self.runner.groups.tp_cp_ranks)

    def _no_hidden(self, microbatch: int) -> torch.Tensor:
        """Hidden states of a dp rank without rows, which computes along with dp ranks that have some."""
        return torch.zeros(self._hidden_shape(microbatch), dtype=self.dtype, device=self.loader.device)

    def _hidden_shape(self, microbatch: int) -> tuple[int, ...]:
        return self.program.routes.step.hidden_shape(self.runner.info.stage, self.dp_rank, microbatch)

    def _parts(self, link: Link, microbatch: int) -> Iterator[RowRange]:
        return row_ranges(self.program.routes.step, self.runner.module, link, microbatch, self.dp_rank)

    def _arrive(
        self, microbatch: int, link: Link, direction: Direction, start: int, tensor: torch.Tensor
    ) -> None:
        self.arrived.setdefault((microbatch, link, direction), []).append((start, tensor))


def losses_of(stages: Iterable[StageStep], step: Step) -> dict[str, float]:
    """Return this rank's part of each loss sum of a step.

    Each cp rank has a part of its own, and all tp ranks have the same, so the first tp rank reports it. Of an auxiliary
    loss every rank has a part of its own.
    """
    losses = dict.fromkeys(step.units, 0.0)
    for stage in stages:
        for name, loss in stage.losses.items():
            if name != stage.runner.module.name or not stage.position["tp"]:
                losses[name] += float(loss)
    return losses


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
