"""Stores: small ones of images and sounds, tiny models to read them, and indexes made in this process."""

import concurrent.futures
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import soundfile
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import checkpoints
from mimogrid.shell.data.index import Index
from mimogrid.shell.data.indexing import Making, build


T = TypeVar("T")
LLAVA = Path(__file__).parents[2] / "examples" / "llava"


class Inline(concurrent.futures.Executor):
    """A pool that computes at once, in this process, and counts."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[T]":
        """Compute at once."""
        self.submitted += 1
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def example(name: str) -> ModuleType:
    """Return a file of the LLaVA example as a module."""
    spec = importlib.util.spec_from_file_location(f"llava_{name}", LLAVA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image(folder: Path, name: str, seed: int = 0, size: tuple[int, int] = (32, 8)) -> str:
    """Write an image of noise; return its name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return name


def sound(folder: Path, name: str, seed: int = 0, *, seconds: float = 0.5, rate: int = 16_000) -> str:
    """Write a sound of noise; return its name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate)), rate)
    return name


def listener(folder: Path) -> Path:
    """Write a tiny Qwen2-Audio with its processor, which hears a second of 16 kHz; return the folder."""
    checkpoints.make("qwen2-audio", folder)
    words = {
        word: number for number, word in enumerate((*LISTENED, *map(str, range(checkpoints.START - 20))))
    }
    words |= {
        "<|audio_bos|>": checkpoints.START,
        "<|audio_eos|>": checkpoints.END,
        "<|AUDIO|>": checkpoints.AUDIO,
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    audio = {
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=audio, **special
    )
    mels = transformers.WhisperFeatureExtractor(
        feature_size=checkpoints.MELS, chunk_length=1, hop_length=800, n_fft=1600
    )
    transformers.Qwen2AudioProcessor(mels, fast, chat_template=HEARD).save_pretrained(folder)
    return folder


LISTENED = ("<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "What", "is", "it", "A", "bird", "cat")
HEARD = """{{ bos_token }}
{%- for message in messages -%}
  {%- if message.role == "user" %} USER:
    {%- for part in message.content -%}
      {%- if part.type == "audio" %} <|audio_bos|> <|AUDIO|> <|audio_eos|>{% else %} {{ part.text }}{% endif -%}
    {%- endfor -%}
  {%- else %} ASSISTANT:{% for part in message.content %} {{ part.text }}{% endfor %} {{ eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %} ASSISTANT:{% endif %}"""


def record(
    number: int, *images: str, question: str = "Read the digits", answer: str = "3 1 4"
) -> dict[str, Any]:
    """Return a record in LLaVA's form."""
    turns = (("human", "<image>\n" * len(images) + question), ("gpt", answer))
    found: dict[str, Any] = {"id": f"r{number}"}
    if images:
        found["image"] = images[0] if len(images) == 1 else list(images)
    return found | {"conversations": [{"from": side, "value": value} for side, value in turns]}


def write_lines(store: Path, records: Sequence[Any]) -> Path:
    """Write a store of JSON lines; bytes are written as they are."""
    lines = (each if isinstance(each, bytes) else json.dumps(each).encode() for each in records)
    store.write_bytes(b"".join(line + b"\n" for line in lines))
    return store


def indexed(
    store: Path,
    checkpoint: Path,
    *,
    media: Path | None = None,
    out: Path | None = None,
    max_tokens: int = 0,
    columns: Mapping[str, str] | None = None,
) -> tuple[Index, int]:
    """Make an index beside a store; return it, and how many parts were made for it."""
    pool, out = Inline(), out or store.with_suffix(".index")
    making = Making(
        store=store,
        media=media or store.parent,
        processor=checkpoint,
        max_tokens=max_tokens,
        columns=tuple(sorted((columns or {}).items())),
    )
    build(making, out, pool, ahead=4)
    return Index(out), pool.submitted
