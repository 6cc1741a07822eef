"""A modality of Megatron's as a module of a job: its encoder over the rows of a microbatch, and its projection.

Shapes in names: S positions, B samples, H hidden, R rows, F features.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from mimogrid.adapters.megatron.parameters import table_of
from mimogrid.core.errors import PlanError, Problem
from mimogrid.core.models import Parameter
from mimogrid.core.roles import ModuleStageInfo
from mimogrid.core.steps import Share
from mimogrid.core.topology import StageInfo
from mimogrid.shell.packing import pack_rows


Arrange = Callable[[Tensor | None, Share], Mapping[str, Any]]
"""Rows [R, F] of a share, sample after sample, to the arguments of an encoder; None: to those of a later stage."""


def block_of(rows_RF: Tensor, share: Share) -> tuple[Tensor, Tensor | None]:
    """Return rows as a block [S, B, F] as long as the longest sample that has any, and its mask.

    The mask [B, 1, 1, S] is added to attention scores: minus infinity for what is padding; None: nothing is. A share
    without rows, which is computed where others share its experts, is a block of one zero that nobody reads.
    """
    packing = pack_rows(share, multiple=1, dtype=rows_RF.dtype, device=rows_RF.device)
    positions, samples = packing.padded
    block = rows_RF.new_zeros(positions * samples, rows_RF.shape[-1])
    block = block.index_copy(0, packing.incoming, rows_RF)
    return block.view(positions, samples, -1), packing.mask


class ModalityNetwork(nn.Module):
    """A modality of Megatron's as a module of a job: hand it to `Embedded` under the module's name.

    Its encoder gets the rows of all samples, end to end, as `argument`, or whatever a function makes of them;
    without either, by their names, the tensors that the samples have besides rows. It gives one row for each. In the
    job the module is one of the host's, as wide as the language model, or a `vit`: then the modality may be a stage
    of several (`stage`, `shell.modules.HostNetwork`). Its projection is its own.

    What an encoder returns with three dims is [S, B, H] from a `TransformerBlock` and where there are several
    stages, [B, S, H] otherwise. Rows leave it sample after sample: Megatron flattens both as they lie, and so gives
    samples each other's rows.
    """

    def __init__(
        self, modality: nn.Module, argument: str | Arrange | None, *, stage: ModuleStageInfo | None = None
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

    def table(self, info: StageInfo, *, tp: int, expert_tp: int) -> Mapping[str, Parameter]:
        """Return what each parameter is; see `table_of`."""
        return table_of(self._modality[0], info, tp=tp, expert_tp=expert_tp)

    def forward(self, inputs: Mapping[str, Tensor], share: Share | None = None) -> Mapping[str, Tensor]:
        """Return the projected rows, or hidden states; see `shell.modules.OwnNetwork` and `HostNetwork`."""
        first, last = self.stage.is_first_stage, self.stage.is_last_stage
        modality: Any = self._modality[0]
        encoder: Any = modality.encoders[self._key]
        if first:
            said = encoder(**self._arguments(inputs, share))
        else:
            hidden = _at_least_one(inputs[self.stage.module])
            said = continued(self.stage.module, encoder, hidden, self._arguments({}, share))
        if not last:
            assert share is not None, "a module of the host's has one stage"
            return {self.stage.module: said if any(share.lengths) else said[:0, :0]}
        return {"rows": modality.project_embeddings([self._flat(said, share, encoder)], is_input=True)}

    def _arguments(self, inputs: Mapping[str, Tensor], share: Share | None) -> Mapping[str, Any]:
        """Return what the encoder is called with; inputs are empty on a later stage."""
        if self.argument is None:
            return self._by_name(inputs)
        if isinstance(self.argument, str):
            return {self.argument: inputs["rows"]} if inputs else {}
        assert share is not None, "a module of the host's gets its rows as one argument"
        return self.argument(inputs.get("rows"), share)

    def _by_name(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Any]:
        counts = ("rows", "lengths")
        named = {name: tensor for name, tensor in inputs.items() if name.partition(".")[0] not in counts}
        if inputs and not named:
            name = self.stage.module
            fact = "has an encoder, and nothing says which of its arguments takes the rows."
            remedy = (
                f"Name it, encoder_inputs={{'{name}': 'ARGUMENT'}}, or give samples a tensor of that name."
            )
            raise PlanError([Problem(f"modules.{name}", fact, remedy)])
        return named

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


def _at_least_one(hidden: Tensor) -> Tensor:
    """Return hidden states with one of zeros where there are none: Megatron's layers do not take none."""
    if hidden.numel() or hidden.dim() == _ROWS:
        return hidden
    return nn.functional.pad(hidden, (0, 0, 0, 1, 0, 1))


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
