"""Asks transformers what a LLaVA reads in the strips of a store, and says how many answers are right.

    python examples/llava/answer.py CHECKPOINT FOLDER/held_out.json

`generate` of transformers answers the first turn of every conversation, greedily; a right answer is right to the last
digit.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image


AT_ONCE = 50


def main() -> None:
    """Print the wrong answers, and how many are right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("store", type=Path)
    args = parser.parse_args()
    records = json.loads(args.store.read_text(encoding="utf-8"))
    given = answers(args.checkpoint, records, args.store.parent / "images")
    true = [record["conversations"][1]["value"] for record in records]
    wrong = [each for each in zip(records, given, true, strict=True) if each[1] != each[2]]
    for record, answer, truth in wrong:
        print(f"{record['id']}: {truth} is read as {answer}")
    right = len(true) - len(wrong)
    print(f"exact {right} of {len(true)}: {right / len(true):.1%}")


def answers(checkpoint: Path, records: Sequence[dict[str, Any]], images: Path) -> list[str]:
    """Return what the model says to the first turn of each conversation."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    given: list[str] = []
    for start in range(0, len(records), AT_ONCE):
        asked = [question(record, images) for record in records[start : start + AT_ONCE]]
        batch = processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            made = model.generate(**batch, max_new_tokens=8, do_sample=False)
        given += processor.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return given


def question(record: dict[str, Any], images: Path) -> list[dict[str, Any]]:
    """Return the first turn of a record as messages of transformers."""
    text = record["conversations"][0]["value"].removeprefix("<image>\n")
    image = {"type": "image", "image": Image.open(images / record["image"])}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


if __name__ == "__main__":
    main()
