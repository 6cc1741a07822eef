"""Whisper's encoder: two convolutions over frames of sound, the second at every other; a table of positions."""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.mapping import Stored, whole
from mimogrid.core.models.network import PublishedModule
from mimogrid.core.models.stack import Names, layers, norm


NAMES: Names = {
    "attention_norm": "self_attn_layer_norm",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
DEFAULTS: Mapping[str, Any] = {
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "encoder_layerdrop": 0.0,
    "activation_function": "gelu",
    "d_model": 384,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_source_positions": 1500,
}


def encoder(config: Config, at: str = "") -> PublishedModule:
    """Return the encoder, whose names begin with `at`; its positions never train, as in transformers."""
    config.expect_zero("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")
    hidden, heads = config.integer("d_model"), config.count("encoder_attention_heads")
    config.expect_divisor("encoder_attention_heads", heads, "d_model", hidden)
    options: dict[str, Any] = {
        "layers": config.layers("encoder_layers"),
        "hidden": hidden,
        "heads": heads,
        "ffn": config.integer("encoder_ffn_dim"),
        "features": config.integer("num_mel_bins"),
        "activation": config.activation("activation_function"),
        "k_bias": False,
        "positions": "learned",
        "position_count": config.integer("max_source_positions"),
        "stem": "whisper",
    }
    module = PublishedModule(model="vit", options=options, frozen=("positions.weight",), patch=(1,))
    if config.problems:
        return module  # Sizes that contradict each other have no recipes.
    prefix = config.prefix("conv1.weight", at)
    table = Stored(f"{prefix}embed_positions.weight", (options["position_count"], hidden))
    recipes = {"positions.weight": whole(table)}
    for name, width in (("conv1", options["features"]), ("conv2", hidden)):
        recipes[f"input.{name}.weight"] = whole(Stored(f"{prefix}{name}.weight", (hidden, width, 3)))
        recipes[f"input.{name}.bias"] = whole(Stored(f"{prefix}{name}.bias", (hidden,)))
    recipes |= layers(options, NAMES, f"{prefix}layers.") | norm(options, f"{prefix}layer_norm", "final_norm")
    return attrs.evolve(module, recipes=recipes)


def read(config: Config) -> PublishedModule:
    """Return the encoder of a whole Whisper, whose decoder is carried."""
    return attrs.evolve(encoder(config, "encoder."), carried=("decoder.*", "model.decoder.*", "proj_out.*"))


FAMILIES = (
    Family(
        model_type="whisper",
        architectures=("WhisperModel", "WhisperForConditionalGeneration"),
        defaults=DEFAULTS,
        read=read,
        role="audio",
    ),
)
