"""Mangled checkpoints: tiny folders with one edit each, read by a process whose memory and time are limited.

    python tests/support/mangled.py SEED COUNT

An edit is of config.json, of the index or of a header: of its values, or of its bytes. What is read must be refused
with a PlanError, or be what the library safetensors reads, and give a job that is legal or refused with a PlanError.
"""

import contextlib
import copy
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mimogrid.core.base.errors import PlanError
from mimogrid.core.models.families import read_config
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.published import CONFIG, INDEX, ONE_FILE, Published, published


MEMORY = 200 * 2**20
SECONDS = 10

TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
    "vocab_size": 9,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
VISION = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "image_size": 4,
    "patch_size": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 8,
    "num_heads": 2,
    "intermediate_size": 6,
    "patch_size": 2,
    "out_hidden_size": 8,
    "window_size": 8,
    "fullatt_block_indexes": [1],
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **VISION},
    "text_config": {"model_type": "llama", **TEXT},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "image_token_index": 5,
}
AUDIO = {
    "encoder_layers": 2,
    "d_model": 8,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 6,
    "num_mel_bins": 3,
    "max_source_positions": 5,
    "activation_function": "gelu",
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0]}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": LLAMA3, **TEXT},
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 1e5,
        "head_dim": None,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        **TEXT,
    },
    {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "attention_dropout": 0.0,
        **TEXT,
    },
    {"architectures": ["Qwen3ForCausalLM"], "head_dim": 4, "rope_parameters": YARN, **TEXT},
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 3,
        "mlp_only_layers": [1],
        "head_dim": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        **TEXT,
    },
    LLAVA,
    {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": QWEN_VISION,
        "text_config": {**TEXT, "rope_parameters": SECTIONS},
        "image_token_id": 3,
        "video_token_id": 4,
    },
    {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "vision_config": {**QWEN_VISION, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
        "text_config": {**TEXT, "head_dim": 2, "rope_parameters": {**SECTIONS, "mrope_interleaved": True}},
    },
    {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": AUDIO,
        "text_config": TEXT,
        "audio_token_index": 5,
    },
)

POOL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 2**60, 2**63 - 1, -(2**63), 2**64, 10**30),
    *(0.0, -1.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "default", "yarn", "silu", "\0", "é" * 300, "../../etc/passwd", "F8_E4M3", "I8", "F64"),
    *([], {}, [None], ["full_attention"], [0, 1], [-1], [2**60, 2**60], {"a": {"b": 1}}, [[[[]]]]),
)


SAMPLES = """
[data]
source = "mimogrid.shell.job.host:samples"
options = { sequence = 16 }
[batch]
global_size = 2
"""


# -- edits -------------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container within a value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def edited(value: Any, draw: random.Random) -> Any:
    """Return a value with one thing in it changed, moved, doubled, renamed or gone."""
    value = copy.deepcopy(value)
    found = list(places(value))
    holder, key = draw.choice(found)
    other_holder, other = draw.choice(found)
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1:
            holder[key] = copy.deepcopy(other_holder[other])
        case 2 if isinstance(holder, dict):
            holder[draw.choice(["", "x", str(other), "quantization_config"])] = holder.pop(key)
        case 3 if type(holder[key]) in {int, float}:
            holder[key] += draw.choice([-1, 1, -8, 8, 0.5, 10**6])
        case 4:
            nested: Any = draw.choice(POOL)
            for _ in range(draw.choice([1, 40, 900])):
                nested = [nested]
            holder[key] = nested
        case _:
            holder[key] = draw.choice(POOL)
    return value


def scribbled(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with some of them changed, gone or added."""
    at = draw.randrange(len(data) + 1)
    match draw.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(draw.choices(range(256), k=draw.randrange(1, 5))) + data[at:]
        case 2:
            return data[:at] + b"[" * 20_000 + data[at:]
        case _:
            return data[:at] + bytes(draw.choices(range(256), k=3)) + data[at + 3 :]


def edit_text(path: Path, draw: random.Random) -> None:
    """Edit a file of JSON."""
    text = path.read_text(encoding="utf-8")
    if draw.random() < 0.8:
        path.write_text(json.dumps(edited(json.loads(text), draw)), encoding="utf-8")
    else:
        path.write_bytes(scribbled(text.encode(), draw))


def edit_header(path: Path, draw: random.Random) -> None:
    """Edit the header of a file of safetensors, or the length before it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    by_value = draw.random() < 0.7
    header = json.dumps(edited(json.loads(header), draw)).encode() if by_value else scribbled(header, draw)
    length = len(header)
    if draw.random() < 0.15:
        length = draw.choice([0, 1, length - 1, length + 1, 2**32, 2**60, 2**64 - 1])
    if draw.random() < 0.1:
        values = scribbled(values, draw)
    path.write_bytes(length.to_bytes(8, "little") + header + values)


def spoil(folder: Path, draw: random.Random) -> None:
    """Put something else in the place of a file."""
    path = folder / draw.choice([CONFIG, INDEX, *(p.name for p in folder.glob("*.safetensors"))])
    if not path.exists():
        return
    path.unlink()
    match draw.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path)
        case 2:
            path.touch()
        case _:
            pass


# -- checkpoints -------------------------------------------------------------------------------------------


def write(folder: Path, config: dict[str, Any], *, shards: int) -> None:
    """Write a checkpoint of zeros."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    stored = {t.name: t.shape for recipe in read_config(config).recipes().values() for t in recipe.tensors}
    carried = {"vision_tower.post_layernorm.weight": (8,)} if "vision_feature_layer" in config else {}
    names = sorted([*stored, *carried])
    files = [ONE_FILE] if shards == 1 else [f"model-{i}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names[i::shards]:
            shape, begin = (stored | carried)[name], end
            end += 2 * _product(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    if shards > 1:
        places = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def check(folder: Path) -> bool:
    """Read a checkpoint and a job of it; return whether it was accepted. Raises what must not be raised."""
    published.cache_clear()
    try:
        found = published(folder)
    except PlanError as error:
        if vague := [p for p in error.problems if not (p.where and p.message and p.remedy)]:
            raise AssertionError(vague) from error
        return False
    _check_against_safetensors(folder, found)
    modules = "".join(f'[modules.{name}]\nweights = "."\n' for name in found.model.modules)
    job = folder / "job.toml"
    job.write_text(modules + SAMPLES)
    with contextlib.suppress(PlanError):
        open_job(job)
    return True


def _check_against_safetensors(folder: Path, found: Published) -> None:
    for file in {tensor.file for tensor in found.tensors.values()}:
        with safe_open(folder / file, "np") as read:
            for name, tensor in found.tensors.items():
                if tensor.file == file:
                    piece = read.get_slice(name)
                    assert (piece.get_dtype(), tuple(piece.get_shape())) == (tensor.dtype, tensor.shape), name


def attempt(folder: Path, draw: random.Random) -> bool:
    """Write a checkpoint, edit it, and check it."""
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, draw.choice(CONFIGS), shards=draw.choice([1, 1, 3]))
    edits: list[tuple[Callable[[Path, random.Random], None], Path]] = [(edit_text, folder / CONFIG)] * 3
    edits += [(edit_header, path) for path in folder.glob("*.safetensors")]
    edits += [(edit_text, folder / INDEX)] if (folder / INDEX).exists() else []
    edits += [(spoil, folder)]
    edit, path = draw.choice(edits)
    edit(path, draw)
    return check(folder)


def main(seed: int, count: int) -> int:
    """Check so many checkpoints; print what must not have been raised."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    accepted = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(seed, seed + count):
            signal.alarm(SECONDS)
            try:
                accepted += attempt(Path(folder, "checkpoint"), random.Random(i))
            except Exception:
                wrong += 1
                sys.stdout.write(f"seed {i}: {traceback.format_exc()}")
    sys.stdout.write(f"{count} edits, {accepted} accepted, {wrong} wrong\n")
    return bool(wrong) or not 0 < accepted < count


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
