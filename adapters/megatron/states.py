"""Conversion between the state dict of a whole `MimoModel` and the weights of a job, for any grids."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor


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
