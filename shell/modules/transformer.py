"""Transformer: the common part of the stages of all built-in models, a stack of layers on a packed row.

Every cp rank has all inputs and outputs, and computes its own part of the positions. Shapes are named as in
`interface`.
"""

import contextlib
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.job.layer_engines import TRANSFORMER_ENGINE, Choice
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.step.positions import rotary_positions
from mimogrid.core.step.seeds import SEEDS
from mimogrid.core.step.step import Share, aux_name
from mimogrid.core.topology.topology import Module, StageInfo
from mimogrid.shell.device.device import sent
from mimogrid.shell.megatron import draws, engine
from mimogrid.shell.megatron.cache import Cache, CachedRow
from mimogrid.shell.megatron.experts import ExpertGroups, Experts, ExpertsSpec, experts_spec
from mimogrid.shell.megatron.layers import block_spec, config_of
from mimogrid.shell.megatron.names import (
    ProcessGroupCollection,
    TransformerBlock,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from mimogrid.shell.megatron.rows import PackedRow
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.modules.interface import MadeCut, StageGroups, StageModule, ep_position
from mimogrid.shell.modules.packing import Packing, TokenSplit, pack


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


def _expert_mlps(context: Context, model: BuiltIn, weight_grads: WeightGradStore) -> dict[int, ExpertsSpec]:
    """Return the specifications of the MLPs that have experts, by layer."""
    if not model.experts:
        return {}
    groups, info = context.groups, context.info
    expert_groups = ExpertGroups(
        together=groups.together,
        expert_tp=groups.expert_tp.size(),
        held=context.module.experts_at(ep_position(groups)),
        same_tokens=groups.tp if groups.tp.size() > 1 and not context.module.sequence_parallel else None,
        same_samples=(groups.tp, groups.cp),
    )
    trained = {name.split(".mlp.")[0] for name in info.trainable if ".mlp." in name}
    return {
        layer: experts_spec(
            model, expert_groups, trains=f"layers.{layer}" in trained, weight_grads=weight_grads
        )
        for layer in info.layers
        if model.has_experts(layer)
    }


def _block_spec(context: Context, model: BuiltIn, weight_grads: WeightGradStore) -> Any:
    layers = context.info.layers
    if context.layers.engine == TRANSFORMER_ENGINE:
        return engine.engine_spec(model, layers=layers)
    mlps = _expert_mlps(context, model, weight_grads)
    return block_spec(model, layers=layers, tp=context.groups.tp.size(), weight_grads=weight_grads, mlps=mlps)


def _without_keys(grad: Tensor, *, group: int, width: int) -> Tensor:
    """Return the gradient of a fused bias, whose groups are queries, a key and a value, with zeros for the keys."""
    parts = grad.view(-1, group, width).clone()
    parts[:, -2] = 0
    return parts.view_as(grad)


def _cut(
    made: list[MadeCut], layer: int, _module: object, _arguments: object, output: tuple[Tensor, object]
) -> tuple[Tensor, object]:
    """Cut before a layer: give it what the layer below gives, without its history."""
    hidden, context = output
    if not hidden.requires_grad:
        return output
    made.append(MadeCut(layer, hidden, hidden.detach().requires_grad_()))
    return made[-1].leaf, context


class TransformerStage(StageModule):
    """A stage of a built-in model: a stack of layers on a packed row."""

    def __init__(self, context: Context, model: BuiltIn) -> None:
        groups = context.groups
        super().__init__(context.module, context.info, dtype=context.dtype)
        self.model = model
        self.tp, self.cp = groups.tp, groups.cp
        self.cut = ZigZag(groups.cp.rank(), groups.cp.size())
        self.sequence_parallel = context.module.sequence_parallel and groups.tp.size() > 1
        self.layers_by = context.layers
        self.feeders = tuple(edge.source for edge in context.module.inputs)
        self.hidden = model.hidden
        self.dropout = model.dropout
        self.drops = model.dropout > 0 or (
            context.module.lora is not None and context.module.lora.dropout > 0
        )
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
        self.token_split = TokenSplit(groups.tp.rank(), groups.tp.size(), by_position=self.sequence_parallel)
        self.collection = ProcessGroupCollection(
            tp=groups.tp, cp=groups.cp, dp=groups.dp, pp=groups.pp, embd=None
        )

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see the table of `interface`."""
        packing = pack(
            share,
            length=share.shape[0] // self.cut.size,
            device=next(iter(inputs.values())).device,
            cut=self.cut,
            token_split=self.token_split,
            positions=rotary_positions(self.model, share),
            finer=tuple(self.segmentations(share).items()),
        )
        if self.drops and self.training:
            packing = attrs.evolve(packing, row=self.drawing(packing, share))
        if self.cache is not None:
            packing = attrs.evolve(packing, row=self.continued(packing, share, self.cache))
        deep: Sequence[Tensor] = ()
        if self.info.first:
            hidden_S1H, deep = self.enter(inputs, share, packing), self.deepstack(inputs, packing)
        else:
            hidden_S1H = inputs[self.name]
        hidden_S1H = self.decode(hidden_S1H, packing, share, deep)
        aux = self.aux()
        if not self.info.last:
            return {self.name: hidden_S1H, **aux}
        return {**self.leave(hidden_S1H, inputs, share, packing), **aux}

    def drawing(self, packing: Packing, share: Share) -> PackedRow:
        """Return the row with the keys of its positions: of their samples, and of their places in these."""
        device = packing.sample_at.device
        ids = sent(torch.tensor([sample.id % SEEDS for sample in share.samples], dtype=torch.int64), device)
        step = torch.full_like(ids, self.draw_key)
        keys = draws.child(draws.child(step, ids).index_select(0, packing.sample_at), packing.place_at)
        parts = self.tp.size() if self.sequence_parallel else 1
        between = keys.chunk(parts)[self.tp.rank() if parts > 1 else 0]
        return attrs.evolve(packing.row, keys=keys, keys_between=between)

    def continued(self, packing: Packing, share: Share, cache: Cache) -> PackedRow:
        """Return the row behind what a cache has of its samples."""
        axes, samples = rotary_positions(self.model, share), tuple(sample.id for sample in share.samples)
        before = [cache.ends.get(sample, 0) for sample in samples]
        ends = itertools.accumulate(share.positions)
        for sample, start, end, count in zip(samples, before, ends, share.positions, strict=True):
            within = 1 + max(max(axis[end - count : end]) for axis in axes) if axes else count
            cache.ends[sample] = start + within
        offsets = sent(torch.tensor(before), packing.sample_at.device).index_select(0, packing.sample_at)
        row = packing.row
        cached = CachedRow(cache, samples, share.positions)
        return attrs.evolve(row, positions=row.positions + offsets, cached=cached)

    @property
    def decoder(self) -> TransformerBlock:
        """The stack of layers."""
        raise NotImplementedError

    @contextlib.contextmanager
    def cut_before(self, layers: Collection[int]) -> Iterator[list[MadeCut]]:
        """Cut a forward that runs while this is open before layers of the module; the last layer + 1 is its end.

        Nothing is cut where hidden states need no gradient, or where layers are recomputed together.
        """
        made: list[MadeCut] = []
        handles = [
            self.decoder.layers[layer - 1 - self.info.layers.start].register_forward_hook(
                functools.partial(_cut, made, layer)
            )
            for layer in layers
        ]
        try:
            yield made
        finally:
            for handle in handles:
                handle.remove()

    def deepstack(self, inputs: Mapping[str, Tensor], packing: Packing) -> Sequence[Tensor]:
        """Return the rows [S, 1, H] that the first layers add to their outputs, one for each of these layers."""
        return ()

    def segmentations(self, share: Share) -> Mapping[str, tuple[int, ...]]:
        """Return by name the lengths of segments that are finer than those of the share."""
        return {}

    def without_key_bias(self) -> None:
        """Give the biases of keys no gradient if the model has none: their rows of the fused bias stay zero."""
        if self.model.k_bias or not self.model.qkv_bias:
            return
        group = self.model.heads // self.model.kv_heads + 2
        for layer in self.decoder.layers:
            layer.self_attention.linear_qkv.bias.register_hook(
                functools.partial(_without_keys, group=group, width=self.model.head_width)
            )

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return the row [S, 1, H] that the first layer reads."""
        raise NotImplementedError

    def leave(
        self, hidden_S1H: Tensor, inputs: Mapping[str, Tensor], share: Share, packing: Packing
    ) -> dict[str, Tensor]:
        """Return the outputs of a last stage: rows for other modules, and what `finish` makes of them."""
        rows_RH = hidden_S1H.flatten(0, 1).index_select(0, packing.outgoing)
        emitted = {target: self.join(rows, packing) for target, rows in self.emit(rows_RH).items()}
        return {**emitted, **self.finish(rows_RH, inputs, packing, share)}

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

    @property
    def experts(self) -> list[Experts]:
        """The MLPs that have experts."""
        return [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, Experts)]

    def aux(self) -> dict[str, Tensor]:
        """Return this rank's term of the auxiliary loss of the last forward, if the module has one."""
        experts = self.experts if self.aux_loss and self.training else ()
        terms = [mlp.aux for mlp in experts if mlp.aux is not None]
        return {aux_name(self.name): torch.stack(terms).sum()} if terms else {}

    def decode(
        self, hidden_S1H: Tensor, packing: Packing, share: Share, deep: Sequence[Tensor] = ()
    ) -> Tensor:
        """Run the layers. Under sequence parallelism each tp rank holds a part of the row between the linears.

        `deep` has what the first layers add to their outputs.
        """
        if self.sequence_parallel:
            hidden_S1H, *deep = (
                scatter_to_sequence_parallel_region(row, group=self.tp) for row in (hidden_S1H, *deep)
            )
        if self.recomputes and torch.is_grad_enabled() and not hidden_S1H.requires_grad:
            # Re-entrant recomputation gives no gradients at all if its input needs none.
            hidden_S1H = hidden_S1H.detach().requires_grad_()
        for mlp in self.experts:
            mlp.scale = self.loss_scale * self.aux_loss / share.total
        hidden_S1H = self.decoder(
            hidden_states=hidden_S1H, attention_mask=None, packed_seq_params=packing.row, attention_bias=deep
        )
        return self.complete(hidden_S1H)

    def complete(self, hidden_S1H: Tensor) -> Tensor:
        """Return the row of all tp ranks, behind a layer."""
        if not self.sequence_parallel:
            return hidden_S1H
        # Every tp rank computes the same from here on, so the gradient is cut, not summed.
        whole: Tensor = gather_from_sequence_parallel_region(
            hidden_S1H, tensor_parallel_output_grad=False, group=self.tp
        )
        return whole

    def row_of(self, rows_RH: Tensor, packing: Packing) -> Tensor:
        """Return the row [S, 1, H] with the first of what comes in at its entries, and zeros elsewhere."""
        row, entries = rows_RH.new_zeros(packing.length, self.hidden), packing.incoming
        return row.index_copy_(0, entries[: len(rows_RH)], rows_RH)[:, None]
