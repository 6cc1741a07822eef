"""Megatron's networks as stages of a job: what its program calls in place of those that it would build itself.

A `GPTModel` that was built for a stage, or a modality of a `MimoModel`, computes what it always does; around it
are the places of rows and tokens in its block, and the loss. Between stages of a module, hidden states are whole
on every tensor-parallel rank: under Megatron's sequence parallelism a network takes its part of the positions and
gives all of them back.

The loss is ours: cross entropy in the precision of the logits, summed with its weights and never averaged.
Megatron's own rounds to fp32, and divides by counts of one rank.

Parameters go by the names that they have in a model of one stage: layers are counted through the module. How each
is cut is read from the marks that megatron-core leaves on them (`tensor_model_parallel`, `partition_dim`,
`sequence_parallel`).

Shapes in names: S positions, B samples, H hidden, T tokens, R rows, V vocabulary.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from mimogrid.core.errors import PlanError, Problem
from mimogrid.core.models import FIRST, LAST, Parameter
from mimogrid.core.roles import ModuleStageInfo
from mimogrid.core.steps import Share
from mimogrid.core.topology import StageInfo
from mimogrid.core.zigzag import WHOLE, ZigZag
from mimogrid.shell.loss import cross_entropy_sum
from mimogrid.shell.megatron import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from mimogrid.shell.packing import Packing, check_placeholders, pack_rows, pack_text


Arrange = Callable[[Tensor | None, Share], Mapping[str, Any]]
"""Rows [R, F] of a share, sample after sample, to the arguments of an encoder; None: to those of a later stage."""


def block_of(rows_RF: Tensor, share: Share) -> tuple[Tensor, Tensor | None]:
    """Return rows as a block [S, B, F] as long as the longest sample that has any, and its mask.

    The mask [B, 1, 1, S] is added to attention scores: minus infinity for what is padding; None: nothing is.
    """
    packing = pack_rows(share, multiple=1, dtype=rows_RF.dtype, device=rows_RF.device)
    block = rows_RF.new_zeros(packing.positions * packing.samples, rows_RF.shape[-1])
    block = block.index_copy(0, packing.incoming, rows_RF)
    return block.view(packing.positions, packing.samples, -1), packing.mask


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_IN_LAYER = re.compile(r"(.*\blayers)\.(\d+)(\..+)")


# -- parameters --------------------------------------------------------------------------------------------


def whole_names(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each key of a network's state dict with its name in a network of one stage.

    Megatron counts the layers of a stage from 0; each of them knows its number in the whole.
    """
    numbers = {
        name: layer.layer_number - 1
        for name, layer in network.named_modules()
        if hasattr(layer, "layer_number")
    }
    for key in network.state_dict():
        inside = _IN_LAYER.fullmatch(key)
        here = f"{inside[1]}.{inside[2]}" if inside else ""
        yield key, f"{inside[1]}.{numbers[here]}{inside[3]}" if inside and here in numbers else key


def table_of(network: nn.Module, info: StageInfo, *, tp: int, tied: bool = False) -> dict[str, Parameter]:
    """Return what the parameters of a network are, by their keys; see `shell.modules.HostNetwork.table`.

    Raises PlanError for a weight that is cut and lacks the marks that say how.
    """
    _check_marks(network, info, tp)
    names, found = dict(whole_names(network)), {}
    gated = {
        f"{name}.linear_fc1"
        for name, part in network.named_modules()
        if isinstance(part, MLP) and part.config.gated_linear_unit
    }
    for key, weight in network.named_parameters():
        name = names[key]
        copy = LAST if tied and name in (EMBEDDING, OUTPUT) else None
        inside = _IN_LAYER.fullmatch(name)
        marks: Any = weight
        dim: int | None = marks.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        found[key] = Parameter(
            name=EMBEDDING if copy else name,
            shape=tuple(size * tp if d == dim else size for d, size in enumerate(weight.shape)),
            layer=int(inside[2]) if inside else FIRST if info.first else LAST,
            tp_dim=dim,
            tp_blocks=2 if key.rpartition(".")[0] in gated else 1,
            partial=getattr(weight, "sequence_parallel", False),
            copy=copy,
        )
    return found


def _check_marks(network: nn.Module, info: StageInfo, tp: int) -> None:
    for name, module in network.named_modules():
        is_cut = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        weight = getattr(module, "weight", None)
        if tp > 1 and is_cut and weight is not None and not hasattr(weight, "partition_dim"):
            fact = f"'{name}.weight' of '{info.stage}' is cut over tp={tp} and does not say along which dim."
            remedy = (
                "Build it with perform_initialization=True: megatron-core marks weights as it draws them."
            )
            raise PlanError([Problem(f"modules.{info.stage.module}", fact, remedy)])


_WRAPPERS = re.compile(r"(?<![^.])module\.")
_STACKED = re.compile(r"(.*\blayers)\.(?!\d+\.)(.+)")
_LANGUAGE, _MODALITIES = "language_model.", "modality_submodules."


def to_job_state(state: Mapping[str, Tensor], language: str) -> dict[str, Tensor]:
    """Return what a `MimoModel`'s state dict holds of weights, as `Embedded.load_state_dict` takes them.

    `state` is that of the whole model: full tensors, layers counted from 0 to the last, as one process has them;
    or one tensor for all layers, the first dim counting them, as Megatron's distributed checkpoints keep them.
    `language` is what the job calls the language model. Wrappers in names (``module.``) are passed over.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _WRAPPERS.sub("", key)
        if not name.startswith((_LANGUAGE, _MODALITIES)) or not isinstance(tensor, Tensor):
            continue
        if name.startswith(_LANGUAGE):
            name = f"{language}.{name.removeprefix(_LANGUAGE)}"
        else:
            name = name.removeprefix(_MODALITIES)
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            found[name] = tensor
            continue
        found |= {f"{stacked[1]}.{i}.{stacked[2]}": layer for i, layer in enumerate(tensor)}
    return {name: tensor for name, tensor in found.items() if not name.endswith("_extra_state")}


def to_megatron_state(state: Mapping[str, Any], language: str, modules: Collection[str]) -> dict[str, Tensor]:
    """Return the weights in what `Embedded.state_dict` returned, by the names of a whole `MimoModel`."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, name = key.partition(".")
        if module in modules:
            head = _LANGUAGE if module == language else f"{_MODALITIES}{module}."
            found[f"{head}{name}"] = tensor
    return found


# -- the language model ------------------------------------------------------------------------------------


class LanguageStage(nn.Module):
    """A stage of a `GPTModel` as a stage of a `gpt` of a job (`shell.modules.HostNetwork`).

    `sequence` is the length of the job's sequences, `name` the module's in the job.
    """

    def __init__(self, model: nn.Module, *, sequence: int, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.sequence = sequence
        gpt: Any = model
        self.tp: dist.ProcessGroup = gpt.pg_collection.tp
        self.cp: dist.ProcessGroup = gpt.pg_collection.cp
        self.cut = ZigZag(self.cp.rank(), self.cp.size()) if self.cp.size() > 1 else WHOLE
        self.sequence_parallel: bool = gpt.config.sequence_parallel and self.tp.size() > 1
        problems = list(_unable(gpt, f"modules.{name}", sequence))
        if problems:
            raise PlanError(problems)

    def table(self, info: StageInfo, *, tp: int) -> Mapping[str, Parameter]:
        """Return what each parameter is; see `table_of`."""
        gpt: Any = self.model
        tied = gpt.share_embeddings_and_output_weights
        return {f"model.{key}": p for key, p in table_of(self.model, info, tp=tp, tied=tied).items()}

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> Mapping[str, Tensor]:
        """Compute the stage; see the table at the top of `shell.modules`."""
        gpt: Any = self.model
        device = next(iter(inputs.values())).device
        packing = pack_text(share, sequence=self.sequence, multiple=1, device=device, cut=self.cut)
        hidden_SBH = self._embedded(inputs, share, packing) if gpt.pre_process else inputs[self.name]
        if self.sequence_parallel:
            hidden_SBH = scatter_to_sequence_parallel_region(hidden_SBH, group=self.tp)
        if not gpt.pre_process:
            gpt.set_input_tensor(hidden_SBH)
        said: Tensor = gpt(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=hidden_SBH if gpt.pre_process else None,
        )
        gpt.set_input_tensor(None)
        if gpt.post_process:
            return self._judged(said.transpose(0, 1), inputs, packing)
        if self.sequence_parallel:
            said = gather_from_sequence_parallel_region(
                said, tensor_parallel_output_grad=False, group=self.tp
            )
        return {self.name: said}

    def _embedded(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return [S, B, H]: embeddings of the text, and the feeders' rows at their placeholders."""
        gpt: Any = self.model
        if inputs["tokens"].device.type == "cpu":
            check_placeholders(inputs["tokens"], share, packing)
        text_T = inputs["tokens"].index_select(0, packing.text_tokens)
        entries = packing.incoming[len(packing.incoming) - len(text_T) :]
        positions_T = self._positions(entries.device).index_select(0, entries // packing.samples)
        text_TH: Tensor = gpt.embedding(input_ids=text_T[None], position_ids=positions_T[None]).squeeze(1)
        rows = [inputs[feeder] for feeder in share.rows]
        if rows and packing.portion is not None:
            rows_RH = copy_to_tensor_model_parallel_region(torch.cat(rows), group=self.cp)
            rows = [rows_RH.index_select(0, packing.portion.incoming)]
        block = text_TH.new_zeros(packing.positions * packing.samples, text_TH.shape[-1])
        block = block.index_copy(0, packing.incoming, torch.cat([*rows, text_TH]))
        return block.view(packing.positions, packing.samples, -1)

    def _positions(self, device: torch.device) -> Tensor:
        """Return which position of the sequence each of this rank's is."""
        return torch.tensor(tuple(self.cut.positions(self.sequence)), dtype=torch.int64, device=device)

    def _judged(
        self, logits_SBV: Tensor, inputs: Mapping[str, Tensor], packing: Packing
    ) -> dict[str, Tensor]:
        """Return the weighted sum of cross entropies, or the logits of all tokens."""
        logits_TV = logits_SBV.flatten(0, 1).index_select(0, packing.outgoing)
        portion = packing.portion
        if "labels" in inputs:
            labels_T, weights_T = inputs["labels"], inputs["loss_weights"]
            if portion is not None:
                labels_T, weights_T = (t.index_select(0, portion.outgoing) for t in (labels_T, weights_T))
            return {"loss": cross_entropy_sum(logits_TV, labels_T, weights_T, self.tp)}
        logits_TV = gather_from_tensor_model_parallel_region(logits_TV, group=self.tp)
        if portion is not None and portion.most:
            logits_TV = nn.functional.pad(logits_TV, (0, 0, 0, portion.most - len(logits_TV)))
            logits_TV = gather_from_sequence_parallel_region(logits_TV, group=self.cp)
            logits_TV = logits_TV.index_select(0, portion.order)
        return {"logits": logits_TV}


def _unable(gpt: Any, where: str, sequence: int) -> Iterator[Problem]:
    """Say what a `GPTModel` cannot be in a job's program."""
    tp = gpt.pg_collection.tp.size()
    config = gpt.config
    if config.num_moe_experts:
        yield Problem(where, "has experts, which only the job's own networks have.", "Let the job build it.")
    if config.mtp_num_layers:
        yield Problem(where, "predicts several tokens at once.", "Leave mtp_num_layers out.")
    if config.virtual_pipeline_model_parallel_size:
        yield Problem(where, "is cut into virtual stages.", "Leave virtual_pipeline_model_parallel_size out.")
    if gpt.position_embedding_type == "mrope":
        yield Problem(
            where, "turns by mrope, whose positions a job does not know.", "Use rope, or learned ones."
        )
    if tp > 1 and not gpt.parallel_output:
        yield Problem(
            where, "gathers its logits.", "Leave parallel_output at True; the loss is cut as they are."
        )
    scatters = gpt.pre_process and getattr(gpt.embedding, "scatter_to_sequence_parallel", False)
    if tp > 1 and config.sequence_parallel and scatters:
        fact = "cuts the embeddings of text before rows are put among them."
        yield Problem(where, fact, "Build it with scatter_embedding_sequence_parallel=False.")
    if sequence > gpt.max_sequence_length:
        fact = f"has {gpt.max_sequence_length} positions, the job sequences of {sequence}."
        yield Problem(where, fact, f"Build it with max_sequence_length={sequence}, or shorten the sequence.")


# -- modalities --------------------------------------------------------------------------------------------


class ModalityNetwork(nn.Module):
    """A modality of Megatron's as a module of a job: hand it to `Embedded` under the module's name.

    Its encoder gets the rows of all samples, end to end, as `argument`, or whatever a function makes of them, and
    gives one row for each. In the job the module is one of the host's, as wide as the language model, or a `vit`:
    then the modality may be a stage of several (`stage`, `shell.modules.HostNetwork`). Its projection is its own.

    What an encoder returns with three dims is [S, B, H] from a `TransformerBlock` and where there are several
    stages, [B, S, H] otherwise. Rows leave it sample after sample: Megatron flattens both as they lie, and so gives
    samples each other's rows.
    """

    def __init__(
        self, modality: nn.Module, argument: str | Arrange, *, stage: ModuleStageInfo | None = None
    ) -> None:
        super().__init__()
        # Under its own name it would stand in the names of all parameters, which are to be Megatron's.
        self._modality = (modality,)
        for part, network in modality.named_children():
            self.add_module(part, network)
        self.argument = argument
        self.stage = stage or ModuleStageInfo("", 0, is_first_stage=True, is_last_stage=True, position={})
        parts: Any = modality
        problems = list(_unable_modality(parts, self.stage))
        if problems:
            raise PlanError(problems)
        (self._key,) = parts.encoders

    def table(self, info: StageInfo, *, tp: int) -> Mapping[str, Parameter]:
        """Return what each parameter is; see `table_of`."""
        return table_of(self._modality[0], info, tp=tp)

    def forward(self, inputs: Mapping[str, Tensor], share: Share | None = None) -> Mapping[str, Tensor]:
        """Return the projected rows, or hidden states; see `shell.modules.OwnNetwork` and `HostNetwork`."""
        first, last = self.stage.is_first_stage, self.stage.is_last_stage
        modality: Any = self._modality[0]
        encoder: Any = modality.encoders[self._key]
        said = (
            encoder(**self._arguments(inputs["rows"], share))
            if first
            else continued(
                self.stage.module, encoder, inputs[self.stage.module], self._arguments(None, share)
            )
        )
        if not last:
            return {self.stage.module: said}
        return {"rows": modality.project_embeddings([self._flat(said, share, encoder)], is_input=True)}

    def _arguments(self, rows_RF: Tensor | None, share: Share | None) -> Mapping[str, Any]:
        if isinstance(self.argument, str):
            return {} if rows_RF is None else {self.argument: rows_RF}
        assert share is not None, "a module of the host's gets its rows as one argument"
        return self.argument(rows_RF, share)

    def _flat(self, said: Tensor, share: Share | None, encoder: nn.Module) -> Tensor:
        """Return rows [R, H], sample after sample."""
        by_position = isinstance(encoder, TransformerBlock) or not self.stage.is_first_stage
        if said.dim() == _ROWS or not by_position:
            return said.reshape(-1, said.shape[-1])
        assert share is not None, "a module of the host's gives rows"
        packing = pack_rows(share, multiple=1, dtype=said.dtype, device=said.device)
        return said.flatten(0, 1).index_select(0, packing.outgoing)


_ROWS = 2
"""Dims of rows."""


def _unable_modality(modality: Any, stage: ModuleStageInfo) -> Iterator[Problem]:
    """Say what a modality cannot be in a job's program."""
    where = f"modules.{stage.module}"
    if len(modality.encoders) != 1:
        fact = f"has {len(modality.encoders)} encoders; of a job's module the rows go through one."
        yield Problem(where, fact, "Make each of them a module.")
        return
    (encoder,) = modality.encoders.values()
    cut = not (stage.is_first_stage and stage.is_last_stage)
    if cut and getattr(getattr(encoder, "config", None), "sequence_parallel", False):
        fact = "has several stages that hand on parts of the positions (sequence_parallel)."
        yield Problem(where, fact, "Use pp = 1, or sequence_parallel=False for this encoder.")


def continued(
    name: str, encoder: Any, hidden: Tensor | None, arguments: Mapping[str, Any] | None = None
) -> Tensor:
    """Run a later stage of an encoder on hidden states, which it takes as every stage of Megatron's does."""
    if not hasattr(encoder, "set_input_tensor"):
        raise TypeError(
            f"modality '{name}' is cut into stages, and {type(encoder).__name__} takes no hidden states. "
            "Give it set_input_tensor(hidden), or a grid with pp = 1."
        )
    encoder.set_input_tensor(hidden)
    given = {"hidden_states": None, "attention_mask": None, **(arguments or {})}
    return encoder(**given)  # type: ignore[no-any-return]
