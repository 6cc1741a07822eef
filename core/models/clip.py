"""CLIP's vision tower: a class token, learnt positions, a norm before the layers and none behind."""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.mapping import Stored, whole
from mimogrid.core.models.network import Model, PublishedModule
from mimogrid.core.models.stack import Names, layers, norm, patches


NAMES: Names = {
    "attention_norm": "layer_norm1",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}


def tower(
    config: Config, *, class_token: bool, patch_bias: bool, pre_norm: bool, final_norm: bool
) -> PublishedModule:
    """Return a vision tower with learnt positions for images of one size."""
    config.expect_zero("attention_dropout")
    patch, pixels = config.integer("patch_size"), config.integer("image_size")
    side, channels = pixels // patch, config.integer("num_channels")
    hidden, heads = config.integer("hidden_size"), config.count("num_attention_heads")
    config.expect_divisor("num_attention_heads", heads, "hidden_size", hidden)
    options: dict[str, Any] = {
        "layers": config.layers("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "ffn": config.integer("intermediate_size"),
        "features": channels * patch**2,
        "norm_eps": config.number("layer_norm_eps"),
        "activation": config.activation("hidden_act"),
        "positions": "learned",
        "position_count": side**2 + class_token,
        "class_token": class_token,
        "patch_bias": patch_bias,
        "pre_norm": pre_norm,
        "final_norm": final_norm,
    }
    module = PublishedModule(model="vit", options=options, patch=(1, patch, patch), grid=(1, side, side))
    if config.problems:
        return module  # Sizes that contradict each other have no recipes.
    prefix = config.prefix("embeddings.patch_embedding.weight")
    position = Stored(f"{prefix}embeddings.position_embedding.weight", (options["position_count"], hidden))
    recipes = patches(
        f"{prefix}embeddings.patch_embedding", hidden, (channels, patch, patch), bias=patch_bias
    )
    recipes |= {"positions.weight": whole(position)}
    if class_token:
        recipes["class_token"] = whole(Stored(f"{prefix}embeddings.class_embedding", (hidden,)))
    if pre_norm:
        recipes |= norm(options, f"{prefix}pre_layrnorm", "pre_norm")
    recipes |= layers(options, NAMES, f"{prefix}encoder.layers.")
    if final_norm:
        recipes |= norm(options, f"{prefix}post_layernorm", "final_norm")
    return attrs.evolve(module, recipes=recipes, carried=() if final_norm else (f"{prefix}post_layernorm.*",))


def read(config: Config) -> PublishedModule:
    """Return CLIP's vision tower; the norm behind it is of the class token, for what compares images with texts."""
    return tower(config, class_token=True, patch_bias=False, pre_norm=True, final_norm=False)


def read_both(config: Config) -> Model:
    """Return the vision tower of a checkpoint that has a text tower too; that is carried."""
    kind = f"{config.get('model_type')}_vision_model"
    module = config.part("vision_config", role="vision", otherwise=kind, at="vision_model.")
    carried = ("text_model.*", "text_projection.*", "visual_projection.*", "logit_scale", "logit_bias")
    return Model(modules={"vision": attrs.evolve(module, carried=(*module.carried, *carried))})


FAMILIES = (
    Family(
        model_type="clip_vision_model",
        architectures=("CLIPVisionModel",),
        defaults=DEFAULTS,
        read=read,
        role="vision",
    ),
    Family(model_type="clip", architectures=("CLIPModel",), defaults={}, read=read_both),
)
