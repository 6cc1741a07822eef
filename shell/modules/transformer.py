"""Transformer: the common part of the stages of all built-in models, a stack of layers on a packed block.

Every cp rank has all inputs and outputs, and computes its own part of the positions. Shapes are named as in
`interface`.
"""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.job.layer_engines import FP8_MULTIPLE, TRANSFORMER_ENGINE, Choice
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.step.step import Share, aux_name
from mimogrid.core.topology.topology import Module, StageInfo
from mimogrid.shell.megatron import engine
from mimogrid.shell.megatron.experts import ExpertGroups, ExpertsSpec, experts_spec
from mimogrid.shell.megatron.layers import block_spec, config_of
from mimogrid.shell.megatron.names import (
    ProcessGroupCollection,
    TransformerBlock,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.modules.interface import StageGroups, StageModule, ep_position
from mimogrid.shell.modules.packing import Packing, TokenSplit


@attrs.frozen
class Context:
    """What a stage of a built-in model is built from, besides its model."""

    module: Module
    info: StageInfo
    groups: StageGroups
    recompute: str
    dtype: torch.dtype
    layers: Choice
    fp8: str


def _expert_mlps(context: Context, model: BuiltIn, weight_grads: WeightGradStore) -> list[ExpertsSpec]:
    """Return the specifications of the layers' MLPs if these have experts; an empty list if they are dense."""
    if not model.experts:
        return []
    groups, info = context.groups, context.info
    expert_groups = ExpertGroups(
        together=groups.together,
        expert_tp=groups.expert_tp.size(),
        held=context.module.experts_at(ep_position(groups)),
        same_tokens=groups.tp if groups.tp.size() > 1 and not context.module.sequence_parallel else None,
        same_samples=(groups.tp, groups.cp),
    )
    trained = {name.split(".mlp.")[0] for name in info.trainable if ".mlp." in name}
    return [
        experts_spec(model, expert_groups, trains=f"layers.{layer}" in trained, weight_grads=weight_grads)
        for layer in info.layers
    ]


def _block_spec(context: Context, model: BuiltIn, weight_grads: WeightGradStore) -> Any:
    layers = context.info.layers
    if context.layers.engine == TRANSFORMER_ENGINE:
        return engine.engine_spec(model, layers=len(layers))
    mlps = _expert_mlps(context, model, weight_grads)
    return block_spec(model, layers=layers, tp=context.groups.tp.size(), weight_grads=weight_grads, mlps=mlps)


class TransformerStage(StageModule):
    """A stage of a built-in model: a stack of layers on a packed block."""

    def __init__(self, context: Context, model: BuiltIn) -> None:
        groups = context.groups
        super().__init__(context.module, context.info, dtype=context.dtype)
        self.tp, self.cp = groups.tp, groups.cp
        self.cut = ZigZag(groups.cp.rank(), groups.cp.size())
        self.sequence_parallel = context.module.sequence_parallel and groups.tp.size() > 1
        # The layers pad S to a multiple of this: tp parts under sp, and two chunks under cp.
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
        self.spec = _block_spec(context, model, self.weight_grads)
        self.aux_loss = context.module.aux_loss
        self.has_experts = bool(model.experts)
        self.token_split = TokenSplit(groups.tp.rank(), groups.tp.size(), by_position=self.sequence_parallel)
        self.collection = ProcessGroupCollection(
            tp=groups.tp, cp=groups.cp, dp=groups.dp, pp=groups.pp, embd=None
        )

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see the table of `interface`."""
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
        """The stack of layers."""
        raise NotImplementedError

    def pack(self, share: Share, device: torch.device) -> Packing:
        """Return the packing of a share."""
        raise NotImplementedError

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return the block [S, B, H] that the first layer reads."""
        raise NotImplementedError

    def finish(
        self, rows_RH: Tensor, inputs: Mapping[str, Tensor], packing: Packing, share: Share
    ) -> dict[str, Tensor]:
        """Return the outputs of a last stage besides rows: a loss, or without targets the predictions."""
        raise NotImplementedError

    def take(self, rows_RH: Tensor, packing: Packing) -> Tensor:
        """Return this rank's part of the incoming rows. Every cp rank gets the gradients of all rows."""
        if packing.portion is None:
            return rows_RH
        rows_RH = copy_to_tensor_model_parallel_region(rows_RH, group=self.cp)
        return rows_RH.index_select(0, packing.portion.incoming)

    def take_target(self, target: Tensor, packing: Packing) -> Tensor:
        """Return the targets of this rank's rows; there is one for each emitted row."""
        return target if packing.portion is None else target.index_select(0, packing.portion.outgoing)

    def join(self, rows: Tensor, packing: Packing) -> Tensor:
        """Return the rows of all cp ranks in the share's order. Each rank gets the gradients of its own rows."""
        portion = packing.portion
        if portion is None or not portion.most:
            return rows
        rows = functional.pad(rows, (0, 0, 0, portion.most - len(rows)))
        rows = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=self.cp)
        return rows.index_select(0, portion.order)

    def aux(self) -> dict[str, Tensor]:
        """Return this rank's term of the auxiliary loss of the last forward, if the module has one."""
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
            # Re-entrant recomputation gives no gradients at all if its input needs none.
            hidden_SBH = hidden_SBH.detach().requires_grad_()
        routed = {}
        if self.has_experts:
            routed["padding_mask"] = packing.tokens  # See `Experts.forward`.
            for layer in self.decoder.layers:
                layer.mlp.scale = self.loss_scale * self.aux_loss / share.total
        hidden_SBH = self.decoder(hidden_states=hidden_SBH, attention_mask=packing.mask, **routed)
        if self.sequence_parallel:
            # Every tp rank computes the same from here on, so the gradient is cut, not summed.
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self.tp
            )
        return hidden_SBH[:positions, :samples] if pads else hidden_SBH

    def block_of(self, rows_RH: Tensor, entries: Tensor, packing: Packing) -> Tensor:
        """Return a block [S, B, H] with rows at their entries, and zeros elsewhere."""
        block = rows_RH.new_zeros(packing.positions * packing.samples, self.hidden)
        return block.index_copy_(0, entries, rows_RH).view(packing.positions, packing.samples, self.hidden)
