"""Tiny checkpoints: one random model of transformers for each family, of odd sizes, written in a second.

A new family is a line in `MODELS`; what is tested of all families is then tested of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.utils import logging

from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.models.network import Model
from mimogrid.shell.job.jobfile import CONVERTER


logging.disable_progress_bar()
logging.set_verbosity_error()

TEXT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 259,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {
    **TEXT,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "mlp_only_layers": [1],
}
IMAGE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 14,
    "patch_size": 4,
}
WORDS: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 8,
    "vocab_size": 259,
    "max_position_embeddings": 7,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
AUDIO: dict[str, Any] = {
    "encoder_layers": 3,
    "d_model": 12,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "num_mel_bins": 5,
    "max_source_positions": 11,
}
DECODER: dict[str, Any] = {
    "decoder_layers": 1,
    "decoder_ffn_dim": 8,
    "decoder_attention_heads": 3,
    "vocab_size": 259,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
QWEN_IMAGE: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 24,
    "num_heads": 3,
    "intermediate_size": 20,
    "patch_size": 4,
    "out_hidden_size": 24,
}
QWEN25_VL: dict[str, Any] = {
    "vision_config": {**QWEN_IMAGE, "fullatt_block_indexes": [1], "window_size": 16},
    "text_config": {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]},
    },
}
QWEN3_VL: dict[str, Any] = {
    "vision_config": {**QWEN_IMAGE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
    "text_config": {
        **TEXT,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    },
}
TOKENS: dict[str, Any] = {"image_token_id": 250, "video_token_id": 251}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llava(vision: hf.PreTrainedConfig, text: hf.PreTrainedConfig, **options: Any) -> hf.PreTrainedModel:
    """A LLaVA of a tower and a language model."""
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=250, **options)
    return hf.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
    "llama-3": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**TEXT, rope_parameters=LLAMA3, attention_bias=True)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT)),
    "qwen2-tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, head_dim=8)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**MOE, head_dim=8)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)),
    "clip-both": lambda: hf.CLIPModel(
        hf.CLIPConfig(vision_config=IMAGE, text_config=WORDS, projection_dim=6)
    ),
    "siglip-both": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=IMAGE, text_config=WORDS)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**IMAGE)),
    "whisper": lambda: hf.WhisperModel(hf.WhisperConfig(**AUDIO, **DECODER)),
    "llava": lambda: llava(hf.CLIPVisionConfig(**IMAGE), hf.LlamaConfig(**TEXT)),
    "llava-siglip": lambda: llava(
        hf.SiglipVisionConfig(**IMAGE), hf.Qwen2Config(**TEXT), vision_feature_select_strategy="full"
    ),
    "qwen2.5-vl": lambda: hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(**QWEN25_VL, **TOKENS)),
    "qwen3-vl": lambda: hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(**QWEN3_VL, **TOKENS)),
    "qwen2-audio": lambda: hf.Qwen2AudioForConditionalGeneration(
        hf.Qwen2AudioConfig(
            audio_config=hf.Qwen2AudioEncoderConfig(**AUDIO),
            text_config=hf.Qwen2Config(**TEXT),
            audio_token_index=250,
        )
    ),
}


def published_modules(model: Model) -> dict[str, ModuleSpec]:
    """The modules of a checkpoint as a job has them."""
    return {name: CONVERTER.structure(module.table(), ModuleSpec) for name, module in model.modules.items()}


def save(name: str, folder: Path, **options: Any) -> Path:
    """Write a tiny checkpoint, with the same random weights each time; `options` are those of `save_pretrained`."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **options)
    return folder
