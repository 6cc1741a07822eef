"""Checkpoints: tiny random ones of every family, as transformers saves them, and batches as processors make them.

Sizes are odd on purpose: 3 layers, 6 heads with 2 key-value heads, a vocabulary of 259. Norms, biases and
positions are drawn too, so nothing that is forgotten goes unseen.

A batch is written as samples: a number is so many tokens of text, ``"*"`` an image or an audio clip, and
``"video"`` a video.
"""

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from mimogrid.core.models.positions import frames_after_pooling, frames_after_stride, merged, sinusoid


Piece = int | str
Sample = tuple[Piece, ...]
Batch = dict[str, torch.Tensor]

SAMPLES: tuple[Sample, ...] = ((3, "*", 4), (9,), (2, "*", 2, "*", 3), (1, "*", 6))
"""A sample with an image, one of text, one with two images, and another with one."""
VIDEOS: tuple[Sample, ...] = ((2, "video", 4), (3, "*", 2, "video", 2))

VOCABULARY = 259
START, END, VIDEO, IMAGE, PAD = 255, 256, 257, 258, 0
AUDIO = IMAGE
IGNORED = -100

GRIDS = ((1, 4, 6), (1, 8, 4), (1, 2, 2), (1, 10, 6))
CLIPS = ((2, 4, 6), (3, 8, 4))
FRAMES = (20, 13, 8)
SIDE, PATCH, MELS, FEATURES = 12, 4, 10, 3 * 2 * 4 * 4


# -- models

TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN_VIT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QWEN_VIT: Mapping[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_heads": 4,
    "patch_size": PATCH,
    "out_hidden_size": 48,
}
WHISPER: Mapping[str, Any] = {
    "num_mel_bins": MELS,
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "max_source_positions": FRAMES[0] // 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _llava(vision: str, layer: int, strategy: str, **more: Any) -> Any:
    return transformers.LlavaConfig(
        vision_config=getattr(transformers, vision)(**PLAIN_VIT, **more),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )


def _mrope(sections: Sequence[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections), **more}


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _mrope((2, 1, 1))},
        vision_config={**QWEN_VIT, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        **SPECIAL,
    )


def _qwen3_vl() -> Any:
    rope = _mrope((4, 2, 2), mrope_interleaved=True)
    vision = {**QWEN_VIT, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}
    return transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope}, vision_config=vision, **SPECIAL
    )


def _whisper() -> Any:
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 56}
    return transformers.WhisperConfig(
        **WHISPER,
        **decoder,
        vocab_size=VOCABULARY,
        max_target_positions=8,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _qwen2_audio() -> Any:
    return transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        audio_config=transformers.Qwen2AudioEncoderConfig(**WHISPER),
        audio_token_index=AUDIO,
    )


MODELS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**TEXT)),
    "llama3": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**TEXT, rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    "llama-biased": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(
            **TEXT,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        ),
    ),
    "qwen2": ("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "qwen2-windows": (
        "Qwen2ForCausalLM",
        lambda: transformers.Qwen2Config(
            **TEXT, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        lambda: transformers.Qwen3Config(**TEXT, head_dim=12, rope_parameters=YARN, rms_norm_eps=1e-5),
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **TEXT,
            head_dim=10,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        ),
    ),
    "clip": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**PLAIN_VIT)),
    "siglip": ("SiglipVisionModel", lambda: transformers.SiglipVisionConfig(**PLAIN_VIT)),
    "whisper": ("WhisperForConditionalGeneration", _whisper),
    "llava": ("LlavaForConditionalGeneration", lambda: _llava("CLIPVisionConfig", -2, "default")),
    "llava-siglip": ("LlavaForConditionalGeneration", lambda: _llava("SiglipVisionConfig", -1, "full")),
    "llava-dinov2": (
        "LlavaForConditionalGeneration",
        lambda: _llava("Dinov2Config", -2, "default", mlp_ratio=2),
    ),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
    "qwen2-audio": ("Qwen2AudioForConditionalGeneration", _qwen2_audio),
}
TOWERS = ("clip", "siglip", "whisper")
LANGUAGE = ("llama", "llama3", "llama-biased", "qwen2", "qwen2-windows", "qwen3", "qwen3-moe")
WHOLES = ("llava", "llava-siglip", "qwen2.5-vl", "qwen3-vl", "qwen2-audio")
WITH_VIDEOS = ("qwen2.5-vl", "qwen3-vl")
BY_THEIRS = ("llava-dinov2",)
"""Wholes whose tower is of no family here."""


def make(
    name: str, folder: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32, shard: str = "1GB"
) -> Path:
    """Write a random checkpoint of one of `MODELS` into a folder, in shards of a size; return the folder."""
    architecture, config = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, architecture)(config())
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            parameter.copy_(_drawn(weight, parameter, generator))
    transformers.utils.logging.disable_progress_bar()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def _drawn(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a weight of such a size that everything in the model has something to say."""
    if name.endswith(("encoder.embed_positions.weight", "audio_tower.embed_positions.weight")):
        return torch.tensor([sinusoid(position, parameter.shape[1]) for position in range(len(parameter))])
    drawn = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() == 1:
        return 1 + 0.2 * drawn if name.endswith("weight") else 0.2 * drawn
    if "embed" in name and "patch" not in name:
        return 0.3 * drawn
    width = parameter.shape[-1] if parameter.dim() == 3 and "experts" in name else parameter[0].numel()
    return drawn / math.sqrt(width)


def rename(folder: Path, pattern: str, replacement: str) -> None:
    """Rename tensors of a checkpoint of one file, to what older versions wrote."""
    path = folder / "model.safetensors"
    tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


# -- batches


def padded_left(batch: Batch) -> Batch:
    """Return a batch with the padding of its text on the left; the first token of a sample has no label."""
    counts = batch["attention_mask"].sum(dim=1)
    turned = {
        key: torch.stack([row.roll(int(len(row) - count)) for row, count in zip(tensor, counts, strict=True)])
        for key, tensor in batch.items()
        if tensor.shape == batch["input_ids"].shape
    }
    first = turned["attention_mask"].diff(dim=1, prepend=torch.zeros(len(counts), 1).long()) > 0
    return batch | turned | {"labels": turned["labels"].masked_fill(first, IGNORED)}


def batch(name: str, seed: int = 0, samples: Sequence[Sample] | None = None) -> Batch:
    """Return a batch for a model, padded on the right; a tower's has no tokens and no labels."""
    generator = torch.Generator().manual_seed(seed)
    if name in TOWERS:
        return _rows_alone(name, generator)
    if samples is None:
        samples = [
            tuple(p for p in sample if name in (*WHOLES, *BY_THEIRS) or p != "*") for sample in SAMPLES
        ]
    segments = {"*": _segments(name, generator), "video": _videos(name, generator)}
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    tokens: list[list[int]] = []
    for sample in samples:
        tokens.append([])
        for piece in sample:
            if isinstance(piece, int):
                tokens[-1] += torch.randint(3, START, (piece,), generator=generator).tolist()
            else:
                inside, tensors = next(segments[piece])
                tokens[-1] += inside
                for key, tensor in tensors.items():
                    rows[key].append(tensor)
    return _padded(name, tokens, generator) | {key: torch.cat(parts) for key, parts in rows.items()}


def _padded(name: str, samples: Sequence[Sequence[int]], generator: torch.Generator) -> Batch:
    """Return tokens, mask and labels; about a third of the text has no label, and no other token has one."""
    length = max(map(len, samples))
    tokens = torch.tensor([[*sample, *[PAD] * (length - len(sample))] for sample in samples])
    text = (tokens > PAD) & (tokens < START)
    labelled = text & (torch.rand(tokens.shape, generator=generator) < 2 / 3)
    mask = torch.tensor([[place < len(sample) for place in range(length)] for sample in samples]).long()
    made = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(~labelled, IGNORED)}
    if name in WITH_VIDEOS:
        made["mm_token_type_ids"] = ((tokens == IMAGE) + 2 * (tokens == VIDEO)).int()
    return made


def _rows_alone(name: str, generator: torch.Generator) -> Batch:
    if name == "whisper":
        return {"input_features": torch.randn(2, MELS, FRAMES[0], generator=generator)}
    return {"pixel_values": torch.randn(3, 3, SIDE, SIDE, generator=generator)}


Segment = tuple[list[int], Batch]


def _segments(name: str, generator: torch.Generator) -> Iterator[Segment]:
    """Yield the images or clips of a model: their tokens, and what its processor makes of them."""
    if name in WITH_VIDEOS:
        return _patches(GRIDS, generator)
    return _clips(generator) if name == "qwen2-audio" else _images(name, generator)


def _images(name: str, generator: torch.Generator) -> Iterator[Segment]:
    """Yield images of one size; the class token has no row in the language model."""
    while True:
        image = torch.randn(1, 3, SIDE, SIDE, generator=generator)
        yield [IMAGE] * (SIDE // PATCH) ** 2, {"pixel_values": image}


def _patches(grids: Iterable[tuple[int, int, int]], generator: torch.Generator) -> Iterator[Segment]:
    """Yield images of several sizes, between two tokens that say so."""
    for grid in itertools.cycle(grids):
        patches = torch.randn(math.prod(grid), FEATURES, generator=generator)
        tokens = [START, *[IMAGE] * math.prod(merged(grid, 2)), END]
        yield tokens, {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}


def _videos(name: str, generator: torch.Generator) -> Iterator[Segment]:
    """Yield videos: one run of tokens for Qwen2.5-VL; for Qwen3-VL a run a frame, after a timestamp of two tokens."""
    for grid in itertools.cycle(CLIPS):
        frames, rows, columns = merged(grid, 2)
        tensors = {
            "pixel_values_videos": torch.randn(math.prod(grid), FEATURES, generator=generator),
            "video_grid_thw": torch.tensor([grid]),
        }
        if name == "qwen3-vl":
            frame = [START, *[VIDEO] * (rows * columns), END]
            yield [token for index in range(frames) for token in (10 + index, 9, *frame)], tensors
        else:
            tensors["second_per_grid_ts"] = torch.tensor([0.6])
            yield [START, *[VIDEO] * (frames * rows * columns), END], tensors


def _clips(generator: torch.Generator) -> Iterator[Segment]:
    """Yield audio of several lengths, all padded to the longest that the model takes."""
    for frames in itertools.cycle(FRAMES):
        mask = (torch.arange(FRAMES[0]) < frames).long()[None]
        features = torch.randn(1, MELS, FRAMES[0], generator=generator)
        rows = frames_after_pooling(frames_after_stride(frames))
        yield [START, *[AUDIO] * rows, END], {"input_features": features, "feature_attention_mask": mask}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by name."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return {name: tuple(tensor.shape) for file in files for name, tensor in load_file(file).items()}
