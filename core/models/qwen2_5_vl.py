"""Qwen2.5-VL: a tower with windows whose rows are merged 2x2, and a Qwen2 with positions in time and space."""

import math
from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models import llama, qwen2
from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.network import Model, Placeholder, PublishedModule
from mimogrid.core.models.rotary import rotary, sections
from mimogrid.core.models.stack import Names, layers, merger, patches


NAMES: Names = {
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": "mlp.down_proj",
}
MERGER = ("ln_q", "mlp.0", "mlp.2")
DEFAULTS: Mapping[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "tie_word_embeddings": False,
}
DEFAULTS_TEXT: Mapping[str, Any] = {
    **qwen2.DEFAULTS,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
}
DEFAULTS_VISION: Mapping[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
NORM_EPS = 1e-6
"""Of all norms of the tower; no file says it."""


def tower_options(config: Config) -> dict[str, Any]:
    """Return the options that the towers of Qwen2.5-VL and Qwen3-VL share."""
    hidden, heads = config.integer("hidden_size"), config.count("num_heads")
    if hidden % (4 * heads):
        message = f"is {heads}; heads of {hidden} / {heads} values do not turn in pairs along two directions."
        config.problem("num_heads", message, "Check the file.")
    return {
        "layers": config.layers("depth"),
        "hidden": hidden,
        "heads": heads,
        "ffn": config.integer("intermediate_size"),
        "features": math.prod(kernel(config)),
        "norm_eps": NORM_EPS,
        "activation": config.activation("hidden_act"),
        "positions": "rotary_2d",
        **rotary(config, plain=("axial", "default")),
        "merge": config.integer("spatial_merge_size"),
        "final_norm": False,
    }


def kernel(config: Config) -> tuple[int, ...]:
    """Return the shape of a patch: channels, frames, height, width."""
    patch = config.integer("patch_size")
    return (config.integer("in_channels"), config.integer("temporal_patch_size"), patch, patch)


def tower(config: Config) -> PublishedModule:
    """Return the tower, with the merger that feeds the language model."""
    pixels, unit = (
        config.integer("window_size"),
        config.integer("spatial_merge_size") * config.integer("patch_size"),
    )
    if pixels < unit:
        config.problem(
            "window_size", f"is {pixels} pixels, less than the {unit} of a merged row.", "Check the file."
        )
    options = tower_options(config)
    options |= {
        "norm": "rmsnorm",
        "gated": True,
        "patch_bias": False,
        "window": pixels // unit,
        "full_layers": [n for n in config.integers("fullatt_block_indexes") if n < options["layers"]],
    }
    table = {"kind": "merger", "norm": "rmsnorm", "norm_eps": NORM_EPS, "activation": "gelu"}
    module = PublishedModule(
        model="vit",
        options=options,
        feeds=("language",),
        projector={"language": table},
        patch=kernel(config)[1:],
    )
    if config.problems:
        return module  # Sizes that contradict each other have no recipes.
    prefix = config.prefix("patch_embed.proj.weight", "visual.")
    recipes = patches(f"{prefix}patch_embed.proj", options["hidden"], kernel(config), bias=False)
    recipes |= layers(options, NAMES, f"{prefix}blocks.")
    recipes |= merger(
        options, f"{prefix}merger.", MERGER, "projector.language", config.integer("out_hidden_size")
    )
    return attrs.evolve(module, recipes=recipes)


def language(config: Config) -> PublishedModule:
    """Return the language model."""
    options = llama.options_of(config) | {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    positions = config.integer("max_position_embeddings")
    options |= rotary(config, theta=1e6, plain=("default", "mrope"), max_positions=positions)
    options["rotary_sections"] = sections(config, options["head_width"], otherwise=[16, 24, 24])
    return llama.module_of(config, options | qwen2.windows(config))


def model_of(
    config: Config, table: Config, vision: PublishedModule, text: PublishedModule, *, per_second: int
) -> Model:
    """Return the model of a tower, whose table is `table`, and a language model."""
    out, hidden = table.integer("out_hidden_size"), text.options["hidden"]
    if out != hidden:
        table.problem(
            "out_hidden_size", f"is {out}, and the language model is {hidden} wide.", "Make them equal."
        )
    image, video = (config.integer(f"{kind}_token_id", least=0) for kind in ("image", "video"))
    return Model(
        modules={"vision": vision, "language": text},
        placeholders={
            "image": Placeholder(module="vision", token=image),
            "video": Placeholder(module="vision", token=video, per_second=per_second),
        },
    )


def read(config: Config) -> Model:
    """Return both modules. In files of old the language model has no table of its own."""
    table = config.within("vision_config", defaults=DEFAULTS_VISION)
    text = config.within("text_config", defaults=DEFAULTS_TEXT)
    text = text if text.values else attrs.evolve(config, defaults=DEFAULTS_TEXT)
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    text = attrs.evolve(text, values={**text.values, "tie_word_embeddings": tied})
    per_second = table.integer("tokens_per_second")
    return model_of(config, table, tower(table), language(text), per_second=per_second)


FAMILIES = (
    Family(
        model_type="qwen2_5_vl",
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        defaults=DEFAULTS,
        read=read,
    ),
)
