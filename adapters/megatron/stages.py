"""The parts of a `MimoModel` on one rank, which Megatron's schedules can call like the whole model.

Shapes in names: S positions, B samples, H hidden, R rows.
"""

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.spec_utils import ModuleSpec as MegatronSpec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimogrid.adapters.megatron.grids import LANGUAGE
from mimogrid.adapters.megatron.jobs import sizes_of
from mimogrid.adapters.megatron.modality import continued
from mimogrid.adapters.megatron.states import sharded_model
from mimogrid.core.job.models import BuiltIn, Gpt, Vit
from mimogrid.core.topology.roles import ModuleStageInfo, RankRole
from mimogrid.shell.megatron.layers import block_spec
from mimogrid.shell.megatron.names import ProcessGroupCollection
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore


def layer_spec(config: TransformerConfig, *, causal: bool = True, rotary: bool = True) -> MegatronSpec:
    """Return the specification of megatron-core's layer with an attention and a norm for the CPU and any dtype.

    They are those of the job's built-in models: a layer norm, and an attention that applies rotary embeddings itself.
    So the model needs ``position_embedding_type="none"`` (or "learned_absolute", in addition). Without `rotary` it may
    have Megatron's "rope" or "mrope", whose angles are fp32. `causal` says whether the attention is causal. If the
    configuration has experts, they are Megatron's `SequentialMLP`.

    Raises ValueError for a configuration with another norm.
    """
    if config.normalization != "LayerNorm":
        raise ValueError(
            f"layer_spec has layer norms, the configuration says normalization='{config.normalization}': "
            "set it to 'LayerNorm', or take a specification of Megatron's."
        )
    sizes = sizes_of(config)
    model: BuiltIn = Gpt(**sizes, vocab=1) if causal else Vit(**sizes)
    mlps = {0: get_moe_module_spec(use_te=False, num_experts=model.experts)} if model.experts else {}
    # With tp=2 the linear layers are megatron-core's, also on one rank: its checkpoints do not support others.
    layer: MegatronSpec = block_spec(
        model, layers=range(1), tp=2, weight_grads=WeightGradStore(), mlps=mlps
    ).layer_specs[0]
    if not rotary:
        layer = copy.deepcopy(layer)
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = functools.partial(attention.core_attention, rotary=None)
    return layer


def from_specs(
    language_model_spec: MegatronSpec,
    modality_submodules_spec: Mapping[str, MegatronSpec],
    special_token_ids: Mapping[str, int],
    *,
    role: RankRole,
    collections: Mapping[str, ProcessGroupCollection] | None = None,
    vp_stage: int | None = None,
) -> "MimoStages":
    """Build this rank's parts of a model with the specifications of a `MimoModel`.

    Modules of other ranks are not built. Projections are built on the last stage of a modality, embedding and output
    layer on the first and the last stage of the language model. `collections` has the groups of each module; without
    them Megatron's global state is used. Configurations must have the size of pp, as usual in Megatron. `vp_stage` is
    the chunk that the role is about (`roles_by_chunk`), for modules with several chunks.

    Raises ValueError if the role names modules without a specification, if a modality with several stages has several
    encoders, or if a network with virtual stages takes no `vp_stage`; RuntimeError if the rank is in no grid.
    """
    known = {LANGUAGE, *modality_submodules_spec}
    if not known.issuperset(role.modules):
        raise ValueError(
            f"the role names modules that are not specified. Missing: {sorted(set(role.modules) - known)}, "
            f"known: {sorted(known)}"
        )
    if role.is_idle:
        raise RuntimeError(f"rank {role.rank} is in no module's grid: it idles, and has no model.")
    collections = collections or {}
    submodules = {
        name: _modality_of(spec, role.modules[name], collections.get(name), vp_stage)
        for name, spec in modality_submodules_spec.items()
        if name in role.modules
    }
    language = None
    if role.has_language_module:
        language = _built(language_model_spec, role.modules[LANGUAGE], collections.get(LANGUAGE), vp_stage)
    return MimoStages(
        role,
        submodules,
        language,
        special_token_ids,
        collections,
        config=(language_model_spec.params or {}).get("config"),
    )


def _built(
    spec: MegatronSpec,
    info: ModuleStageInfo,
    collection: ProcessGroupCollection | None,
    vp_stage: int | None,
) -> nn.Module:
    """Build a network for a stage; it gets the arguments about the stage that its constructor has."""
    of_stage: dict[str, Any] = {"pre_process": info.is_first_stage, "post_process": info.is_last_stage}
    if collection is not None:
        # Megatron's projector asks for one group, its other networks for all of them.
        of_stage |= {"pg_collection": collection, "tp_group": collection.tp}
    configs = [value for value in (spec.params or {}).values() if isinstance(value, TransformerConfig)]
    if any(config.virtual_pipeline_model_parallel_size for config in configs):
        of_stage["vp_stage"] = vp_stage
    asked = inspect.signature(spec.module.__init__).parameters
    if "vp_stage" in of_stage and "vp_stage" not in asked:
        raise ValueError(
            f"'{info.module}' is cut into virtual stages, and {spec.module.__name__} takes no vp_stage, "
            "so all of them would have the same layers."
        )
    spec = copy.copy(spec)
    spec.params = {
        **(spec.params or {}),
        **{name: value for name, value in of_stage.items() if name in asked},
    }
    return build_module(spec)  # type: ignore[no-any-return]


def _modality_of(
    spec: MegatronSpec,
    info: ModuleStageInfo,
    collection: ProcessGroupCollection | None,
    vp_stage: int | None,
) -> nn.Module:
    parts = spec.submodules or {}
    if not (info.is_first_stage and info.is_last_stage) and len(parts.get("encoders", {})) != 1:
        raise ValueError(
            f"modality '{info.module}' is cut into stages: one encoder runs through them, "
            f"not {sorted(parts.get('encoders', {}))}"
        )

    def named(kind: str) -> dict[str, nn.Module]:
        return {name: _built(part, info, collection, vp_stage) for name, part in parts.get(kind, {}).items()}

    def listed(kind: str, *, wanted: bool) -> list[nn.Module]:
        return [_built(part, info, collection, vp_stage) for part in parts.get(kind, ())] if wanted else []

    stage = {"is_first_stage": info.is_first_stage, "is_last_stage": info.is_last_stage}
    asked = inspect.signature(spec.module.__init__).parameters
    return spec.module(  # type: ignore[no-any-return]
        encoders=named("encoders"),
        decoders=named("decoders"),
        input_projections=listed("input_projections", wanted=info.is_last_stage),
        output_projections=listed("output_projections", wanted=info.is_first_stage),
        **{name: value for name, value in stage.items() if name in asked},
        **(spec.params or {}),
    )


class MimoStages(nn.Module):
    """The parts of a `MimoModel` on one rank, with its interface for Megatron's schedules.

    Parameters have the same names (``language_model.*``, ``modality_submodules.NAME.*``), so the state dict of one
    loads into the other. `config` is the configuration of the language model, on every rank.

    | the rank hosts | forward returns, beside `loss_mask` |
    |---|---|
    | modalities only | the output of each by its name: rows [R, H] from a last stage, else hidden states |
    | a stage of the language model that is not its last | its hidden states by the name `LANGUAGE` |
    | the last stage of the language model | what that model returns |
    | both | the same as the language model's; without its last stage, all outputs by name |
    """

    def __init__(
        self,
        role: RankRole,
        modality_submodules: Mapping[str, nn.Module],
        language_model: nn.Module | None,
        special_token_ids: Mapping[str, int],
        collections: Mapping[str, ProcessGroupCollection],
        *,
        config: TransformerConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.role = role
        self.collections = dict(collections)
        self.special_token_ids = dict(special_token_ids)
        self.modality_submodules = nn.ModuleDict(dict(modality_submodules))
        self.language_model = language_model
        self.input_tensors: Mapping[str, Tensor] = {}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return this rank's parts for Megatron's distributed checkpoints, under Megatron's names."""
        groups = {module: self.collections.get(module) for module in self.role.modules}
        return sharded_model(self, groups, prefix, sharded_offsets, metadata or {})

    def state_dict_for_save_checkpoint(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return the state dict, under the name by which Megatron's checkpoints ask for it."""
        return self.state_dict(*arguments, **options)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the outputs of earlier stages: tensors by the name of the module that computed them.

        A single tensor is for the language model. Megatron's schedules wrap both into a list.
        """
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is None or isinstance(received, Tensor):
            received = {} if received is None else {LANGUAGE: received}
        self.input_tensors = {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in received.items()
        }

    def forward(  # noqa: PLR0917 -- the order is Megatron's
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        labels: Tensor | None = None,
        modality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[Any, Tensor | None]:
        """Run the stages of this rank; see the table above for the results and `MimoModel.forward` for the arguments.

        Raises ValueError if rows and placeholders do not match, RuntimeError if a modality has placeholders and no
        input.
        """
        outputs: dict[str, Tensor] = {}
        for name in self.role.modality_module_names:
            output = self._modality(name, (modality_inputs or {}).get(name))
            if output is not None:
                outputs[name] = output
            elif input_ids is not None and self._places(input_ids, name).any():
                raise RuntimeError(f"there are placeholders for '{name}', and no input")
        if self.language_model is None:
            return outputs, loss_mask
        received = {name: tensor for name, tensor in self.input_tensors.items() if name != LANGUAGE}
        embedded, hidden = None, self.input_tensors.get(LANGUAGE)
        if self.role.is_first_stage(LANGUAGE):
            assert input_ids is not None
            embedded = self._embed(input_ids, position_ids, {**received, **outputs})
        elif hidden is not None:
            language: Any = self.language_model
            language.set_input_tensor(hidden)
        said = self.language_model(
            input_ids=None,
            position_ids=None,
            decoder_input=embedded,
            labels=labels,
            attention_mask=attention_mask,
        )
        return (said if self.role.is_last_stage(LANGUAGE) else {**outputs, LANGUAGE: said}), loss_mask

    def _modality(self, name: str, inputs: Mapping[str, Any] | None) -> Tensor | None:
        """Run this rank's stage of a modality. Unlike in Megatron, later stages run their layers, too."""
        submodule: Any = self.modality_submodules[name]
        hidden = self.input_tensors.get(name)
        if inputs is not None and hidden is not None:
            raise ValueError(f"'{name}' got inputs from the data and from an earlier stage")
        first, last = self.role.is_first_stage(name), self.role.is_last_stage(name)
        if (inputs if first else hidden) is None:
            return None
        if first and last and not any(isinstance(e, TransformerBlock) for e in submodule.encoders.values()):
            outputs = submodule.encode(inputs)
        else:
            ((key, encoder),) = submodule.encoders.items()
            output = encoder(**inputs[key]) if inputs is not None else continued(name, encoder, hidden)
            if not last:
                return output
            # Sample by sample; flattening [S, B, H] as it is would give samples each other's rows.
            outputs = [(output.transpose(0, 1) if output.dim() > 2 else output).reshape(-1, output.shape[-1])]  # noqa: PLR2004
        rows: Tensor | None = submodule.project_embeddings(outputs, is_input=True) if outputs else None
        return rows

    def _embed(
        self, input_ids_BS: Tensor, position_ids_BS: Tensor | None, rows: Mapping[str, Tensor]
    ) -> Tensor:
        """Return [S, B, H]: embeddings of the text, and the rows of each modality at its placeholders, in order."""
        text = torch.ones_like(input_ids_BS, dtype=torch.bool)
        for token in self.special_token_ids.values():
            text &= input_ids_BS != token
        positions = position_ids_BS[text][None] if position_ids_BS is not None else None
        model: Any = self.language_model
        embedded = model.embedding(input_ids=input_ids_BS[text][None], position_ids=positions).squeeze(1)
        places = torch.full_like(input_ids_BS, -1)
        places[text] = torch.arange(len(embedded), device=places.device)
        parts, begin = [embedded], len(embedded)
        for name, rows_RH in rows.items():
            if name not in self.special_token_ids:
                raise ValueError(f"there is no special token for modality '{name}'")
            where = self._places(input_ids_BS, name)
            if int(where.sum()) != len(rows_RH):
                raise ValueError(f"'{name}' has {int(where.sum())} placeholders and {len(rows_RH)} rows")
            places[where] = torch.arange(begin, begin + len(rows_RH), device=places.device)
            parts, begin = [*parts, rows_RH], begin + len(rows_RH)
        if (places < 0).any():
            lacking = sorted(n for n in self.special_token_ids if n not in rows)
            raise ValueError(f"there are placeholders without rows, of {lacking}")
        return torch.cat(parts)[places].transpose(0, 1).contiguous()

    def _places(self, input_ids_BS: Tensor, name: str) -> Tensor:
        if name not in self.special_token_ids:
            return torch.zeros_like(input_ids_BS, dtype=torch.bool)
        return input_ids_BS == self.special_token_ids[name]
