"""Batches of transformers' own processors train as they are, with the loss and gradients of transformers."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import END, FRAMES, IMAGE, MELS, PATCH, SIDE, START, VIDEO, VOCABULARY, make
from mimogrid.shell.run.reference import losses_and_gradients, reference
from mimogrid.shell.world.launch import Pool


FIRST_LETTER = 10
SPECIAL = {"<s>": START, "</s>": END, "<video>": VIDEO, "<image>": IMAGE}


def tokenizer() -> Any:
    """One token for each letter, and the special tokens of the tiny checkpoints."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | SPECIAL
    letters = {chr(ord("a") + i): FIRST_LETTER + i for i in range(26)}
    taken = {*words.values(), *letters.values()}
    filler = {f"<{i}>": i for i in range(VOCABULARY) if i not in taken}
    split = Tokenizer(models.WordLevel(words | letters | filler, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=[*SPECIAL],
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def picture(height: int, width: int) -> Image.Image:
    """A picture of noise."""
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _llava() -> Mapping[str, Any]:
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    texts = ["ab<image>cd", "text alone", "x<image>yz<image>w"]
    return processor(
        images=[picture(n, 16) for n in (20, 16, 30)], text=texts, return_tensors="pt", padding=True
    )


def _qwen_vl() -> Mapping[str, Any]:
    """The whole processor needs torchvision, for videos; a picture has a token for each square of its patches."""
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 1600},
    )
    made = pictures(images=[picture(n, 16) for n in (20, 16, 30)], return_tensors="pt")
    first, *others = ("<s>" + "<image>" * (int(grid.prod()) // 4) + "</s>" for grid in made["image_grid_thw"])
    texts = [f"ab{first}cd", "text alone", f"x{others[0]}yz{others[1]}w"]
    return {**tokenizer()(texts, return_tensors="pt", padding=True), **made}


def _qwen_audio() -> Mapping[str, Any]:
    rate, hop = 16_000, 1600
    processor = transformers.Qwen2AudioProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(
            feature_size=MELS, sampling_rate=rate, hop_length=hop, chunk_length=FRAMES[0] * hop // rate
        ),
        tokenizer=tokenizer(),
        audio_token="<image>",
        audio_bos_token="<s>",
        audio_eos_token="</s>",
    )
    texts = ["ab<s><image></s>cd", "text alone", "x<s><image></s>yz<s><image></s>w"]
    noise = np.random.default_rng(0)
    sounds = [noise.standard_normal(n, dtype=np.float32) for n in (32_000, 19_000, 13_000)]
    return processor(text=texts, audio=sounds, sampling_rate=rate, return_tensors="pt", padding=True)


PROCESSORS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "llava": _llava,
    "qwen2.5-vl": _qwen_vl,
    "qwen2-audio": _qwen_audio,
}


@pytest.mark.world
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processors_batch(pool: Pool, name: str) -> None:
    """Images of several sizes, two of them in a text, and a text without any."""
    given = dict(PROCESSORS[name]())
    tokens = given["input_ids"]
    given["labels"] = tokens.where((tokens >= FIRST_LETTER) & (tokens < START), -100)
    folder = make(name, Path(tempfile.mkdtemp(), name))
    layout = {
        "grids": {"audio" if name == "qwen2-audio" else "vision": {}, "language": {"tp": 2}},
        "precision": "fp64",
    }
    (seen,) = pool.run("publishing:steps", 3, folder, [layout], given)[0]
    theirs = losses_and_gradients(reference(folder), given)
    assert seen.loss == pytest.approx(theirs.loss, rel=1e-12)
    for tensor, gradient in theirs.gradients.items():
        np.testing.assert_allclose(
            seen.gradients[tensor], gradient.numpy(), rtol=0, atol=1e-9, err_msg=tensor
        )
