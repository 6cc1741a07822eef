"""A modality of a `MimoModel` as a module of a job: its encoder over the rows of a microbatch, and its projection.

Shapes in names: S positions, B samples, H hidden, R rows, F features.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from megatron.core.models.vision.radio import RADIOViTModel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from mimogrid.adapters.megatron.parameters import table_of
from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.core.base.zigzag import WHOLE, ZigZag
from mimogrid.core.job.models import Parameter
from mimogrid.core.step.step import Share
from mimogrid.core.topology.roles import ModuleStageInfo
from mimogrid.core.topology.topology import StageInfo
from mimogrid.shell.megatron.attention import CoreAttention
from mimogrid.shell.megatron.names import gather_from_sequence_parallel_region
from mimogrid.shell.modules.block import Block, block_of_rows


Arrange = Callable[[Tensor | None, Share, ZigZag], Mapping[str, Any]]
"""A function from the rows [R, F] of a share, sample after sample, to the arguments of an encoder.

On a later stage the rows are None. The arguments have the positions of the block that this rank has under cp.
"""


def block_of(rows_RF: Tensor, share: Share, cut: ZigZag = WHOLE) -> tuple[Tensor, Tensor | None]:
    """Return rows as a block [S, B, F] that is as long as the longest sample, and its mask.

    The mask [B, 1, 1, keys] is added to attention scores: minus infinity for padding. It is None without padding. The
    keys are the positions of all cp ranks, rank after rank; S are the positions of this rank. A share without rows,
    which is computed if others share its experts, is a block of zeros that is not read.
    """
    packing = packed(share, cut, dtype=rows_RF.dtype, device=rows_RF.device)
    if packing.portion is not None:
        rows_RF = rows_RF.index_select(0, packing.portion.incoming)
    positions, samples = packing.padded
    block = rows_RF.new_zeros(positions * samples, rows_RF.shape[-1])
    block = block.index_copy(0, packing.incoming, rows_RF)
    return block.view(positions, samples, -1), packing.mask


def packed(share: Share, cut: ZigZag, *, dtype: torch.dtype, device: torch.device) -> Block:
    """Return the places of a share's rows in the block, of which this rank has a part under cp."""
    multiple = len(cut.chunks) if cut.size > 1 else 1
    return block_of_rows(share, multiple=multiple, dtype=dtype, device=device, cut=cut)


@attrs.frozen
class Blocks:
    """An encoder of blocks: `argument` takes the rows of a microbatch as [S, B, F], as long as the longest sample.

    The encoder returns [S, B, H]. `mask` names the argument that takes the mask of the block, [B, 1, 1, S] or None
    (`block_of`), on each of its stages; "": the encoder takes none.
    """

    argument: str
    mask: str = ""

    def __call__(
        self, rows_RF: Tensor | None, share: Share, cut: ZigZag, *, like: Tensor | None = None
    ) -> Mapping[str, Any]:
        """Return the arguments for a share; on a later stage, whose hidden states are `like`, the mask."""
        if rows_RF is not None:
            block_SBF, mask = block_of(rows_RF, share, cut)
            return {self.argument: block_SBF, **({self.mask: mask} if self.mask else {})}
        if like is None or not self.mask:
            return {}
        return {self.mask: packed(share, cut, dtype=like.dtype, device=like.device).mask}


@attrs.frozen
class SequenceFirst(Blocks):
    """An encoder of blocks whose tensor in a batch is a block, too: [S, B, F], as Megatron's own iterators yield it.

    Every sample of a microbatch has S rows, one for each of its placeholders. A job assigns samples to dp ranks, so the
    tensor is cut along B, and the encoder of a dp rank gets the block of its own samples.
    """


class ModalityNetwork(nn.Module):
    """A modality of a `MimoModel` as a module of a job; pass it to `Embedded` under the name of the module.

    The encoder gets the rows of all samples, end to end, as `argument`, or the arguments that a function makes of them.
    If `argument` is None, it gets the other tensors of the samples by name. It returns one row for each placeholder. In
    the job the module is a custom module as wide as the language model, or a `vit`. A `vit` may have several stages
    (`stage`); this is then one of them (a `shell.modules.interface.HostNetwork`). The modality has its own projection.

    Several encoders get their tensors by name, ``ENCODER.ARGUMENT``, and ``items.ENCODER`` says how many items of it
    each sample has. The rows of a sample are those of its items of the first encoder, then of the next. (Megatron puts
    all rows of the first before all rows of the next, which is the same for one sample.) Each encoder returns
    [items, rows, H], or one row for each item.

    Of a tuple the first tensor has the rows, as in Megatron. An output with three dims is [S, B, H] from a
    `TransformerBlock`, with several stages, with cp, or if the inputs are `Blocks`; otherwise it is [B, S, H]. Rows are
    returned sample after sample. Megatron flattens both layouts as they are, which gives samples each other's rows.

    Under cp a rank has its part of the positions of a sample, in Megatron's zig-zag. The cp group is that of the
    encoder's `TransformerBlock`.
    """

    def __init__(
        self, modality: nn.Module, argument: str | Arrange | None, *, stage: ModuleStageInfo | None = None
    ) -> None:
        super().__init__()
        # In a tuple, so that it adds no prefix to the names of parameters, which are Megatron's.
        self._modality = (modality,)
        for part, network in modality.named_children():
            self.add_module(part, network)
        self.argument = argument
        self.stage = stage or ModuleStageInfo("", 0, is_first_stage=True, is_last_stage=True, position={})
        parts: Any = modality
        problems = list(_unable_modality(parts, argument, self.stage))
        if problems:
            raise PlanError(problems)
        self._key = next(iter(parts.encoders))
        self._taken = set(inspect.signature(parts.encoders[self._key].forward).parameters)
        self.cp = _cp_of(parts.encoders[self._key])
        self.cut = ZigZag(self.cp.rank(), self.cp.size()) if self.cp else WHOLE

    def table(self, info: StageInfo, *, tp: int, expert_tp: int) -> Mapping[str, Parameter]:
        """Return the description of each parameter; see `table_of`."""
        return table_of(self._modality[0], info, tp=tp, expert_tp=expert_tp)

    def forward(self, inputs: Mapping[str, Tensor], share: Share | None = None) -> Mapping[str, Tensor]:
        """Return the projected rows, or hidden states; see `shell.modules.interface.OwnNetwork` and `HostNetwork`."""
        first, last = self.stage.is_first_stage, self.stage.is_last_stage
        modality: Any = self._modality[0]
        encoder: Any = modality.encoders[self._key]
        if len(modality.encoders) > 1:
            return {"rows": modality.project_embeddings([self._of_several(inputs)], is_input=True)}
        if first:
            said = encoder(**self._arguments(inputs, share))
        else:
            hidden = self._at_least_one(inputs[self.stage.module], share)
            said = continued(self.stage.module, encoder, hidden, self._arguments({}, share, like=hidden))
        if not last:
            assert share is not None, "a custom module has one stage"
            return {self.stage.module: said if any(share.lengths) else said[:0, :0]}
        rows = modality.project_embeddings([self._flat(said, share, encoder)], is_input=True)
        return {"rows": self._joined(rows, share)}

    def _arguments(
        self, inputs: Mapping[str, Tensor], share: Share | None, *, like: Tensor | None = None
    ) -> Mapping[str, Any]:
        """Return the arguments of the encoder; inputs are empty on a later stage."""
        if self.argument is None:
            return self._by_name(inputs)
        if isinstance(self.argument, str):
            return {self.argument: inputs["rows"]} if inputs else {}
        assert share is not None, "a custom module gets its rows as one argument"
        if isinstance(self.argument, Blocks):
            return self.argument(inputs.get("rows"), share, self.cut, like=like)
        return self.argument(inputs.get("rows"), share, self.cut)

    def _by_name(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Any]:
        # What the job says of the rows, besides what the samples have for the encoder.
        counts = {"rows", "lengths", "grids"} - ({"grids"} & self._taken)
        named = {name: tensor for name, tensor in inputs.items() if name.partition(".")[0] not in counts}
        if inputs and not named:
            name = self.stage.module
            fact = "has an encoder, and nothing says which of its arguments takes the rows."
            remedy = (
                f"Name it, encoder_inputs={{'{name}': 'ARGUMENT'}}, or give samples a tensor of that name."
            )
            raise PlanError([Problem(f"modules.{name}", fact, remedy)])
        return named

    def _of_several(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the rows [R, H] of all encoders, sample after sample."""
        modality: Any = self._modality[0]
        parts = []
        for key, encoder in modality.encoders.items():
            if f"items.{key}" not in inputs:
                raise WorldError(
                    f"modality '{self.stage.module}' has no tensors for its encoder '{key}': give modality_inputs "
                    "for each of its encoders."
                )
            named = {
                name.removeprefix(f"{key}."): of for name, of in inputs.items() if name.startswith(f"{key}.")
            }
            rows = self._tensor(encoder(**named))
            parts.append(_of_samples(rows, inputs[f"items.{key}"], f"{self.stage.module}.{key}"))
        return torch.cat([rows for of_sample in zip(*parts, strict=True) for rows in of_sample])

    def _tensor(self, said: Any) -> Tensor:
        """Return the rows that an encoder returns, alone or as the first of several."""
        first = said[0] if isinstance(said, tuple) and said else said
        if not isinstance(first, Tensor):
            raise WorldError(
                f"the encoder of modality '{self.stage.module}' returned a {type(said).__name__}, not a tensor or a "
                "tuple that begins with one. Wrap it in a network that returns the rows."
            )
        rows: Tensor = first
        return rows

    def _flat(self, said: Any, share: Share | None, encoder: nn.Module) -> Tensor:
        """Return rows [R, H], sample after sample."""
        rows = self._tensor(said)
        alone = self.stage.is_first_stage and self.cut.size == 1
        by_position = isinstance(encoder, TransformerBlock) or isinstance(self.argument, Blocks) or not alone
        if rows.dim() == _ROWS or not by_position:
            return rows.reshape(-1, rows.shape[-1])
        assert share is not None, "a custom module returns rows"
        packing = packed(share, self.cut, dtype=rows.dtype, device=rows.device)
        if tuple(rows.shape[:2]) != packing.padded:
            raise WorldError(
                f"the encoder of modality '{self.stage.module}' returned [S, B] = {list(rows.shape[:2])}, and its "
                f"samples make a block of {list(packing.padded)}: return a row for each placeholder, [S, B, H]."
            )
        return rows.flatten(0, 1).index_select(0, packing.outgoing)

    def _at_least_one(self, hidden: Tensor, share: Share | None) -> Tensor:
        """Return hidden states, or zeros if a share has none, since Megatron's layers need at least one position."""
        if share is None or any(share.lengths) or hidden.dim() == _ROWS:
            return hidden
        positions, samples = packed(share, self.cut, dtype=hidden.dtype, device=hidden.device).padded
        return nn.functional.pad(hidden, (0, 0, 0, samples, 0, positions))

    def _joined(self, rows_RH: Tensor, share: Share | None) -> Tensor:
        """Return the rows of all cp ranks in the order of the share; each rank gets the gradient of its own rows."""
        if self.cut.size == 1 or share is None:
            return rows_RH
        portion = packed(share, self.cut, dtype=rows_RH.dtype, device=rows_RH.device).portion
        assert portion is not None
        if not portion.most:
            return rows_RH
        rows_RH = nn.functional.pad(rows_RH, (0, 0, 0, portion.most - len(rows_RH)))
        rows_RH = gather_from_sequence_parallel_region(
            rows_RH, tensor_parallel_output_grad=False, group=self.cp
        )
        return rows_RH.index_select(0, portion.order)


def _of_samples(rows: Tensor, items: Tensor, name: str) -> Sequence[Tensor]:
    """Split what an encoder returns for `items` [samples], [items, rows, H] or [items, H], into rows of each sample."""
    counts = items.tolist()
    if len(rows) != sum(counts):
        raise WorldError(
            f"encoder '{name}' returned a tensor of shape {list(rows.shape)} for {sum(counts)} items: beside other "
            "encoders, return [items, rows, H], or one row for each item."
        )
    return [of_sample.reshape(-1, rows.shape[-1]) for of_sample in rows.split(counts)]


_ROWS = 2
"""The number of dims of rows."""


def _blocks(encoder: nn.Module) -> list[Any]:
    return [part for part in encoder.modules() if isinstance(part, TransformerBlock)]


def _cp_of(encoder: nn.Module) -> dist.ProcessGroup | None:
    """Return the cp group of the blocks of an encoder; None if it has one rank."""
    for block in _blocks(encoder):
        group: dist.ProcessGroup | None = vars(block.pg_collection).get("cp")
        return group if group is not None and group.size() > 1 else None
    return None


def _unable_modality(
    modality: Any, argument: str | Arrange | None, stage: ModuleStageInfo
) -> Iterator[Problem]:
    """Yield why a modality cannot run in a job's program."""
    where = f"modules.{stage.module}"
    encoders = list(modality.encoders.values())
    if len(encoders) > 1 and (argument is not None or any(isinstance(e, TransformerBlock) for e in encoders)):
        fact = f"has {len(encoders)} encoders, which read the tensors of items by name, not blocks or rows."
        yield Problem(
            where, fact, "Leave encoder_inputs out for it, and make an encoder of blocks a modality."
        )
        return
    encoder = encoders[0]
    if any(isinstance(part, RADIOViTModel) and part.has_cpe for part in modality.encoders.modules()):
        fact = (
            "is a RADIOViTModel that draws from its rank's random state which part of its position embeddings an image "
            "gets (has_cpe), so what it trains depends on the layout."
        )
        yield Problem(where, fact, "Build it with has_cpe=False.")
    cut = not (stage.is_first_stage and stage.is_last_stage)
    cp = _cp_of(encoder)
    parts = any(block.config.sequence_parallel for block in _blocks(encoder))
    if cut and parts:
        fact = "has several stages that pass on parts of the positions (sequence_parallel)."
        yield Problem(where, fact, "Use pp = 1, or sequence_parallel=False for this encoder.")
    if cp is None:
        return
    if parts:
        fact = f"cuts its positions over cp={cp.size()} and over tp (sequence_parallel)."
        yield Problem(where, fact, "Use cp = 1, or sequence_parallel=False for this encoder.")
    if argument is None or isinstance(argument, str):
        fact = f"gets whole rows, of which each of cp={cp.size()} ranks is to have a part."
        yield Problem(where, fact, "Give a function from rows to arguments (block_of), or use cp = 1.")
    others = {
        type(part.core_attention).__name__
        for part in encoder.modules()
        if isinstance(part, Attention) and not isinstance(part.core_attention, CoreAttention)
    }
    if others:
        fact = f"has an attention ({', '.join(sorted(others))}) that is not known to mask padding under cp={cp.size()}."
        yield Problem(where, fact, "Use that of layer_spec(config, causal=False), or cp = 1.")


def continued(
    name: str, encoder: Any, hidden: Tensor | None, arguments: Mapping[str, Any] | None = None
) -> Tensor:
    """Run a later stage of an encoder on hidden states, which it gets by `set_input_tensor` as in Megatron."""
    if not hasattr(encoder, "set_input_tensor"):
        raise TypeError(
            f"modality '{name}' is cut into stages, and {type(encoder).__name__} takes no hidden states. "
            "Give it set_input_tensor(hidden), or a grid with pp = 1."
        )
    encoder.set_input_tensor(hidden)
    defaults = {"hidden_states": None, "attention_mask": None}
    return encoder(**defaults | dict(arguments or {}))  # type: ignore[no-any-return]
