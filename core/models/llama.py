"""Llama (2, 3): RMS norms, gated MLPs, no biases, rotary positions; and what its successors share with it."""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.mapping import Stored, whole
from mimogrid.core.models.network import PublishedModule
from mimogrid.core.models.rotary import rotary
from mimogrid.core.models.stack import Mlp, Names, layers, norm


NAMES: Names = {
    "attention_norm": "input_layernorm",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": "mlp.down_proj",
}
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}


def options_of(config: Config) -> dict[str, Any]:
    """Return the options that every language model of this kind has; biases are those that the file asks for."""
    hidden, heads = config.integer("hidden_size"), config.count("num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else config.count("num_key_value_heads")
    config.expect_divisor("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if config.get("head_dim") is None:
        config.expect_divisor("num_attention_heads", heads, "hidden_size", hidden)
    config.expect_zero("attention_dropout")
    return {
        "layers": config.layers("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": hidden // heads if config.get("head_dim") is None else config.integer("head_dim"),
        "ffn": config.integer("intermediate_size"),
        "vocab": config.integer("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings"),
        "norm": "rmsnorm",
        "norm_eps": config.number("rms_norm_eps"),
        "activation": config.activation("hidden_act"),
        "gated": True,
        "qkv_bias": bool(config.get("attention_bias")),
        "out_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
    }


def module_of(
    config: Config, options: dict[str, Any], mlp_of: Mlp | None = None, at: str = "model."
) -> PublishedModule:
    """Return a language model with such options and names as Llama's; `at` is what those but the head's begin with."""
    module = PublishedModule(model="gpt", options=options)
    if config.problems:
        return module  # Sizes that contradict each other have no recipes.
    prefix = config.prefix("embed_tokens.weight", at)
    table = (options["vocab"], options["hidden"])
    recipes = {"embedding.weight": whole(Stored(f"{prefix}embed_tokens.weight", table))}
    recipes |= layers(options, NAMES, f"{prefix}layers.", mlp_of)
    recipes |= norm(options, f"{prefix}norm", "final_norm")
    head = f"{config.prefix('lm_head.weight')}lm_head.weight"
    if not options["tied_embeddings"]:
        recipes["output.weight"] = whole(Stored(head, table))
    elif head in config.names:
        return attrs.evolve(module, recipes=recipes, copies={head: f"{prefix}embed_tokens.weight"})
    return attrs.evolve(module, recipes=recipes)


def read(config: Config) -> PublishedModule:
    """Return the language model of a Llama."""
    options = options_of(config)
    positions = config.integer("max_position_embeddings")
    return module_of(config, options | rotary(config, max_positions=positions))


FAMILIES = (
    Family(
        model_type="llama", architectures=("LlamaForCausalLM",), defaults=DEFAULTS, read=read, role="language"
    ),
)
