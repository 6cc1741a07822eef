"""Sizes of models from a ``config.json`` of Hugging Face: ``options = { config = "path/to/config.json" }``.

Only this file is read, no weights. Its sizes become options of the module's built-in model. Options beside `config`
override them. Parts that the built-in models lack become parts with equal work and memory. A gated MLP of three
matrices, as in Llama, becomes one of two with 3/2 of the width: it has as many parameters and operations. RMS norms
become layer norms, and learnt positions rotary ones; both are small. So such a job can be planned, simulated and
trained from scratch. It does not load the checkpoint.

| `model_type` | as a `vit` | as a `gpt` |
|---|---|---|
| clip, siglip, and their vision parts | patches of 3 * patch_size^2 values | |
| whisper | the encoder; rows of 2 * num_mel_bins values, as its second convolution halves the frames | |
| qwen2_vl, qwen2_5_vl | `vision_config`, patches over time | the text part |
| llama, mistral, qwen2, qwen3 | | all of it |
"""

from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.shell.job.tables import shown
from mimogrid.shell.job.textfiles import json_of, read_text


Config = Mapping[str, Any]
GATED = 3, 2
"""Matrices of a gated MLP, and of the built-in one."""
BEYOND = 1e6
"""No ratio is as large."""


def lay_options(table: MutableMapping[str, Any], folder: Path) -> dict[str, tuple[Problem, ...]]:
    """Replace every ``options.config`` in a job's table by the sizes in the file.

    Returns the problems, by the name of the module. What the plan says of a module with problems means nothing.
    """
    problems: dict[str, tuple[Problem, ...]] = {}
    modules = table.get("modules")
    for name, module in modules.items() if isinstance(modules, dict) else ():
        options = module.get("options") if isinstance(module, dict) else None
        if not isinstance(options, dict) or "config" not in options or ":" in str(module.get("model")):
            continue
        where = f"modules.{name}.options.config"
        config = options.pop("config")
        try:
            module["options"] = options_of(where, folder / str(config), str(module.get("model"))) | options
        except PlanError as error:
            problems[name] = error.problems
    return problems


def options_of(where: str, path: Path, model: str) -> dict[str, Any]:
    """Return the options of a built-in model from a config file. Raises PlanError."""
    try:
        config = json_of(read_text(path, "Give its path from the folder of the job file."))
    except ValueError as error:
        raise PlanError([Problem(where, f"{path} is no JSON: {error}.", "Name a config.json.")]) from None
    except PlanError as error:
        raise PlanError(
            attrs.evolve(p, where=where, message=f"{path} {p.message}") for p in error.problems
        ) from None
    if not isinstance(config, dict):
        raise PlanError([Problem(where, f"{path} holds no table.", "Name a config.json.")])
    readers = READERS.get(model, {})
    kind = str(config.get("model_type"))
    if kind not in readers:
        known = ", ".join(readers) or "none"
        remedy = (
            f"{nearest(kind, tuple(readers))} Known for a {model}: {known}."
            if readers
            else "Write its sizes."
        )
        raise PlanError([Problem(where, f"'{kind}' is no architecture that is known as a {model}.", remedy)])
    try:
        return readers[kind](_Sizes(config))
    except _NoSize as error:
        message = f"{path} has {error} for model_type '{kind}'."
        raise PlanError([Problem(where, message, "Write the sizes as options.")]) from None


class _NoSize(Exception):  # noqa: N818 -- a fact about a file, not an error
    """A size that a file lacks, or has as something else."""


class _Sizes:
    """A table of a file, whose sizes are asked for by name; `_NoSize` is raised for what is none."""

    def __init__(self, table: Config) -> None:
        self._table = table

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def __getitem__(self, key: str) -> int:
        if key not in self._table:
            raise _NoSize(f"no '{key}'")
        value = self._table[key]
        if type(value) is not int:
            raise _NoSize(f"no integer as '{key}': {shown(value)}")
        return value

    def get(self, key: str, default: int) -> int:
        """Return a size that may be left out."""
        return self[key] if self._table.get(key) is not None else default

    def ratio(self, key: str) -> float:
        """Return a number that need not be an integer."""
        value = self._table[key]
        if type(value) not in {int, float} or not abs(value) < BEYOND:
            raise _NoSize(f"no number as '{key}': {shown(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Whether something is said to be so."""
        return bool(self._table.get(key, False))

    def part(self, key: str) -> "_Sizes":
        """Return a table within this one, or this one where it has none of that name."""
        inner = self._table.get(key, self._table)
        if not isinstance(inner, Mapping):
            raise _NoSize(f"no table as '{key}': {shown(inner)}")
        return _Sizes(inner)


def _patches(config: _Sizes) -> dict[str, int]:
    """CLIP and SigLIP: the vision part of the whole model's file, or a file of its own."""
    vision = config.part("vision_config")
    return {
        "layers": vision["num_hidden_layers"],
        "hidden": vision["hidden_size"],
        "heads": vision["num_attention_heads"],
        "ffn": vision["intermediate_size"],
        "features": vision.get("num_channels", 3) * vision["patch_size"] ** 2,
    }


def _whisper(config: _Sizes) -> dict[str, int]:
    return {
        "layers": config["encoder_layers"],
        "hidden": config["d_model"],
        "heads": config["encoder_attention_heads"],
        "ffn": config["encoder_ffn_dim"],
        "features": 2 * config["num_mel_bins"],
    }


def _qwen_vision(config: _Sizes) -> dict[str, int]:
    """Qwen2-VL gives the MLP as a ratio; Qwen2.5-VL as a gated width."""
    vision = config.part("vision_config")
    hidden = vision["embed_dim"] if "embed_dim" in vision else vision["hidden_size"]
    ratio = "mlp_ratio" in vision
    ffn = int(hidden * vision.ratio("mlp_ratio")) if ratio else _gated(vision["intermediate_size"])
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    return {
        "layers": vision["depth"],
        "hidden": hidden,
        "heads": vision["num_heads"],
        "ffn": ffn,
        "features": channels * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2,
    }


def _decoder(config: _Sizes) -> dict[str, Any]:
    text = config.part("text_config")
    heads = text["num_attention_heads"]
    return {
        "layers": text["num_hidden_layers"],
        "hidden": text["hidden_size"],
        "heads": heads,
        "kv_heads": text.get("num_key_value_heads", heads),
        "ffn": _gated(text["intermediate_size"]),
        "vocab": text["vocab_size"],
        "tied_embeddings": (text if "tie_word_embeddings" in text else config).flag("tie_word_embeddings"),
    }


def _gated(width: int) -> int:
    matrices, ours = GATED
    return width * matrices // ours


READERS: Mapping[str, Mapping[str, Callable[[_Sizes], dict[str, Any]]]] = {
    "vit": {
        "clip": _patches,
        "clip_vision_model": _patches,
        "siglip": _patches,
        "siglip_vision_model": _patches,
        "whisper": _whisper,
        "qwen2_vl": _qwen_vision,
        "qwen2_5_vl": _qwen_vision,
    },
    "gpt": dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"), _decoder),
}
"""For each built-in model, the architectures whose files can be read."""
