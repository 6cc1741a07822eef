"""Families against what transformers writes: every tensor of a file is in one recipe, and is written back as it was."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor

from mimogrid.core.models import (
    clip,
    llama,
    llava,
    qwen2,
    qwen2_5_vl,
    qwen2_audio,
    qwen3,
    qwen3_vl,
    siglip,
    whisper,
)
from mimogrid.core.models.families import read_config
from mimogrid.core.models.mapping import Recipe, inverse, shard_rows, slices
from mimogrid.core.models.network import Model
from tiny_checkpoints import MODELS, TEXT, save


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    """Each family."""
    return str(request.param)


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A tiny checkpoint of it."""
    return save(name, tmp_path)


def config_of(folder: Path) -> dict[str, Any]:
    """What the config file says."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """What the file holds."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping


def read(
    recipe: Recipe, tensors: Mapping[str, Tensor], rows: Any = None, columns: range | None = None
) -> Tensor:
    """One of our tensors, or a shard of it, from a file."""
    height = recipe.shape[0] if rows is None else sum(map(len, rows))
    width = recipe.columns if columns is None else len(columns)
    ours = torch.zeros(height, width)
    for piece in slices(recipe, rows, columns):
        block = tensors[piece.name][tuple(slice(*bounds) for bounds in piece.bounds)]
        ours[piece.rows.start : piece.rows.stop] = block.reshape(len(piece.rows), width)
    return ours if len(recipe.shape) > 1 else ours.flatten()


def written(model: Model, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on disk, from ours."""
    return {
        tensor.name: torch.cat([ours[source.name][source.start : source.stop] for source in sources]).view(
            tensor.shape
        )
        for tensor, sources in inverse(model.recipes()).items()
    }


def check(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of a file is in one recipe or carried, and what is written is what was read."""
    assert not list(model.differences({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    ours = {name: read(recipe, tensors) for name, recipe in model.recipes().items()}
    back = written(model, ours)
    carried = {name: tensor for name, tensor in tensors.items() if model.is_carried(name)}
    assert not carried.keys() & back.keys()
    assert tensors.keys() == carried.keys() | back.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in back.items())
    parameters = sum(recipe.stored_values for recipe in model.recipes().values())
    assert sum(t.numel() for t in tensors.values()) == parameters + sum(t.numel() for t in carried.values())


def test_every_tensor_once(folder: Path) -> None:
    """A file that transformers writes is the image of our parameters, and names follow from the config alone."""
    config, tensors = config_of(folder), tensors_of(folder)
    model = read_config(config, tensors)
    check(model, tensors)
    assert model == read_config(config)


def test_names_in_memory(name: str, tmp_path: Path) -> None:
    """Names and fused tensors as transformers 5 has them in memory are read too."""
    tensors = tensors_of(save(name, tmp_path, save_original_format=False))
    check(read_config(config_of(tmp_path), tensors), tensors)


OLD: Mapping[str, tuple[str, str]] = {
    "clip": (r"^", "vision_model."),
    "siglip": (r"^", "vision_model."),
    "whisper": (r"^", "model."),
    "llava": (r"^vision_tower\.", "vision_tower.vision_model."),
    "llava-siglip": (r"^vision_tower\.", "vision_tower.vision_model."),
}


@pytest.mark.parametrize("name", OLD)
def test_old_prefixes(name: str, tmp_path: Path) -> None:
    """Prefixes of old files are found by themselves."""
    folder = save(name, tmp_path)
    tensors = {re.sub(*OLD[name], key): tensor for key, tensor in tensors_of(folder).items()}
    check(read_config(config_of(folder), tensors), tensors)


def test_shards(folder: Path) -> None:
    """A shard that is read by itself is the shard of the whole, by rows in blocks and by columns."""
    tensors = tensors_of(folder)
    for name, recipe in read_config(config_of(folder), tensors).recipes().items():
        full = read(recipe, tensors)
        blocks = 2 if name.endswith(("mlp.up.weight", "mlp.up.bias")) else 1
        if recipe.shape[0] % (2 * blocks) == 0:
            rows = shard_rows(recipe.shape[0], rank=1, ranks=2, blocks=blocks)
            assert torch.equal(torch.cat([full[r.start : r.stop] for r in rows]), read(recipe, tensors, rows))
        if name.endswith(("out.weight", "down.weight")):
            columns = range(recipe.columns // 2, recipe.columns)
            assert torch.equal(full[:, columns.start :], read(recipe, tensors, columns=columns))


def test_fused_qkv(tmp_path: Path) -> None:
    """Rows of a fused qkv are, for each key-value head, its queries, its key, its value; gates come first in mlp.up."""
    tensors = tensors_of(save("qwen2", tmp_path))
    recipes = read_config(config_of(tmp_path), tensors).recipes()
    at = "model.layers.1."
    q, k, v = (tensors[f"{at}self_attn.{x}_proj.weight"].view(2, -1, 24) for x in "qkv")
    assert torch.equal(
        torch.cat((q, k, v), dim=1).flatten(0, 1),
        read(recipes["language.layers.1.attention.qkv.weight"], tensors),
    )
    gate, up = (tensors[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(torch.cat((gate, up)), read(recipes["language.layers.1.mlp.up.weight"], tensors))


def test_no_bias_of_keys(tmp_path: Path) -> None:
    """Whisper's keys have no bias: its rows are zeros that are never written."""
    tensors = tensors_of(save("whisper", tmp_path))
    model = read_config(config_of(tmp_path), tensors)
    bias = read(model.modules["audio"].recipes["layers.0.attention.qkv.bias"], tensors).view(3, 3, 4)
    assert not bias[:, 1].any()
    assert bias[:, 0].all()
    assert ("positions.weight",) == model.modules["audio"].frozen


def test_what_is_carried(tmp_path: Path) -> None:
    """What a whole does not use is carried: the last layer and the norms behind it, and what pools rows."""
    tensors = tensors_of(save("llava-siglip", tmp_path))
    model = read_config(config_of(tmp_path), tensors)
    carried = {
        re.sub(r"(layers\.\d+|head|post_layernorm).*", r"\1", name)
        for name in tensors
        if model.is_carried(name)
    }
    tower = "vision_tower"
    assert {f"{tower}.encoder.layers.2", f"{tower}.post_layernorm", f"{tower}.head"} == carried
    vision = model.modules["vision"]
    assert (2, False) == (vision.options["layers"], vision.options["final_norm"])
    assert {f"layers.{n}" for n in (0, 1)} == {
        name[:8] for name in vision.recipes if name.startswith("layers.")
    }


# -- what a file may leave out -----------------------------------------------------------------------------

CLASSES: Mapping[str, tuple[Mapping[str, Any], Callable[[], hf.PreTrainedConfig]]] = {
    "llama": (llama.DEFAULTS, hf.LlamaConfig),
    "qwen2": (qwen2.DEFAULTS, hf.Qwen2Config),
    "qwen3": (qwen3.DEFAULTS, hf.Qwen3Config),
    "qwen3-moe": (qwen3.DEFAULTS_MOE, hf.Qwen3MoeConfig),
    "clip": (clip.DEFAULTS, hf.CLIPVisionConfig),
    "siglip": (siglip.DEFAULTS, hf.SiglipVisionConfig),
    "whisper": (whisper.DEFAULTS, hf.WhisperConfig),
    "qwen2-audio": (qwen2_audio.DEFAULTS_AUDIO, hf.Qwen2AudioEncoderConfig),
    "llava": (llava.DEFAULTS, hf.LlavaConfig),
    "qwen2.5-vl text": (qwen2_5_vl.DEFAULTS_TEXT, lambda: hf.Qwen2_5_VLConfig().text_config),
    "qwen2.5-vl vision": (qwen2_5_vl.DEFAULTS_VISION, lambda: hf.Qwen2_5_VLConfig().vision_config),
    "qwen3-vl text": (qwen3_vl.DEFAULTS_TEXT, lambda: hf.Qwen3VLConfig().text_config),
    "qwen3-vl vision": (qwen3_vl.DEFAULTS_VISION, lambda: hf.Qwen3VLConfig().vision_config),
}


@pytest.mark.parametrize("name", CLASSES)
def test_defaults(name: str) -> None:
    """What a family takes for what a file leaves out is what transformers takes."""
    defaults, of = CLASSES[name]
    fields = type(of()).__dataclass_fields__
    ours = {key: value for key, value in defaults.items() if key in fields}
    theirs = {key: fields[key].default for key in ours}
    assert {k: v or None for k, v in ours.items()} == {k: _plain(v) or None for k, v in theirs.items()}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


HUB: Mapping[str, dict[str, Any]] = {
    "llama-3.1": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16",
    },
    "qwen2.5 with yarn and windows": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **TEXT,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **TEXT,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "rope_theta": 1000000.0,
    },
    "llava-1.5": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    },
    "qwen2.5-vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **TEXT,
        "hidden_size": 48,
        "image_token_id": 151655,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 70,
        "vision_config": {
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_heads": 3,
            "in_chans": 3,
            "out_hidden_size": 48,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    },
}
"""Config files as they were written before transformers 5, with layers as small as can be."""


@pytest.mark.parametrize("name", HUB)
def test_files_of_old(name: str, tmp_path: Path) -> None:
    """An old config file says the same as the one that transformers makes of it now."""
    old = HUB[name]
    hf.AutoConfig.for_model(old["model_type"]).from_dict(old).save_pretrained(tmp_path)
    assert read_config(config_of(tmp_path)) == read_config(old)


# -- rows --------------------------------------------------------------------------------------------------


def test_rows_of_llava(tmp_path: Path) -> None:
    """An image of 14 x 14 pixels is 9 patches of 4 x 4; the class token is dropped."""
    folder = save("llava", tmp_path)
    model = read_config(config_of(folder))
    vision, image = model.modules["vision"], model.placeholders["image"]
    features = hf.LlavaForConditionalGeneration.from_pretrained(folder).get_image_features(
        torch.zeros(1, 3, 14, 14)
    )
    (rows,) = features.pooler_output
    assert len(rows) == vision.rows_out(vision.grid_of(1, 14, 14)) == 9
    assert (250, "vision") == (image.token, image.module)
    with pytest.raises(
        ValueError, match=r"makes a grid of \(1, 4, 3\), and the module takes \(1, 3, 3\) only"
    ):
        vision.grid_of(1, 16, 14)


def test_rows_of_llava_15() -> None:
    """LLaVA 1.5 has 576 rows of the tower's 577."""
    model = read_config(HUB["llava-1.5"])
    assert 577 == model.modules["vision"].options["position_count"]
    assert 576 == model.rows_of("image", 1, 336, 336)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_rows_of_qwen(name: str, tmp_path: Path) -> None:
    """Patches of 4 x 4 pixels in two frames are merged 2 x 2."""
    folder = save(name, tmp_path)
    vision = read_config(config_of(folder)).modules["vision"]
    grid = vision.grid_of(4, 16, 24)
    pixels = torch.zeros(math.prod(grid), vision.options["features"])
    features = hf.AutoModelForImageTextToText.from_pretrained(folder).get_image_features(
        pixels, torch.tensor([grid])
    )
    (rows,) = features.pooler_output
    assert ((2, 4, 6), 12) == (grid, len(rows)) == (grid, vision.rows_out(grid))
    with pytest.raises(ValueError, match="is no whole number of patches"):
        vision.grid_of(2, 16, 22)
    with pytest.raises(ValueError, match="cannot be merged 2 by 2"):
        vision.rows_out((1, 4, 5))


def test_rows_of_audio(tmp_path: Path) -> None:
    """A convolution takes every other frame, and pairs of rows are averaged."""
    folder = save("qwen2-audio", tmp_path)
    audio = read_config(config_of(folder)).modules["audio"]
    encoder = hf.Qwen2AudioForConditionalGeneration.from_pretrained(folder).model.audio_tower
    lengths = torch.arange(1, 23)
    _, rows = encoder._get_feat_extract_output_lengths(lengths)
    assert rows.tolist() == [audio.rows_out(audio.grid_of(frames)) for frames in lengths.tolist()]
    assert encoder(torch.zeros(1, 5, 22)).last_hidden_state.shape[1] == audio.rows_out((22,))
