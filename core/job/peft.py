"""PEFT: where LoRA's parameters lie in an adapter as the library peft writes it.

    adapter_config.json         rank, alpha and targets
    adapter_model.safetensors   base_model.model.PATH.lora_A.weight and lora_B.weight, by the path of the linear layer

A path is what transformers calls the layer in memory, which for models with towers is not what it is called on disk.
What trains besides is in the same file, layer by layer (``modules_to_save``).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

from mimogrid.core.job.lora import Lora, adapters, aims_at
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.models.mapping import ParameterRows, Recipe, Rows, Stored, inverse, whole


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What the names in an adapter begin with."""

_LINEAR = re.compile(r"(layers\.\d+\.(?:attention|mlp)\.)(qkv|out|up|down)\.weight")
_PARTS = {2: ("gate", "up"), 3: ("q", "k", "v")}
"""By how many tensors on disk make one weight, its parts."""


@attrs.frozen
class StoredPair:
    """A pair as it is on disk.

    Attributes:
        weight: the tensor of the checkpoint that it is beside.
        scale: the weight of the product.
        rank: rows of A.
        a, b: the rows of ours that A and B are, first to last, by ``module.parameter``.
    """

    weight: str
    scale: float
    rank: int
    a: tuple[ParameterRows, ...]
    b: tuple[ParameterRows, ...]


def linears(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Return the paths on disk of the linear layers in a module's layers, by our names of them.

    >>> q, k, v = (Stored(f"h.0.{x}_proj.weight", (2, 4)) for x in "qkv")
    >>> qkv = Recipe((6, 4), (Rows(q, 0, 2), Rows(k, 0, 2), Rows(v, 0, 2)))
    >>> linears({"layers.0.attention.qkv.weight": qkv})["layers.0.attention.k"]
    'h.0.k_proj'
    """
    found: dict[str, str] = {}
    for name, recipe in recipes.items():
        if match := _LINEAR.fullmatch(name):
            paths = list(dict.fromkeys(path_of(p.tensor.name) for p in recipe.parts if isinstance(p, Rows)))
            for part, path in zip(_PARTS.get(len(paths), (match[2],)), paths, strict=True):
                found[f"{match[1]}{part}"] = path
    return found


def targeted(
    targets: Iterable[str], paths: Mapping[str, str], *, has_towers: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield for each target the linear layers that it names: by our names, by their paths on disk and in memory.

    Where it names all of a kind, a pattern stands for them.

    >>> paths = {f"layers.{n}.attention.q": f"model.layers.{n}.self_attn.q_proj" for n in range(3)}
    >>> for target in ("q_proj", "model.layers.[01].*"):
    ...     print(dict(targeted([target], paths, has_towers=False)))
    {'q_proj': ['layers.*.attention.q']}
    {'model.layers.[01].*': ['layers.0.attention.q', 'layers.1.attention.q']}
    """
    kinds = Counter(map(_kind, paths))
    for target in targets:
        found = [
            ours
            for ours, path in paths.items()
            if aims_at(target, (ours, path, in_memory(path, has_towers=has_towers)))
        ]
        of_kind = Counter(map(_kind, found))
        whole_kinds = [kind for kind, count in of_kind.items() if count == kinds[kind]]
        yield target, [*whole_kinds, *(name for name in found if _kind(name) not in whole_kinds)]


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def path_of(tensor: str) -> str:
    """Return the path of the layer that a tensor belongs to."""
    return tensor.rpartition(".")[0]


def stored_pairs(
    module: str, model: BuiltIn, lora: Lora, recipes: Mapping[str, Recipe]
) -> Iterator[StoredPair]:
    """Yield the pairs of a module of a job."""
    paths = linears(recipes)
    for adapter in adapters(model, lora):
        weight = f"{paths[adapter.name]}.weight"
        a, b = Stored("a", (lora.rank, adapter.width_in)), Stored("b", (adapter.width_out, lora.rank))
        parts = (
            Rows(b, part.start, part.stop)
            for part in recipes[f"{adapter.weight}.weight"].parts
            if isinstance(part, Rows) and part.tensor.name == weight
        )
        names = {
            f"{module}.{adapter.prefix}.a": whole(a),
            f"{module}.{adapter.prefix}.b": Recipe(b.shape, (*parts,)),
        }
        rows = inverse(names)
        yield StoredPair(weight, lora.scale, lora.rank, rows[a], rows[b])


def in_memory(path: str, *, has_towers: bool) -> str:
    """Return what transformers calls a layer in memory, from its path on disk in any version of transformers.

    >>> in_memory("language_model.model.layers.0.mlp.up_proj", has_towers=True)
    'model.language_model.layers.0.mlp.up_proj'
    >>> in_memory("visual.blocks.0.attn.qkv", has_towers=True), in_memory("language_model.lm_head", has_towers=True)
    ('model.visual.blocks.0.attn.qkv', 'lm_head')
    >>> in_memory("model.layers.0.self_attn.q_proj", has_towers=True)
    'model.language_model.layers.0.self_attn.q_proj'
    """
    if not has_towers:
        return path
    path = path.removeprefix("model.")
    if path.startswith(_TOWERS):
        return f"model.{path.replace('vision_tower.vision_model.', 'vision_tower.', 1)}"
    path = path.removeprefix("language_model.").removeprefix("model.")
    return path if path.startswith("lm_head") else f"model.language_model.{path}"


_TOWERS = ("vision_tower.", "visual.", "audio_tower.", "multi_modal_projector.")


def config_of(
    pairs: Mapping[str, StoredPair],
    loras: Iterable[Lora],
    *,
    base: str,
    saved: Iterable[str],
    has_towers: bool,
) -> dict[str, Any]:
    """Return the config of an adapter with these pairs by path; `saved` are the paths of layers that train whole.

    `base` says which model it is for. Patterns name the pairs whose rank or alpha is not that of the first one.
    """
    first = next(iter(pairs.values()))
    ranks = {path: pair.rank for path, pair in pairs.items() if pair.rank != first.rank}
    alphas = {p: pair.scale * pair.rank for p, pair in pairs.items() if _alpha(pair) != _alpha(first)}
    return {
        "peft_type": "LORA",
        "task_type": None if has_towers else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": _alpha(first),
        "lora_dropout": max(lora.dropout for lora in loras),
        "target_modules": list(pairs),
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items()},
        "alpha_pattern": {re.escape(path): alpha for path, alpha in alphas.items()},
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _alpha(pair: StoredPair) -> float | int:
    alpha = pair.scale * pair.rank
    return int(alpha) if alpha == int(alpha) else alpha
