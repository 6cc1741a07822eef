"""Makes a tiny LLaVA with random weights, and a store of conversations about strips of handwritten digits.

    python examples/llava/make.py FOLDER

    FOLDER/checkpoint/            config.json, safetensors, tokenizer, processor and chat template
    FOLDER/train.json             conversations as LLaVA's, with images in FOLDER/images; a few have none
    FOLDER/held_out.json          strips of digits that are in no image of train.json

A strip has one to four of scikit-learn's scans side by side, 8 x 32 pixels with black to the right. The processor
stretches it to 32 x 32. A patch of 8 x 8 then has two rows of pixels of one digit, so the tower must join four patches.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from mimogrid.shell.job.sources.digits import SIDE, Digits, digits


MOST = 4
TRAIN, HELD_OUT = 20_000, 300
INIT = 0.1  # With the usual 0.02 a model of this width learns late.
PIXELS, PATCH = 32, 8
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PAD, _, BEGIN, END, IMAGE = range(5)
WORDS = (*SPECIAL, "USER:", "ASSISTANT:", "Read", "Copy", "Count", "the", "digits", "|", *"0123456789")
TEMPLATE = """{{ bos_token }}
{%- for message in messages -%}
  {%- if message.role == "user" %} USER:
    {%- for part in message.content %} {{ "<image>" if part.type == "image" else part.text }}{% endfor -%}
  {%- else %} ASSISTANT:
    {%- generation %}{% for part in message.content %} {{ part.text }}{% endfor %} {{ eos_token }}{% endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %} ASSISTANT:{% endif %}"""
"""Only what an assistant says, and the end of it, is marked as generated."""


def main() -> None:
    """Write a checkpoint and both stores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=TRAIN, help="conversations for training")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="conversations that are held out")
    args = parser.parse_args()
    checkpoint(args.folder / "checkpoint")
    source = digits(0, ("vision",), ("language",))
    store(args.folder, "train", source, args.train)
    store(args.folder, "held_out", source.held_out(task="read"), args.held_out)


# -- the checkpoint ----------------------------------------------------------------------------------------


def checkpoint(folder: Path, *, hidden: int = 64) -> None:
    """Write a LLaVA with random weights, and its processor."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=3,  # LLaVA reads the rows of the second.
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH,
        hidden_act="gelu",
        initializer_range=INIT,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        initializer_range=INIT,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, initializer_range=INIT
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor().save_pretrained(folder)


def processor() -> transformers.LlavaProcessor:
    """Return what makes tokens and pixels of conversations."""
    words = models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = transformers.CLIPImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS},
        do_center_crop=False,
        image_mean=[0.2] * 3,
        image_std=[0.3] * 3,
    )
    return transformers.LlavaProcessor(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which LLaVA drops
        chat_template=TEMPLATE,
    )


# -- the stores --------------------------------------------------------------------------------------------


def store(folder: Path, name: str, source: Digits, count: int) -> list[dict[str, Any]]:
    """Write a store of conversations and its images; return its records."""
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    records = [conversation(folder, name, source, number) for number in short(source, count)]
    (folder / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return records


def short(source: Digits, count: int) -> Iterator[int]:
    """Yield the first ids of samples of at most `MOST` digits."""
    number = 0
    while count:
        if len(source.answer(number)) <= MOST:
            count -= 1
            yield number
        number += 1


def conversation(folder: Path, name: str, source: Digits, number: int) -> dict[str, Any]:
    """Return the record of a sample; write its image, if it has one."""
    answer, image = source.answer(number), source.image(number)
    record: dict[str, Any] = {"id": f"{name}-{number}"}
    prompt = source.spell(source.prompt(number, "language"))
    if image.size:
        strip = np.zeros((SIDE, SIDE * MOST), np.uint8)
        strip[:, : image.shape[1]] = np.round(255 * image.clip(0, 1))
        record["image"] = f"{name}/{number}.png"
        Image.fromarray(strip).save(folder / "images" / name / f"{number}.png")
        prompt = "<image>\nRead the digits"
    prompt = prompt.removesuffix(" =").replace("copy", "Copy").replace("count", "Count")
    turns = (("human", prompt), ("gpt", " ".join(map(str, answer))))
    return record | {"conversations": [{"from": side, "value": value} for side, value in turns]}


if __name__ == "__main__":
    main()
