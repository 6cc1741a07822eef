"""Families from config files alone: what a job says, and one clear problem for each thing that is wrong."""

from typing import Any

import pytest

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.models.families import BY_ARCHITECTURE, read_config


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 259,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
SLIDING = {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
CLIP = {
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "image_size": 12,
    "patch_size": 4,
}
LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {**LLAMA, "model_type": "llama"},
    "vision_config": {**CLIP, "model_type": "clip_vision_model"},
}
TOWER: dict[str, Any] = {"depth": 3, "hidden_size": 24, "num_heads": 3, "out_hidden_size": 48}
QWEN_VL: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": {**LLAMA, "hidden_size": 48, "rope_parameters": {"mrope_section": [2, 1, 1]}},
    "vision_config": {**TOWER, "fullatt_block_indexes": [0, 2, 7]},
}
QWEN3_VL: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "text_config": {
        **LLAMA,
        "hidden_size": 48,
        "head_dim": 8,
        "rope_parameters": {"mrope_section": [2, 1, 1]},
    },
    "vision_config": {**TOWER, "deepstack_visual_indexes": [0, 2]},
}
MOE = {**LLAMA, "architectures": ["Qwen3MoeForCausalLM"]}


def problem(config: dict[str, Any]) -> Problem:
    """The one problem of a config file."""
    with pytest.raises(PlanError) as raised:
        read_config(config)
    (found,) = raised.value.problems
    return found


def test_the_table_of_a_llama() -> None:
    """A job file says of a module what is not as in the built-in models."""
    assert {
        "model": "gpt",
        "options": {
            "layers": 2,
            "hidden": 24,
            "heads": 6,
            "kv_heads": 2,
            "ffn": 40,
            "vocab": 259,
            "norm": "rmsnorm",
            "norm_eps": 1e-6,
            "activation": "silu",
            "gated": True,
            "qkv_bias": False,
            "out_bias": False,
            "mlp_bias": False,
        },
    } == read_config(LLAMA).modules["language"].table()


def test_the_tables_of_a_llava() -> None:
    """The tower ends at the layer that is taken, and its edge has two linear layers."""
    model = read_config(LLAVA)
    vision = model.modules["vision"].table()
    assert ["vision", "language"] == list(model.modules)
    assert {"language": {"kind": "mlp", "ffn": 24, "activation": "gelu", "bias": True}} == vision["projector"]
    assert ["language"] == vision["feeds"]
    assert {
        "layers": 2,
        "hidden": 12,
        "heads": 3,
        "ffn": 3072,
        "features": 48,
        "activation": "quick_gelu",
        "positions": "learned",
        "position_count": 10,
        "class_token": True,
        "patch_bias": False,
        "pre_norm": True,
        "final_norm": False,
    } == vision["options"]


def test_the_tables_of_the_vl_models() -> None:
    """Windows count in merged rows, sections are those of the file, and deepstack is on both sides."""
    old, new = read_config(QWEN_VL), read_config(QWEN3_VL)
    vision = old.modules["vision"].options
    assert (2, 4, [0, 2]) == (vision["merge"], vision["window"], vision["full_layers"])
    assert [2, 1, 1] == old.modules["language"].options["rotary_sections"]
    assert [0, 2] == new.modules["vision"].options["deepstack_layers"]
    language = new.modules["language"].options
    assert (2, True) == (language["deepstack"], language["rotary_sections_interleaved"])
    assert (4, 0) == (old.placeholders["video"].per_second, new.placeholders["video"].per_second)


@pytest.mark.parametrize(("layer", "layers"), [(-1, 3), (-2, 2), (-3, 1), (1, 1), (3, 3)])
def test_layers_of_a_tower(layer: int, layers: int) -> None:
    """A tower ends at the layer whose rows are read; hidden states count from 0, before the first layer."""
    model = read_config({**LLAVA, "vision_feature_layer": layer, "vision_feature_select_strategy": "full"})
    vision = model.modules["vision"]
    assert layers == vision.options["layers"]
    assert {f"layers.{n}." for n in range(layers)} == {
        n[:9] for n in vision.recipes if n.startswith("layers.")
    }
    assert 10 == model.rows_of("image", 1, 12, 12)
    assert 9 == read_config(LLAVA).rows_of("image", 1, 12, 12)


def test_windows() -> None:
    """Windows slide in the layers from the first on; those before are full."""
    options = read_config(SLIDING).modules["language"].options
    assert (8, [0]) == (options["window"], options["full_layers"])
    listed = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
    assert [1] == read_config(listed).modules["language"].options["full_layers"]
    assert "window" not in read_config(QWEN2).modules["language"].options


def test_experts() -> None:
    """Every second layer has experts, save the listed ones."""
    config = {
        **MOE,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "num_local_experts": 3,
    }
    language = read_config(config).modules["language"]
    assert [0, 2, 3] == language.options["dense_layers"]
    assert {"1"} == {name.split(".")[1] for name in language.recipes if ".experts." in name}


def test_the_first_architecture_counts() -> None:
    """A type without an architecture is that of a model that generates."""
    of_type = {key: value for key, value in LLAMA.items() if key != "architectures"} | {"model_type": "llama"}
    assert read_config(LLAMA) == read_config(of_type)


def test_every_architecture_is_known_once() -> None:
    """No two families claim a name."""
    names = [name for family in set(BY_ARCHITECTURE.values()) for name in family.architectures]
    assert len(BY_ARCHITECTURE) == len(names) > 10


ROPE = "config.json: rope_scaling"
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown architecture": (
        {"architectures": ["Qwen2ForCausalML"], "hidden_act": "mish"},
        "config.json: architectures",
        "'Qwen2ForCausalML' is no architecture",
    ),
    "another head": (
        {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
        "config.json: architectures",
        "no architecture that is known",
    ),
    "nothing": ({}, "config.json: model_type", "names no architecture"),
    "an unknown tower": (
        {**LLAVA, "vision_config": {"model_type": "pixtral"}},
        "config.json: vision_config.model_type",
        "is 'pixtral', no architecture that is known for vision",
    ),
    "a language model as a tower": (
        {**LLAVA, "vision_config": {"model_type": "llama"}},
        "config.json: vision_config.model_type",
        "no architecture that is known for vision",
    ),
    "a quantized checkpoint": (
        {**LLAMA, "quantization_config": {"quant_method": "awq"}},
        "config.json: quantization_config",
        "is quantized",
    ),
    "an unknown activation": ({**LLAMA, "hidden_act": "mish"}, "config.json: hidden_act", "is 'mish'"),
    "a wrong kind": (
        {**LLAMA, "hidden_size": "24"},
        "config.json: hidden_size",
        'is "24"; expected an integer',
    ),
    "heads that do not divide": (
        {**LLAMA, "num_attention_heads": 5, "num_key_value_heads": 5},
        "config.json: num_attention_heads",
        "is 5",
    ),
    "groups that do not divide": (
        {**LLAMA, "num_key_value_heads": 4},
        "config.json: num_key_value_heads",
        "is 4",
    ),
    "dropout": ({**LLAMA, "attention_dropout": 0.1}, "config.json: attention_dropout", "is 0.1"),
    "an unknown rope type": (
        {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ROPE,
        "type 'dynamic'",
    ),
    "sections in a model without": ({**LLAMA, "rope_scaling": {"type": "mrope"}}, ROPE, "type 'mrope'"),
    "a scaling that lacks a number": (
        {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ROPE,
        "lacks low_freq_factor, high_freq_factor",
    ),
    "rotary positions by layer": (
        {**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "config.json: rope_parameters",
        "different in different layers",
    ),
    "partial rotary positions": (
        {**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}},
        "config.json: rope_parameters",
        "a part of each head",
    ),
    "a base that is no number": (
        {**LLAMA, "rope_theta": "1e4"},
        "config.json: rope_parameters.rope_theta",
        'is "1e4"',
    ),
    "no table": (
        {**LLAMA, "rope_scaling": "linear"},
        "config.json: rope_scaling",
        'is "linear"; expected a table',
    ),
    "windows smaller than a row": (
        {**QWEN_VL, "vision_config": {**TOWER, "window_size": 14}},
        "config.json: vision_config.window_size",
        "is 14 pixels",
    ),
    "sections that do not add up": (
        {
            **QWEN_VL,
            "text_config": {**QWEN_VL["text_config"], "rope_parameters": {"mrope_section": [2, 2, 2]}},
        },
        "config.json: text_config.rope_parameters",
        "has sections of [2, 2, 2] angles; a head of width 8 has 4",
    ),
    "unknown attention": (
        {**QWEN2, "layer_types": ["full_attention", "linear_attention"]},
        "config.json: layer_types",
        "has linear_attention",
    ),
    "too few types": (
        {**QWEN2, "layer_types": ["full_attention"]},
        "config.json: layer_types",
        "1 entries for 2 layers",
    ),
    "a window without a size": (
        {**QWEN2, "layer_types": ["sliding_attention"] * 2},
        "config.json: sliding_window",
        "is None",
    ),
    "several layers taken": (
        {**LLAVA, "vision_feature_layer": [-2, -5]},
        "config.json: vision_feature_layer",
        "is [-2, -5]",
    ),
    "a layer that is not there": (
        {**LLAVA, "vision_feature_layer": -4},
        "config.json: vision_feature_layer",
        "is -4",
    ),
    "no class token to drop": (
        {**LLAVA, "vision_config": {**CLIP, "model_type": "siglip_vision_model"}},
        "config.json: vision_feature_select_strategy",
        "the tower has none",
    ),
    "widths that do not meet": (
        {**QWEN_VL, "vision_config": {**TOWER, "out_hidden_size": 24}},
        "config.json: vision_config.out_hidden_size",
        "is 24, and the language model is 48 wide",
    ),
    "positions that are no square": (
        {**QWEN3_VL, "vision_config": {**QWEN3_VL["vision_config"], "num_position_embeddings": 15}},
        "config.json: vision_config.num_position_embeddings",
        "is 15",
    ),
    "deepstack of no layer": (
        {**QWEN3_VL, "vision_config": {**TOWER, "deepstack_visual_indexes": [1, 3]}},
        "config.json: vision_config.deepstack_visual_indexes",
        "is [1, 3]",
    ),
    "an auxiliary loss": (
        {**MOE, "output_router_logits": True},
        "config.json: output_router_logits",
        "auxiliary loss",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_problem(name: str) -> None:
    """What is wrong is said once, with its place and a way out."""
    config, where, message = BAD[name]
    found = problem(config)
    assert where == found.where
    assert message in found.message
    assert found.remedy


def test_all_problems_at_once() -> None:
    """Several mistakes are several problems."""
    with pytest.raises(PlanError) as raised:
        read_config({**LLAMA, "hidden_act": "mish", "rope_scaling": {"type": "dynamic"}, "vocab_size": 0})
    assert {"hidden_act", "rope_scaling", "vocab_size"} == {
        p.where.split(": ")[1] for p in raised.value.problems
    }


def test_tensors_that_differ() -> None:
    """A missing, a surplus and a misshapen tensor are named; tables that nothing reads are not surplus."""
    model = read_config(LLAMA)
    shapes = {tensor.name: tensor.shape for recipe in model.recipes().values() for tensor in recipe.tensors}
    assert not list(model.differences({**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}))
    lacking = {name: shape for name, shape in shapes.items() if "norm" not in name}
    changed = {**lacking, "model.extra.weight": (1,), "lm_head.weight": (260, 24)}
    missing, surplus, misshapen = (str(found) for found in model.differences(changed))
    assert "lacks 5 tensors: model.layers.0.input_layernorm.weight" in missing
    assert "has besides 1 tensor: model.extra.weight" in surplus
    assert "has in another shape 1 tensor: lm_head.weight ((260, 24), not (259, 24))" in misshapen
