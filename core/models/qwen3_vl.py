"""Qwen3-VL: a tower with learnt and rotary positions, whose inner layers feed the first layers of a Qwen3 too."""

import math
from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models import llama, qwen2_5_vl
from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.mapping import Stored, whole
from mimogrid.core.models.network import Model, PublishedModule
from mimogrid.core.models.qwen2_5_vl import NORM_EPS, kernel, model_of, tower_options
from mimogrid.core.models.rotary import rotary, sections
from mimogrid.core.models.stack import Names, layers, merger, patches


NAMES: Names = {
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
}
MERGER = ("norm", "linear_fc1", "linear_fc2")
DEFAULTS_TEXT: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
DEFAULTS_VISION: Mapping[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def tower(config: Config) -> PublishedModule:
    """Return the tower, with its mergers: that of the last layer, and one for each layer of deepstack."""
    count, deep = config.integer("num_position_embeddings"), config.integers("deepstack_visual_indexes")
    if math.isqrt(count) ** 2 != count:
        config.problem(
            "num_position_embeddings", f"is {count}, which makes no square of positions.", "Check the file."
        )
    if deep != sorted(set(deep)) or not all(0 <= layer < config.layers("depth") for layer in deep):
        message = f"is {deep}; expected layers of the tower, each once and in order."
        config.problem("deepstack_visual_indexes", message, "Check the file.")
    options: dict[str, Any] = tower_options(config) | {
        "position_count": count,
        "position_interpolation": "bilinear",
        "deepstack_layers": deep,
    }
    module = PublishedModule(
        model="vit",
        options=options,
        feeds=("language",),
        projector={
            "language": {"kind": "merger", "norm": "layernorm", "norm_eps": NORM_EPS, "activation": "gelu"}
        },
        patch=kernel(config)[1:],
    )
    if config.problems:
        return module  # Sizes that contradict each other have no recipes.
    prefix, width = (
        config.prefix("patch_embed.proj.weight", "model.visual."),
        config.integer("out_hidden_size"),
    )
    recipes = patches(f"{prefix}patch_embed.proj", options["hidden"], kernel(config), bias=True)
    recipes["positions.weight"] = whole(Stored(f"{prefix}pos_embed.weight", (count, options["hidden"])))
    recipes |= layers(options, NAMES, f"{prefix}blocks.")
    recipes |= merger(options, f"{prefix}merger.", MERGER, "projector.language", width)
    for i in range(len(deep)):
        disk, ours = f"{prefix}deepstack_merger_list.{i}.", f"projector.language.deepstack.{i}"
        recipes |= merger(options, disk, MERGER, ours, width, wide=True)
    return attrs.evolve(module, recipes=recipes)


def language(config: Config, *, deepstack: int) -> PublishedModule:
    """Return the language model; rows of deepstack are added after its first layers."""
    positions = config.integer("max_position_embeddings")
    options = llama.options_of(config) | rotary(config, theta=5e5, max_positions=positions)
    options |= {
        "mlp_bias": False,
        "qk_norm": True,
        "rotary_sections": sections(config, options["head_width"], otherwise=[24, 20, 20]),
        "rotary_sections_interleaved": True,
        "deepstack": deepstack,
    }
    return llama.module_of(config, options, at="model.language_model.")


def read(config: Config) -> Model:
    """Return both modules. Frames of a video are segments apart, with their times written between them."""
    table = config.within("vision_config", defaults=DEFAULTS_VISION)
    text = config.within("text_config", defaults=DEFAULTS_TEXT)
    tied = {"tie_word_embeddings": config.flag("tie_word_embeddings")}
    text = attrs.evolve(text, values={**text.values, **tied})
    deepstack = len(table.integers("deepstack_visual_indexes"))
    return model_of(config, table, tower(table), language(text, deepstack=deepstack), per_second=0)


FAMILIES = (
    Family(
        model_type="qwen3_vl",
        architectures=("Qwen3VLForConditionalGeneration",),
        defaults=qwen2_5_vl.DEFAULTS,
        read=read,
    ),
)
