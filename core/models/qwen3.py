"""Qwen3: a Qwen2 with norms on query and key instead of biases; and Qwen3-MoE, with experts in its layers."""

from collections.abc import Mapping
from typing import Any

from mimogrid.core.models import llama, qwen2
from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.mapping import Stored, part_of, whole
from mimogrid.core.models.network import PublishedModule
from mimogrid.core.models.rotary import rotary
from mimogrid.core.models.stack import Names, Options, Recipes, mlp


DEFAULTS: Mapping[str, Any] = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}
DEFAULTS_MOE: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "mlp_only_layers": [],
}


def options_of(config: Config) -> dict[str, Any]:
    """Return the options that dense and sparse models share."""
    positions = config.integer("max_position_embeddings")
    return (
        llama.options_of(config)
        | rotary(config, max_positions=positions)
        | {"mlp_bias": False, "qk_norm": True}
    )


def read(config: Config) -> PublishedModule:
    """Return the language model of a Qwen3."""
    return llama.module_of(config, options_of(config) | qwen2.windows(config))


def read_moe(config: Config) -> PublishedModule:
    """Return the language model of a Qwen3-MoE: experts in every so-many-th layer, save in the listed ones."""
    if config.get("output_router_logits"):
        message = "is true: transformers then adds an auxiliary loss that is not that of a job here."
        config.problem(
            "output_router_logits", message, "Write false, and give the module the option aux_loss."
        )
    layers, step = config.layers("num_hidden_layers"), config.integer("decoder_sparse_step")
    listed = set(config.integers("mlp_only_layers"))
    slides = config.flag("use_sliding_window") and config.get("sliding_window")
    options: dict[str, Any] = {
        "window": config.integer("sliding_window") if slides else 0,
        "experts": config.count(config.written("num_local_experts", "num_experts"), least=0),
        "top_k": config.integer("num_experts_per_tok"),
        "expert_ffn": config.integer("moe_intermediate_size"),
        "norm_top_k": config.flag("norm_topk_prob"),
        "dense_layers": [n for n in range(layers) if n in listed or (n + 1) % step],
    }

    def mlp_of(options: Options, names: Names, disk: str, layer: int) -> Recipes:
        ours = f"layers.{layer}."
        if not options["experts"] or layer in options["dense_layers"]:
            return mlp(options, names, disk, ours, ffn=options["ffn"])
        router = whole(Stored(f"{disk}mlp.gate.weight", (options["experts"], options["hidden"])))
        fused = f"{disk}mlp.experts.gate_up_proj" in config.names
        return {f"{ours}mlp.router.weight": router} | (_together if fused else _apart)(options, disk, ours)

    return llama.module_of(config, options_of(config) | options, mlp_of)


def _apart(options: Options, disk: str, ours: str) -> Recipes:
    """Experts with tensors of their own."""
    names: Names = {"mlp.up": ("gate_proj", "up_proj"), "mlp.down": "down_proj"}
    recipes: Recipes = {}
    for e in range(options["experts"]):
        expert = mlp(options, names, f"{disk}mlp.experts.{e}.", "", ffn=options["expert_ffn"])
        recipes |= {
            name.replace("mlp.", f"{ours}mlp.experts.{e}.", 1): recipe for name, recipe in expert.items()
        }
    return recipes


def _together(options: Options, disk: str, ours: str) -> Recipes:
    """All experts of a layer in two tensors, as transformers 5 has them in memory."""
    experts, hidden, ffn = options["experts"], options["hidden"], options["expert_ffn"]
    up = Stored(f"{disk}mlp.experts.gate_up_proj", (experts, 2 * ffn, hidden))
    down = Stored(f"{disk}mlp.experts.down_proj", (experts, hidden, ffn))
    recipes: Recipes = {}
    for e in range(experts):
        recipes[f"{ours}mlp.experts.{e}.up.weight"] = part_of(up, e, experts, (hidden,))
        recipes[f"{ours}mlp.experts.{e}.down.weight"] = part_of(down, e, experts, (ffn,))
    return recipes


FAMILIES = (
    Family(
        model_type="qwen3", architectures=("Qwen3ForCausalLM",), defaults=DEFAULTS, read=read, role="language"
    ),
    Family(
        model_type="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        defaults=DEFAULTS_MOE,
        read=read_moe,
        role="language",
    ),
)
