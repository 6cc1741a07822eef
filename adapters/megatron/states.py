"""The state dict of a whole `MimoModel` as weights of a job, whatever its grids, and back."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor


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
