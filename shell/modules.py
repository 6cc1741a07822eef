"""Modules: the networks of one stage on one rank, built from megatron-core to match the core's table.

A stage is a function of its inputs and the description of its share: flat rows in, flat rows out, one block
of positions times samples between the stages of a module.

| stage | inputs | outputs |
|---|---|---|
| first, nothing feeds it | ``rows`` | |
| first, fed | the rows of each feeder by its name | |
| first, `gpt` | also ``tokens``, -1 at placeholders | |
| any but the last | | the module's own name: hidden states [S, B, H] |
| any but the first | the module's own name: hidden states | |
| last | | rows by the name of each target |
| last, with targets | ``labels``, ``loss_weights`` (`gpt`); ``targets`` (`regressor`) | ``loss``, a sum |
| last, without targets | | ``logits`` (`gpt`); ``prediction`` (`regressor`) |
| any with an auxiliary loss, in training | | ``NAME.aux``, this rank's term of it; its gradient is attached |

Under tensor and context parallelism inputs and outputs are whole on every rank that shares them, and so are the
gradients of the inputs. Two things are each cp rank's own, with what it computes them from: hidden states, which
are its part of S, and its term of the loss. Building, forward and backward happen inside `megatron.cpu.on_device`.

Shapes in names: S positions, B samples, H hidden, T tokens, R rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mimogrid.core.engines import FP8_MULTIPLE, TRANSFORMER_ENGINE, Choice, choose
from mimogrid.core.errors import PlanError, Problem, WorldError, nearest
from mimogrid.core.hashing import draw_bits
from mimogrid.core.layout import matches_any, trainable_names
from mimogrid.core.models import Block, BuiltIn, Gpt, Own, Parameter, Regressor, Vit
from mimogrid.core.optimizers import matches
from mimogrid.core.spec import GroupSpec, ModuleSpec, OptimizerSpec
from mimogrid.core.steps import Share, aux_name
from mimogrid.core.topology import UNKNOWN, Module, StageInfo, Topology
from mimogrid.core.zigzag import ZigZag
from mimogrid.shell import builders
from mimogrid.shell.ledger import Ledger
from mimogrid.shell.loss import Loss, Predictions, squared_error_sum, weighted_cross_entropy
from mimogrid.shell.megatron import (
    GPTModel,
    ProcessGroupCollection,
    TransformerBlock,
    copy_to_tensor_model_parallel_region,
    engine,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from mimogrid.shell.megatron.experts import Company, ExpertsSpec, experts_spec
from mimogrid.shell.megatron.layers import Affine, block_spec, config_of
from mimogrid.shell.packing import Deal, Packing, check_placeholders, pack_rows, pack_text
from mimogrid.shell.weights import cut_over, initialize, layout_name, shard_shape


class Groups(Protocol):
    """The process groups of a module that a stage computes over; of size 1 where the axis is 1."""

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of one copy."""

    @property
    def cp(self) -> dist.ProcessGroup:
        """Ranks that hold the parts of one sequence."""

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that hold copies."""

    @property
    def pp(self) -> dist.ProcessGroup:
        """Ranks that hold the stages."""

    @property
    def together(self) -> dist.ProcessGroup:
        """Ranks among whom tokens cross to their experts, expert_tp fastest; else the rank alone."""

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of the same experts; else the rank alone."""

    @property
    def tie(self) -> dist.ProcessGroup | None:
        """The two ends of the pipeline, where both hold a weight."""


class OwnNetwork(Protocol):
    """What a builder of the user's returns: an `nn.Module` with this forward.

    The builder is called with the module's options as keywords. Inputs are what a first stage gets (see the
    table above), whatever else the samples have for the module by its name, end to end (targets, the sizes of
    images), and row counts per sample as int64 tensors: ``lengths``, and ``lengths.FEEDER`` for each feeder.
    Outputs are ``rows`` [R, width] if the module feeds another, and ``loss`` (a sum, not a mean) if it has one.
    """

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return rows, a loss, or both."""


class HostNetwork(Protocol):
    """A network of the host's for one stage of a built-in module: an `nn.Module` with this forward.

    The plan counts layers, heads and tokens as those of the built-in model; what they compute, and with which
    parameters, is the network's own affair. Under tp and cp it talks over groups of its own, or the job's.
    """

    def __call__(self, inputs: Mapping[str, Tensor], share: Share) -> Mapping[str, Tensor]:
        """Compute the stage for a share; see the table at the top of this file.

        What it gives to others it gives as ``rows``, for each sample as many as came in: projections are its own.
        A loss is what the network's attribute ``loss`` makes of its predictions (`shell.loss.Loss`); it is set before.
        """

    def table(self, info: StageInfo, *, tp: int) -> Mapping[str, Parameter]:
        """Return what each parameter of the stage is, by its name in the network; `tp` ranks hold its shards.

        Names are the same whatever the layout, so a layer's has its number in the whole module.
        """


class StageModule(nn.Module):
    """One stage of a module on this rank.

    `draws` says that its forward draws random numbers in training, from the states of `megatron.draws`.
    `reads_entire` says that it gets all that the samples of a source module have for it, not only the rows.
    `ledger` is where all of its layers note their products for gradients of weights, while it is open.
    `loss_scale` multiplies the gradients that it attaches by itself. `layers_by` says whose layers it has. `loss` is
    what the last stage of a language model computes.
    """

    draws = False
    reads_entire = False
    loss_scale = 1.0
    layers_by: Choice | None = None
    loss: Loss = staticmethod(weighted_cross_entropy)

    def __init__(self, module: Module, info: StageInfo, *, dtype: torch.dtype) -> None:
        super().__init__()
        ledger = Ledger()
        self.info = info
        self.name = module.name
        self.edges = module.outputs if info.last else ()
        self.ledger = ledger
        # The prefix keeps a target named like a method of ModuleDict ("keys") legal.
        self.projectors = nn.ModuleDict(
            {
                f"to_{edge.target}": Affine(module.model.hidden, edge.width, dtype=dtype, ledger=ledger)
                for edge in self.edges
                if edge.projected and module.model.hidden
            }
        )

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see the table at the top of this file."""
        raise NotImplementedError

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        raise NotImplementedError

    def emit(self, rows_RH: Tensor) -> dict[str, Tensor]:
        """Return the rows for each target."""
        return {
            edge.target: self.projectors[f"to_{edge.target}"](rows_RH) if edge.projected else rows_RH
            for edge in self.edges
        }


def named_weights(stage: StageModule) -> dict[str, nn.Parameter]:
    """Return this rank's parts of the stage's parameters by layout-independent name, in the table's order."""
    weights = {_weight_name(stage, built): weight for built, weight in stage.named_parameters()}
    planned = (p.name for p in stage.info.parameters if p.name in weights)
    return {name: weights[name] for name in dict.fromkeys((*planned, *weights))}


def _weight_name(stage: StageModule, built: str) -> str:
    if built.startswith("projectors."):
        return built.replace("projectors.to_", "projector.", 1)
    return stage.weight_name(built)


def build_stage(
    topology: Topology,
    info: StageInfo,
    groups: Groups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    given: nn.Module | None = None,
) -> StageModule:
    """Build a stage that computes in `dtype`, with its initial weights; what the plan freezes takes no gradient.

    The weights are not rounded below fp32 yet: ``stage.to(dtype)`` does that. The network may be `given` instead
    of built (`OwnNetwork`, `HostNetwork`): it is moved to the device, and begins on every data lane with the
    weights that the first lane has. `StageModule.info` of such a stage tells of the parameters that it has.
    """
    module = topology.modules[info.stage.module]
    written = topology.spec.modules[module.name]
    stage = _stage(topology, info, groups, device=device, dtype=dtype, given=given)
    stage.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    held = module.held(stage.info, _ep(groups))
    _check(stage, held, groups)
    weights = named_weights(stage)
    if not isinstance(stage, HostStage):
        initialize(weights, held, seed=topology.spec.seed, module=module.name, groups=groups)
    trainable = stage.info.trainable
    if UNKNOWN in trainable:  # The names of an own module are known only now.
        _check_patterns(written, module.name, tuple(weights))
        trainable = trainable_names(written, tuple(weights))
        _check_groups(topology.spec.optimizer, module.name, tuple(weights))
    for name, weight in weights.items():
        weight.requires_grad_(name in trainable)
    if given is not None:
        _begin_alike(stage, given, groups)
    return stage


def _stage(
    topology: Topology,
    info: StageInfo,
    groups: Groups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    given: nn.Module | None,
) -> StageModule:
    """Return a stage of the network given, or of the layers of its engine, wherever torch allocates them."""
    module, spec = topology.modules[info.stage.module], topology.spec
    written = spec.modules[module.name]
    if isinstance(module.model, Own):
        own = given
        if own is None:
            own = _own_network(module.model, written.options, seed=spec.seed, module=module.name)
        return OwnStage(module, info, own, dtype=dtype)
    if given is not None:
        return HostStage(topology, module, info, given, tp=groups.tp.size(), dtype=dtype)
    choice = choose(module.name, spec, missing=engine.missing(device))
    context = _Context(module, info, groups, written.recompute, dtype, choice, written.fp8)
    if isinstance(module.model, Gpt):
        return TextStage(context, module.model, sequence=topology.sequence)
    return RowsStage(context, module.model)


def _begin_alike(stage: StageModule, given: nn.Module, groups: Groups) -> None:
    """Give all copies of a weight the values of the first: along dp, along tp where it is whole, at both ends."""
    for tensor in (*given.parameters(), *given.buffers()):
        dist.broadcast(tensor.detach(), group=groups.dp, group_src=0)
    weights = named_weights(stage)
    for parameter in stage.info.parameters:
        if parameter.name in weights and parameter.tp_dim is None:
            dist.broadcast(weights[parameter.name].detach(), group=groups.tp, group_src=0)
        if parameter.copy is not None and stage.info.first != stage.info.last:
            dist.broadcast(weights[parameter.name].detach(), group=groups.tie, group_src=0)


def _check_patterns(written: ModuleSpec, module: str, names: tuple[str, ...]) -> None:
    """Every pattern for an own module must match one of its parameters, as legality asks of built-in ones."""
    frozen = written.frozen if isinstance(written.frozen, tuple) else ()
    for key, patterns in (("frozen", frozen), ("trainable", written.trainable or ())):
        for pattern in patterns:
            if not any(matches_any(name, (pattern,)) for name in names):
                fact = f"the pattern '{pattern}' matches no parameter of module '{module}'."
                raise PlanError([Problem(f"modules.{module}.{key}", fact, nearest(pattern, names))])


def _check_groups(optimizer: OptimizerSpec, module: str, names: tuple[str, ...]) -> None:
    """A pattern that is meant for an own module alone must match one of its parameters."""
    for i, group in enumerate(optimizer.groups):
        for pattern in group.match:
            is_meant = group.modules == (module,) or pattern.startswith(f"{module}.")
            alone = GroupSpec(modules=group.modules, match=(pattern,))
            if is_meant and not any(matches(alone, module, name) for name in names):
                fact = f"the pattern '{pattern}' matches no parameter of module '{module}'."
                remedy = nearest(pattern, tuple(f"{module}.{name}" for name in names))
                raise PlanError([Problem(f"optimizer.groups[{i}].match", fact, remedy)])


def _ep(groups: Groups) -> int:
    """This rank's position along ep."""
    return groups.together.rank() // groups.expert_tp.size()


def _check(stage: StageModule, held: Sequence[Parameter], groups: Groups) -> None:
    """The table of the core and what was built are the same."""
    planned = {p.name: shard_shape(p, tp_size=cut_over(p, groups).size()) for p in held}
    built = {_weight_name(stage, name): tuple(w.shape) for name, w in stage.named_parameters()}
    if isinstance(stage, OwnStage):  # The table holds its projectors only.
        built = {name: shape for name, shape in built.items() if name in planned}
    assert built == planned, sorted(set(built.items()) ^ set(planned.items()))


# -- built-in models ---------------------------------------------------------------------------------------


@attrs.frozen
class _Context:
    """What a stage of a built-in model is built for."""

    module: Module
    info: StageInfo
    groups: Groups
    recompute: str
    dtype: torch.dtype
    layers: Choice
    fp8: str


def _expert_mlps(context: _Context, model: BuiltIn, ledger: Ledger) -> list[ExpertsSpec]:
    """Return what the MLPs of the layers are built from where they have experts; nothing where they are dense."""
    if not model.experts:
        return []
    groups, info = context.groups, context.info
    company = Company(
        together=groups.together,
        expert_tp=groups.expert_tp.size(),
        held=context.module.experts_at(_ep(groups)),
        same_tokens=groups.tp if groups.tp.size() > 1 and not context.module.sequence_parallel else None,
        same_samples=(groups.tp, groups.cp),
    )
    trained = {name.split(".mlp.")[0] for name in info.trainable if ".mlp." in name}
    return [
        experts_spec(model, company, trains=f"layers.{layer}" in trained, ledger=ledger)
        for layer in info.layers
    ]


def _block_spec(context: _Context, model: BuiltIn, ledger: Ledger) -> Any:
    layers = len(context.info.layers)
    if context.layers.engine == TRANSFORMER_ENGINE:
        return engine.engine_spec(model, layers=layers)
    mlps = _expert_mlps(context, model, ledger)
    return block_spec(model, layers=layers, tp=context.groups.tp.size(), ledger=ledger, mlps=mlps)


class TransformerStage(StageModule):
    """What the stages of all built-in models share: a stack of layers on a packed block."""

    def __init__(self, context: _Context, model: BuiltIn) -> None:
        groups = context.groups
        super().__init__(context.module, context.info, dtype=context.dtype)
        self.tp, self.cp = groups.tp, groups.cp
        self.cut = ZigZag(groups.cp.rank(), groups.cp.size())
        self.sequence_parallel = context.module.sequence_parallel and groups.tp.size() > 1
        # What S must be a multiple of: its parts under sp, and two chunks of it under cp.
        self.multiple = (groups.tp.size() if self.sequence_parallel else 1) * len(self.cut.chunks)
        if context.fp8 != "none":
            self.multiple *= FP8_MULTIPLE
        self.layers_by = context.layers
        self.feeders = tuple(edge.source for edge in context.module.inputs)
        self.hidden = model.hidden
        self.dropout = model.dropout
        self.draws = model.dropout > 0
        self.dtype = context.dtype
        self.config = config_of(
            model,
            layers=len(context.info.layers),
            tp=groups.tp.size(),
            sequence_parallel=self.sequence_parallel,
            recompute=context.recompute,
            dtype=context.dtype,
            more=engine.config_of_fp8(context.fp8),
        )
        self.recomputes = context.recompute != "none" and bool(context.info.trainable)
        self.spec = _block_spec(context, model, self.ledger)
        self.aux_loss = context.module.aux_loss
        self.has_experts = bool(model.experts)
        self.deal = Deal(groups.tp.rank(), groups.tp.size(), by_position=self.sequence_parallel)
        self.collection = ProcessGroupCollection(
            tp=groups.tp, cp=groups.cp, dp=groups.dp, pp=groups.pp, embd=None
        )

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see the table at the top of this file."""
        packing = self.pack(share, next(iter(inputs.values())).device)
        first = self.info.first
        hidden_SBH = self.enter(inputs, share, packing) if first else inputs[self.name]
        hidden_SBH = self.decode(hidden_SBH, packing, share)
        aux = self.aux()
        if not self.info.last:
            return {self.name: hidden_SBH, **aux}
        rows_RH = hidden_SBH.flatten(0, 1).index_select(0, packing.outgoing)
        emitted = {target: self.join(rows, packing) for target, rows in self.emit(rows_RH).items()}
        return {**emitted, **self.finish(rows_RH, inputs, packing, share), **aux}

    @property
    def decoder(self) -> TransformerBlock:
        """The layers."""
        raise NotImplementedError

    def pack(self, share: Share, device: torch.device) -> Packing:
        """Return where the rows of a share lie."""
        raise NotImplementedError

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return the block that the first layer reads."""
        raise NotImplementedError

    def finish(
        self, rows_RH: Tensor, inputs: Mapping[str, Tensor], packing: Packing, share: Share
    ) -> dict[str, Tensor]:
        """Return what a last stage gives besides rows: a loss, or what the loss would judge."""
        raise NotImplementedError

    # Every cp rank has all of what comes in and goes out, and computes with a part of its own only.

    def take(self, rows_RH: Tensor, packing: Packing) -> Tensor:
        """Return which of the incoming rows are this rank's; their gradients meet again on every cp rank."""
        if packing.portion is None:
            return rows_RH
        rows_RH = copy_to_tensor_model_parallel_region(rows_RH, group=self.cp)
        return rows_RH.index_select(0, packing.portion.incoming)

    def take_target(self, target: Tensor, packing: Packing) -> Tensor:
        """Return which of the targets (one for each emitted row) are for this rank's rows."""
        return target if packing.portion is None else target.index_select(0, packing.portion.outgoing)

    def join(self, rows: Tensor, packing: Packing) -> Tensor:
        """Return the rows of all cp ranks in the share's order; each gets the gradient of its own ones."""
        portion = packing.portion
        if portion is None or not portion.most:
            return rows
        rows = functional.pad(rows, (0, 0, 0, portion.most - len(rows)))
        rows = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=self.cp)
        return rows.index_select(0, portion.order)

    def aux(self) -> dict[str, Tensor]:
        """Return this rank's term of the auxiliary loss in the last forward, if the module has one."""
        terms = [layer.mlp.aux for layer in self.decoder.layers] if self.aux_loss and self.training else []
        return {aux_name(self.name): torch.stack(terms).sum()} if terms else {}

    def decode(self, hidden_SBH: Tensor, packing: Packing, share: Share) -> Tensor:
        """Run the layers. Under sequence parallelism each tp rank holds a part of S between the linears."""
        positions, samples = packing.positions, packing.samples
        pads = packing.padded != (positions, samples)
        if pads:
            more_S, more_B = packing.padded[0] - positions, packing.padded[1] - samples
            hidden_SBH = functional.pad(hidden_SBH, (0, 0, 0, more_B, 0, more_S))
        if self.sequence_parallel:
            hidden_SBH = scatter_to_sequence_parallel_region(hidden_SBH, group=self.tp)
        if self.recomputes and torch.is_grad_enabled() and not hidden_SBH.requires_grad:
            # Re-entrant recomputation gives no gradients at all where its input needs none.
            hidden_SBH = hidden_SBH.detach().requires_grad_()
        routed = {}
        if self.has_experts:
            routed["padding_mask"] = packing.tokens  # See `Experts.forward`.
            for layer in self.decoder.layers:
                layer.mlp.scale = self.loss_scale * self.aux_loss / share.total
        hidden_SBH = self.decoder(hidden_states=hidden_SBH, attention_mask=packing.mask, **routed)
        if self.sequence_parallel:
            # What follows is computed alike on every tp rank, so its gradient is cut, not summed.
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self.tp
            )
        return hidden_SBH[:positions, :samples] if pads else hidden_SBH

    def block_of(self, rows_RH: Tensor, entries: Tensor, packing: Packing) -> Tensor:
        """Return the block [S, B, H] with rows at their entries and zeros elsewhere."""
        block = rows_RH.new_zeros(packing.positions * packing.samples, self.hidden)
        return block.index_copy_(0, entries, rows_RH).view(packing.positions, packing.samples, self.hidden)


class TextStage(TransformerStage):
    """A stage of a `gpt`."""

    def __init__(self, context: _Context, model: Gpt, *, sequence: int) -> None:
        super().__init__(context, model)
        info = context.info
        self.sequence = sequence
        self.tied = model.tied_embeddings
        self.network = GPTModel(
            self.config,
            self.spec,
            vocab_size=model.vocab,
            max_sequence_length=sequence,
            pre_process=info.first,
            post_process=info.last,
            share_embeddings_and_output_weights=self.tied,
            position_embedding_type="none",  # The core attention turns what it gets.
            scatter_embedding_sequence_parallel=False,  # Rows are put among the tokens first.
            pg_collection=self.collection,
        )
        assert len(self.decoder.layers) == len(info.layers)
        # Hidden states are an argument here, not state that `set_input_tensor` leaves behind.
        self.decoder.pre_process = True
        if info.last and self.sequence_parallel:
            # The output projection reads whole rows (see `decode`), not a part of the positions.
            self.network.output_layer.sequence_parallel = False
            self.network.output_layer.allreduce_dgrad = True

    @property
    def decoder(self) -> TransformerBlock:
        """The layers."""
        return self.network.decoder

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        name = layout_name(built.removeprefix("network."), self.info.layers)
        return "embedding.weight" if self.tied and name == "output.weight" else name

    def pack(self, share: Share, device: torch.device) -> Packing:
        """Return where the rows of a share lie."""
        return pack_text(
            share, sequence=self.sequence, multiple=self.multiple, device=device, cut=self.cut, deal=self.deal
        )

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return token embeddings with the feeders' rows at their placeholders."""
        tokens_T = inputs["tokens"]
        if tokens_T.device.type == "cpu":
            check_placeholders(tokens_T, share, packing)
        text_T = tokens_T.index_select(0, packing.text_tokens)
        text_TH = self.network.embedding.word_embeddings(text_T)
        text_TH = functional.dropout(text_TH, self.dropout, training=self.training and self.draws)
        rows = [self.take(_joined(inputs, self.feeders), packing)] if self.feeders else []
        return self.block_of(torch.cat([*rows, text_TH]), packing.incoming, packing)

    def finish(
        self, rows_RH: Tensor, inputs: Mapping[str, Tensor], packing: Packing, share: Share
    ) -> dict[str, Tensor]:
        """Return the loss, or the logits."""
        output = self.network.output_layer
        weight = self.network.shared_embedding_or_output_weight() if self.tied else output.weight
        logits_TV = self.ledger.multiply(lambda weight: output(rows_RH, weight=weight)[0], weight, rows_RH)
        if "labels" not in inputs:
            logits_TV = gather_from_tensor_model_parallel_region(logits_TV, group=self.tp)
            return {"logits": self.join(logits_TV, packing)}
        labels_T = self.take_target(inputs["labels"], packing)
        weights_T = self.take_target(inputs["loss_weights"], packing)
        return {"loss": self.loss(Predictions(logits_TV, labels_T, weights_T, share, self.tp))}


class RowsStage(TransformerStage):
    """A stage of a `vit`, a `block` or a `regressor`."""

    def __init__(self, context: _Context, model: Vit | Block | Regressor) -> None:
        super().__init__(context, model)
        info = context.info
        self.network = TransformerBlock(
            self.config, self.spec, post_process=info.last, pg_collection=self.collection
        )
        assert len(self.decoder.layers) == len(info.layers)
        self.input: nn.Module = nn.Identity()
        self.output: nn.Linear | None = None
        if info.first and isinstance(model, Vit):
            assert model.features is not None
            self.input = Affine(model.features, model.hidden, dtype=context.dtype, ledger=self.ledger)
        if info.last and isinstance(model, Regressor):
            self.output = Affine(model.hidden, model.outputs, dtype=context.dtype, ledger=self.ledger)

    @property
    def decoder(self) -> TransformerBlock:
        """The layers."""
        return self.network

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        return layout_name(built.replace("network.", "decoder.", 1), self.info.layers)

    def pack(self, share: Share, device: torch.device) -> Packing:
        """Return where the rows of a share lie."""
        return pack_rows(
            share, multiple=self.multiple, dtype=self.dtype, device=device, cut=self.cut, deal=self.deal
        )

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return the incoming rows, sample by sample."""
        rows = _joined(inputs, self.feeders or ("rows",))
        rows_RH = self.input(self.take(rows, packing))
        return self.block_of(rows_RH, packing.incoming, packing)

    def finish(
        self, rows_RH: Tensor, inputs: Mapping[str, Tensor], packing: Packing, share: Share
    ) -> dict[str, Tensor]:
        """Return the sum of squared errors, or the prediction; nothing from an encoder."""
        if self.output is None:
            return {}
        prediction = self.output(rows_RH)
        if "targets" not in inputs:
            return {"prediction": self.join(prediction, packing)}
        return {"loss": squared_error_sum(prediction, self.take_target(inputs["targets"], packing))}


def _joined(inputs: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return inputs one after the other."""
    return inputs[names[0]] if len(names) == 1 else torch.cat([inputs[name] for name in names])


# -- modules of the user's ---------------------------------------------------------------------------------


class OwnStage(StageModule):
    """The only stage of a module of the user's. Whether it draws, only its author knows."""

    draws = True
    reads_entire = True

    def __init__(self, module: Module, info: StageInfo, network: nn.Module, *, dtype: torch.dtype) -> None:
        super().__init__(module, info, dtype=dtype)
        self.network = network
        self.dtype = dtype
        self.feeders = tuple(edge.source for edge in module.inputs)
        self.has_loss = module.model.has_loss
        self.width = module.model.hidden or next((edge.width for edge in self.edges), 0)

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        return built.removeprefix("network.")

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see `OwnNetwork`."""
        device = next(iter(inputs.values())).device
        told = {
            "lengths": share.lengths,
            **{f"lengths.{feeder}": share.rows[feeder] for feeder in self.feeders},
        }
        counts = {name: torch.tensor(c).to(device, non_blocking=True) for name, c in told.items()}
        given = self.network({**inputs, **counts})
        self._check(given, sum(share.lengths))
        rows = self.emit(given["rows"]) if self.edges else {}
        return rows | {name: tensor for name, tensor in given.items() if name != "rows"}

    def _check(self, given: Mapping[str, Tensor], count: int) -> None:
        """Other ranks wait for exactly what the plan says that comes from here."""
        wanted = ["rows"] * bool(self.edges) + ["loss"] * self.has_loss
        for name in wanted:
            if name not in given:
                raise WorldError(
                    f"module '{self.name}' returned {', '.join(given) or 'nothing'}, no '{name}'."
                )
        if self.edges and tuple(given["rows"].shape) != (count, self.width):
            raise WorldError(
                f"module '{self.name}' returned rows of shape {tuple(given['rows'].shape)}; "
                f"the plan is one row of width {self.width} for each that comes in, {(count, self.width)}."
            )
        if self.edges and given["rows"].dtype != self.dtype:
            raise WorldError(
                f"module '{self.name}' returned rows of {given['rows'].dtype}; the other end of its edges "
                f"expects {self.dtype}, the precision of the job."
            )
        if "loss" in given and not self.has_loss:
            raise WorldError(
                f"module '{self.name}' feeds others, so the plan gives it no loss; it returned one. "
                "Put the loss into a module of its own that this one feeds."
            )


class HostStage(StageModule):
    """A stage of a built-in module that a network of the host's computes; projections are the network's, too."""

    reads_entire = True

    def __init__(
        self,
        topology: Topology,
        module: Module,
        info: StageInfo,
        network: nn.Module,
        *,
        tp: int,
        dtype: torch.dtype,
    ) -> None:
        table: Mapping[str, Parameter] = network.table(info, tp=tp)  # type: ignore[operator]
        if len({edge.width for edge in module.outputs}) > 1:
            fact = (
                f"feeds {len(module.outputs)} modules of unlike widths; a host's network gives rows of one."
            )
            remedy = "Make them alike, or put the projections into modules between."
            raise PlanError([Problem(f"modules.{module.name}.feeds", fact, remedy)])
        known = tuple({parameter.name: parameter for parameter in table.values()}.values())
        _check_table(info, known)
        trainable = {
            table[built].name for built, weight in network.named_parameters() if weight.requires_grad
        }
        info = attrs.evolve(info, parameters=known, trainable=frozenset(trainable if info.trainable else ()))
        super().__init__(attrs.evolve(module, outputs=()), info, dtype=dtype)
        self._table = table
        assert not isinstance(module.model, Own)
        self.edges = module.outputs if info.last else ()
        self.network = network
        self.module = module
        self.sequence = topology.sequence
        self.dtype = dtype
        self.draws = module.model.dropout > 0

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        return self._table[built.removeprefix("network.")].name

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see `HostNetwork`."""
        network: Any = self.network
        if "labels" in inputs:
            network.loss = self.loss
        given = dict(network(inputs, share))
        for name, shape in self._planned(share).items():
            seen = (tuple(given[name].shape), given[name].dtype) if name in given else "nothing"
            if seen != (shape, self.dtype):
                raise WorldError(
                    f"the network that the host gave for '{self.info.stage}' returned {seen} for '{name}'; "
                    f"the plan is {(shape, self.dtype)}."
                )
        emitted = {edge.target: given["rows"] for edge in self.edges}
        return emitted | {name: tensor for name, tensor in given.items() if name != "rows"}

    def _planned(self, share: Share) -> dict[str, tuple[int, ...]]:
        """Other ranks wait for exactly these."""
        if self.info.last:
            return {"rows": (sum(share.lengths), self.edges[0].width)} if self.edges else {}
        hidden = self.module.model.hidden
        assert hidden is not None
        if isinstance(self.module.model, Gpt):
            return {self.name: (self.sequence // self.module.cp, len(share.samples), hidden)}
        present = [rows for rows in share.lengths if rows]
        positions = self.module.padded(max(present, default=0)) // self.module.cp
        return {self.name: (positions, len(present), hidden)}


def _check_table(info: StageInfo, known: Sequence[Parameter]) -> None:
    """A host's network has the layers that the plan gives the stage, and ties its ends where the plan does."""
    where = f"modules.{info.stage.module}"
    layers = sorted({parameter.layer for parameter in known if isinstance(parameter.layer, int)})
    if layers != list(info.layers):
        fact = f"the network that the host gave for '{info.stage}' has layers {layers}, the plan {[*info.layers]}."
        remedy = "Build it for this stage: as many layers, in as many stages, as the module has in the job."
        raise PlanError([Problem(where, fact, remedy)])
    ties = [any(parameter.copy for parameter in of) for of in (known, info.parameters)]
    if ties[0] != ties[1]:
        does, plans = ("ties" if each else "does not tie" for each in ties)
        fact = (
            f"the network that the host gave for '{info.stage}' {does} its embeddings, the plan {plans} them."
        )
        raise PlanError([Problem(where, fact, f"Set options.tied_embeddings = {str(ties[0]).lower()}.")])


def _own_network(model: Own, options: Any, *, seed: int, module: str) -> nn.Module:
    """Build a module of the user's with initial weights that follow from the seed and its name."""
    build = builders.find(model.path, where=f"modules.{module}.model").load()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(draw_bits(seed, module, "own") % 2**63)
        network = build(**options)
    assert isinstance(network, nn.Module), model.path
    return network
