"""State dicts of Megatron: between a whole `MimoModel` and the weights of a job, and the shards of a rank's parts."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from mimogrid.adapters.megatron.grids import LANGUAGE
from mimogrid.shell.megatron.names import ProcessGroupCollection


_WRAPPERS = re.compile(r"(?<![^.])module\.")
_STACKED = re.compile(r"(.*\blayers)\.(?!\d+\.)(.+)")
_LANGUAGE, _MODALITIES = "language_model.", "modality_submodules."


def to_job_state(state: Mapping[str, Tensor], language: str) -> dict[str, Tensor]:
    """Return the weights in a `MimoModel`'s state dict under the names that `Embedded.load_state_dict` expects.

    `state` has full tensors and all layers, as on one process. One tensor may also hold a weight of all layers, along
    its first dim, as in Megatron's distributed checkpoints. `language` is the name of the language model in the job.
    Wrappers in names (``module.``) are ignored.
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
    """Return the weights in a state of `Embedded.state_dict` under the names of a whole `MimoModel`."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, name = key.partition(".")
        if module in modules:
            head = _LANGUAGE if module == language else f"{_MODALITIES}{module}."
            found[f"{head}{name}"] = tensor
    return found


def sharded_model(
    model: Any,
    collections: Mapping[str, ProcessGroupCollection | None],
    prefix: str,
    offsets: Any,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the parts of a `MimoStages` or `MimoModel` for Megatron's distributed checkpoints (`sharded_parts`).

    `collections` has the groups of each module that the rank hosts; None: Megatron's global state says which ranks hold
    copies.
    """
    found: dict[str, Any] = {}
    for module, groups in collections.items():
        if module == LANGUAGE and model.language_model is not None:
            part, name = model.language_model, _LANGUAGE
        elif module in model.modality_submodules:
            part, name = model.modality_submodules[module], f"{_MODALITIES}{module}."
        else:
            continue  # It is in the model of another chunk of the rank.
        known = {} if groups is None else {"dp_cp_group": groups.dp_cp}
        tp_group = None if groups is None else groups.tp
        found |= sharded_parts(part, f"{prefix}{name}", offsets, {**metadata, **known}, tp_group=tp_group)
    return found


def sharded_parts(
    network: nn.Module,
    prefix: str,
    offsets: Any,
    metadata: Mapping[str, Any],
    *,
    tp_group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """Return the shards of a network for Megatron's distributed checkpoints, part by part.

    A part that knows how its weights are cut (`sharded_state_dict`) says so itself. What is left over belongs to parts
    that every tp and dp rank holds whole. A network without that method is taken apart, because Megatron writes all
    of such a network as copies: of weights that are cut over tp, one shard would stand for all.
    """
    if hasattr(network, "sharded_state_dict") and not _is_modality(network):
        return dict(sharded_state_dict_default(network, prefix, offsets, dict(metadata), tp_group=tp_group))
    own = {
        **dict(network.named_parameters(recurse=False)),
        **{
            name: buffer
            for name, buffer in network.named_buffers(recurse=False)
            if name not in network._non_persistent_buffers_set
        },
    }
    groups = {} if tp_group is None else {"tp_group": tp_group, "dp_cp_group": metadata.get("dp_cp_group")}
    found: dict[str, Any] = dict(make_sharded_tensors_for_checkpoint(own, prefix, {}, offsets, **groups))
    for name, child in network.named_children():
        found |= sharded_parts(child, f"{prefix}{name}.", offsets, metadata, tp_group=tp_group)
    return found


def _is_modality(network: nn.Module) -> bool:
    """Whether a network is a modality of a `MimoModel`: its own method does not say which tp ranks hold copies."""
    return hasattr(network, "encoders") and hasattr(network, "input_projections")
