"""A stage of Megatron's `GPTModel` as a stage of a job.

The model computes as usual. This wrapper puts rows and tokens into their places in the model's block, and computes the
loss. Between stages every tp rank has whole hidden states: under Megatron's sequence parallelism the wrapper splits the
positions before the model and gathers them after it.

The loss is the job's: cross entropy in the precision of the logits, a weighted sum and not a mean. Megatron's loss
rounds to fp32 and divides by counts of one rank.

Shapes in names: S positions, B samples, H hidden, T tokens, R rows, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from mimogrid.adapters.megatron.experts import Balance, aux_weight, expert_layers, unable_experts
from mimogrid.adapters.megatron.parameters import table_of
from mimogrid.adapters.megatron.readings import Reader, Reading, hidden_of
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.zigzag import WHOLE, ZigZag
from mimogrid.core.job.models import Parameter
from mimogrid.core.step.step import Share, aux_name
from mimogrid.core.topology.topology import Module, StageInfo, Topology
from mimogrid.shell.megatron.attention import CoreAttention
from mimogrid.shell.megatron.names import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from mimogrid.shell.modules.block import Block, block_of_text
from mimogrid.shell.modules.loss import Loss, Predictions, weighted_cross_entropy
from mimogrid.shell.modules.packing import TokenSplit


class LanguageStage(nn.Module):
    """A stage of a `GPTModel` as a stage of the job's `gpt` with this name (a `shell.modules.interface.HostNetwork`).

    `rank` is the rank in the job. `aux_scale` is the factor of this rank's term of the auxiliary loss. A model with
    mrope needs `readings` before each step.
    """

    aux_scale = 0.0
    readings: Mapping[int, Reading] = {}
    """What is read of each sample beside its tokens, by its place in the step."""

    def __init__(self, model: nn.Module, *, topology: Topology, name: str, rank: int) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.sequence = topology.sequence
        self.loss: Loss = weighted_cross_entropy
        gpt: Any = model
        module = topology.modules[name]
        self.tp: dist.ProcessGroup = gpt.pg_collection.tp
        self.cp: dist.ProcessGroup = gpt.pg_collection.cp
        self.cut = ZigZag(self.cp.rank(), self.cp.size()) if self.cp.size() > 1 else WHOLE
        self.reader = _reader_of(gpt)
        self.sequence_parallel: bool = gpt.config.sequence_parallel and self.tp.size() > 1
        self.token_split = TokenSplit(self.tp.rank(), self.tp.size(), by_position=self.sequence_parallel)
        samples = topology.samples_per_microbatch[name]
        problems = list(_unable(gpt, module, self.sequence))
        problems += unable_experts(gpt, module, module.position(rank), samples)
        if problems:
            raise PlanError(problems)
        routers = [layer.router for layer in expert_layers(model).values()]
        # Also in a frozen module, for which the job has no such loss: Megatron would compute its own.
        self._balances = [Balance(router) for router in routers] if aux_weight(gpt.config) else []

    def table(self, info: StageInfo, *, tp: int, expert_tp: int) -> Mapping[str, Parameter]:
        """Return the description of each parameter; see `table_of`."""
        gpt: Any = self.model
        tied = gpt.share_embeddings_and_output_weights
        table = table_of(self.model, info, tp=tp, expert_tp=expert_tp, tied=tied)
        return {f"model.{key}": parameter for key, parameter in table.items()}

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> Mapping[str, Tensor]:
        """Compute the stage; see the table in `shell.modules.interface`."""
        gpt: Any = self.model
        device = next(iter(inputs.values())).device
        block = block_of_text(share, device=device, cut=self.cut, token_split=self.token_split)
        hidden_SBH = self._embedded(inputs, share, block) if gpt.pre_process else inputs[self.name]
        if self.sequence_parallel:
            hidden_SBH = scatter_to_sequence_parallel_region(hidden_SBH, group=self.tp)
        if not gpt.pre_process:
            gpt.set_input_tensor(hidden_SBH)
        said: Tensor = gpt(
            input_ids=None,
            position_ids=self._turned(share, device) if self.reader.is_turned else None,
            attention_mask=self._hidden(share, device),
            decoder_input=hidden_SBH if gpt.pre_process else None,
            **self._padding(block, device),
        )
        gpt.set_input_tensor(None)
        aux = self._aux()
        if gpt.post_process:
            return {**self._judged(said.transpose(0, 1), inputs, block, share), **aux}
        if self.sequence_parallel:
            said = gather_from_sequence_parallel_region(
                said, tensor_parallel_output_grad=False, group=self.tp
            )
        return {self.name: said, **aux}

    def _turned(self, share: Share, device: torch.device) -> Tensor:
        """Return the position ids [3, B, S] of a share, of all cp ranks. Raises PlanError where there are none."""
        turns = [self.readings.get(sample.id, Reading()).turn for sample in share.samples]
        known = [turn for turn in turns if turn is not None]
        if len(known) < len(turns):
            fact = "turns by mrope, and this rank has no position_ids for its samples."
            remedy = "Give position_ids [3, B, S] to forward steps on every rank of the language model."
            raise PlanError([Problem(f"modules.{self.name}", fact, remedy)])
        of = [nn.functional.pad(turn, (0, share.shape[0] - turn.shape[1])) for turn in known]
        return torch.stack(of, dim=1).to(device)

    def _hidden(self, share: Share, device: torch.device) -> Tensor | None:
        """Return the mask [B, 1, S, S] of a share; None if all of it is causal."""
        read = [self.readings.get(sample.id, Reading()) for sample in share.samples]
        return hidden_of(read, share.shape[0], device)

    def _padding(self, block: Block, device: torch.device) -> Mapping[str, Tensor]:
        """Return the mask [B, S] of positions without a token, for routers with an auxiliary loss."""
        if not self._balances:
            return {}
        for balance in self._balances:
            balance.scale = self.aux_scale
        parts = self.tp.size() if self.sequence_parallel else 1
        padding = torch.ones(block.positions // parts * block.samples, dtype=torch.bool, device=device)
        padding[block.tokens] = False
        return {"padding_mask": padding.view(-1, block.samples).transpose(0, 1)}

    def _aux(self) -> dict[str, Tensor]:
        """Return this rank's term of the auxiliary loss of the last forward."""
        terms = [balance.value for balance in self._balances if balance.value is not None]
        return {aux_name(self.name): torch.stack(terms).sum()} if terms and self.training else {}

    def _embedded(self, inputs: Mapping[str, Tensor], share: Share, block: Block) -> Tensor:
        """Return [S, B, H]: embeddings of the text, and rows of the feeders at their placeholders."""
        gpt: Any = self.model
        text_T = inputs["tokens"].index_select(0, block.text_tokens)
        entries = block.incoming[len(block.incoming) - len(text_T) :]
        positions_T = self._positions(entries.device).index_select(0, entries // block.samples)
        text_TH: Tensor = gpt.embedding(input_ids=text_T[None], position_ids=positions_T[None]).squeeze(1)
        rows = [inputs[feeder] for feeder in share.rows]
        if rows and block.portion is not None:
            rows_RH = copy_to_tensor_model_parallel_region(torch.cat(rows), group=self.cp)
            rows = [rows_RH.index_select(0, block.portion.incoming)]
        hidden = text_TH.new_zeros(block.positions * block.samples, text_TH.shape[-1])
        hidden = hidden.index_copy(0, block.incoming, torch.cat([*rows, text_TH]))
        return hidden.view(block.positions, block.samples, -1)

    def _positions(self, device: torch.device) -> Tensor:
        """Return the positions of the sequence that this rank has, int64 [S]."""
        return torch.tensor(tuple(self.cut.positions(self.sequence)), dtype=torch.int64, device=device)

    def _judged(
        self, logits_SBV: Tensor, inputs: Mapping[str, Tensor], block: Block, share: Share
    ) -> dict[str, Tensor]:
        """Return the loss, or without labels the logits [T, V] of all tokens."""
        logits_TV = logits_SBV.flatten(0, 1).index_select(0, block.outgoing)
        portion = block.portion
        if "labels" in inputs:
            labels_T, weights_T = inputs["labels"], inputs["loss_weights"]
            if portion is not None:
                labels_T, weights_T = (t.index_select(0, portion.outgoing) for t in (labels_T, weights_T))
            return {"loss": self.loss(Predictions(logits_TV, labels_T, weights_T, share, self.tp))}
        logits_TV = gather_from_tensor_model_parallel_region(logits_TV, group=self.tp)
        if portion is not None and portion.most:
            logits_TV = nn.functional.pad(logits_TV, (0, 0, 0, portion.most - len(logits_TV)))
            logits_TV = gather_from_sequence_parallel_region(logits_TV, group=self.cp)
            logits_TV = logits_TV.index_select(0, portion.order)
        return {"logits": logits_TV}


def _reader_of(gpt: Any) -> Reader:
    """Return what a `GPTModel` reads of samples beside their tokens."""
    attentions = [part.core_attention for part in gpt.modules() if isinstance(part, Attention)]
    others = sorted({type(core).__name__ for core in attentions if not _reads_masks(core)})
    return Reader(
        is_turned=gpt.position_embedding_type == "mrope",
        learns_positions=gpt.position_embedding_type == "learned_absolute",
        causal_only=f"Megatron's attentions differ in whether they read masks ({', '.join(others)})"
        if others
        else "",
    )


def _reads_masks(core: nn.Module) -> bool:
    """Whether a causal attention reads a mask in place of causality: ours, and Megatron's where nothing is fused."""
    if isinstance(core, DotProductAttention):
        return not core.config.masked_softmax_fusion and core.config.window_size is None
    return isinstance(core, CoreAttention)


def _unable(gpt: Any, module: Module, sequence: int) -> Iterator[Problem]:
    """Yield why a `GPTModel` cannot run in a job's program."""
    where = f"modules.{module.name}"
    tp = gpt.pg_collection.tp.size()
    config = gpt.config
    cp = gpt.pg_collection.cp.size()
    if cp > 1 and any(isinstance(part, DotProductAttention) for part in gpt.modules()):
        fact = f"attends to the positions of one of cp={cp} ranks only (DotProductAttention)."
        yield Problem(
            where, fact, "Use an attention that has context parallelism, such as that of layer_spec."
        )
    if config.mtp_num_layers:
        fact = (
            "predicts several tokens at once from input_ids, and a MimoModel gives its language model none."
        )
        yield Problem(where, fact, "Leave mtp_num_layers out.")
    if cp > 1 and gpt.position_embedding_type == "mrope":
        fact = (
            f"turns by mrope, and cuts positions over cp={cp}: Megatron's angles are those of all positions."
        )
        yield Problem(where, fact, "Use cp = 1 for this model.")
    if tp > 1 and not gpt.parallel_output:
        yield Problem(
            where, "gathers its logits.", "Leave parallel_output at True; the loss is cut as they are."
        )
    scatters = gpt.pre_process and getattr(gpt.embedding, "scatter_to_sequence_parallel", False)
    if tp > 1 and config.sequence_parallel and scatters:
        fact = "cuts the embeddings of text before rows are put among them."
        yield Problem(where, fact, "Build it with scatter_embedding_sequence_parallel=False.")
    parts = (tp if config.sequence_parallel else 1) * (2 * cp if cp > 1 else 1)
    if sequence % parts:
        fact = f"cuts sequences of {sequence} positions over tp={tp} and cp={cp}: not a multiple of {parts}."
        yield Problem("data.options.sequence", fact, f"Set sequence = {-(-sequence // parts) * parts}.")
    if sequence > gpt.max_sequence_length:
        fact = f"has {gpt.max_sequence_length} positions, the job sequences of {sequence}."
        yield Problem(where, fact, f"Build it with max_sequence_length={sequence}, or shorten the sequence.")
