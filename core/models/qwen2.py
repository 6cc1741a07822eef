"""Qwen2 and 2.5: a Llama with biases on query, key and value, and perhaps sliding windows."""

from collections.abc import Mapping
from typing import Any

from mimogrid.core.models import llama
from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.network import PublishedModule
from mimogrid.core.models.rotary import rotary


DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "attention_dropout": 0.0,
}


def windows(config: Config) -> dict[str, Any]:
    """Return the options `window` and `full_layers`.

    A token sees itself and the `window` - 1 before it, save in the full layers.
    """
    layers, size = config.layers("num_hidden_layers"), config.get("sliding_window")
    first = config.integer("max_window_layers", least=0)
    window = size if config.flag("use_sliding_window") else None
    by_number = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    types = config.names_in("layer_types") or by_number
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        message = f"has {', '.join(unknown)}, attention that there is none of here."
        config.problem("layer_types", message, "Known: full_attention, sliding_attention.")
    elif len(types) != layers:
        config.problem(
            "layer_types", f"has {len(types)} entries for {layers} layers.", "Write one for each layer."
        )
    elif "sliding_attention" in types and (type(window) is not int or window < 1):
        message = f"is {window}, and layer_types has sliding_attention."
        config.problem("sliding_window", message, "Give the window a size, and set use_sliding_window.")
    elif "sliding_attention" in types:
        return {
            "window": window,
            "full_layers": [i for i, kind in enumerate(types) if kind == "full_attention"],
        }
    return {}


def read(config: Config) -> PublishedModule:
    """Return the language model of a Qwen2."""
    positions = config.integer("max_position_embeddings")
    options = llama.options_of(config) | {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    return llama.module_of(config, options | rotary(config, max_positions=positions) | windows(config))


FAMILIES = (
    Family(
        model_type="qwen2", architectures=("Qwen2ForCausalLM",), defaults=DEFAULTS, read=read, role="language"
    ),
)
