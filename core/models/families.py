"""Families: which one a ``config.json`` belongs to, and the model that it describes.

Every file of this package that has `FAMILIES` is one: adding a family is adding a file (docs/models.md shows how).

>>> read_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1})
... # doctest: +ELLIPSIS
Model(modules={'language': PublishedModule(model='gpt', ...
>>> read_config({"architectures": ["LamaForCausalLM"]})  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
PlanError: config.json: architectures: 'LamaForCausalLM' is no architecture that is known here.
    Did you mean 'LlamaForCausalLM'?
"""

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from mimogrid.core import models
from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.network import Model


def _found() -> tuple[Family, ...]:
    names = (f"{models.__name__}.{file.name}" for file in pkgutil.iter_modules(models.__path__))
    files = [importlib.import_module(name) for name in names if name != __name__]
    return tuple(family for file in files for family in vars(file).get("FAMILIES", ()))


FAMILIES = _found()
BY_TYPE = {family.model_type: family for family in FAMILIES}
BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}


def read_config(config: Mapping[str, Any], names: Collection[str] = ()) -> Model:
    """Return the model that a config file describes.

    Args:
        config: what the file says.
        names: of the tensors on disk. Where they are not known they are as transformers writes them now.

    Raises PlanError with all that is wrong with the file.
    """
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            message = "the checkpoint is quantized: its tensors are not the weights."
            raise PlanError(
                [Problem(f"config.json: {key}", message, "Use the checkpoint that it was made from.")]
            )
    family = _family_of(config)
    reader = Config(config, {**family.defaults, "model_type": family.model_type}, names, BY_TYPE)
    read = family.read(reader)
    if reader.problems:
        raise PlanError(reader.problems)
    return read if isinstance(read, Model) else Model(modules={family.role: read})


def _family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a file, by its first architecture, or where it says none by its type."""
    key = "architectures" if config.get("architectures") else "model_type"
    known = BY_ARCHITECTURE if key == "architectures" else BY_TYPE
    match config.get(key):
        case [str(name), *_] | str(name) if name in known:
            return known[name]
        case [str(name), *_] | str(name):
            message, remedy = f"'{name}' is no architecture that is known here.", nearest(name, tuple(known))
        case _:
            message, remedy = "names no architecture.", "Use the config.json of a checkpoint."
    raise PlanError([Problem(f"config.json: {key}", message, remedy)])
