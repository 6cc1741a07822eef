"""Conversations: the items of a data set of the user's, encoded as samples by the processor of a checkpoint.

An item is a table of a conversation in a form that `shell.data.conversations` reads: `messages` with `role` and
`content`, or `conversations` with `from` and `value`. Images are objects of Pillow or names of files, in the content or
under `images`, in the order of their places.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from PIL import Image

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.models.network import Model
from mimogrid.shell.data.batches import Encoded
from mimogrid.shell.data.conversations import LeftOutError, conversation
from mimogrid.shell.data.encoding import Encoder


OBJECT = "\N{FRAME WITH PICTURE}"
"""What the names of images begin with that are objects and no files."""


@attrs.frozen(eq=False)
class Conversations:
    """A map-style data set, encoded item by item; `name` is what errors call it."""

    items: Any
    encoder: Encoder
    name: str

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, index: int) -> Encoded:
        """Return an item as a sample. Raises PlanError, which says what is wrong with it."""
        objects: dict[str, Image.Image] = {}
        try:
            raw = json.dumps(_named(self.items[index], objects)).encode()
            read = conversation(raw, str(index))
            named = [(medium.kind, medium.name or "") for medium in read.media]
            media = [
                objects[name] if name in objects else self.encoder.decoded(kind, _file(name), name)
                for kind, name in named
            ]
            return self.encoder.encode(read, media)
        except (LeftOutError, TypeError) as error:
            fact = f"{error.reason}: {error.fact}." if isinstance(error, LeftOutError) else f"{error}."
            remedy = "Give conversations as docs/data.md describes them, or leave this one out."
            raise PlanError([Problem(f"{self.name}[{index}]", fact, remedy)]) from None


def encoder_of(processor: Any, folder: Path, model: Model) -> Encoder:
    """Return the encoder of a processor; None: of the one in a checkpoint's folder. Raises PlanError."""
    if processor is None:
        return Encoder.of(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        raise PlanError(
            [
                Problem(
                    "processing_class",
                    "has no chat template.",
                    "Give it one: processor.chat_template = TEMPLATE.",
                )
            ]
        )
    return Encoder(processor, model, template)


def _named(value: Any, objects: dict[str, Image.Image]) -> Any:
    """Return a value with names in the place of images, which are kept by these names."""
    if isinstance(value, Image.Image):
        name = f"{OBJECT}{len(objects)}"
        objects[name] = value.convert("RGB")
        return name
    if isinstance(value, Mapping):
        return {key: _named(item, objects) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_named(item, objects) for item in value]
    return value


def _file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise LeftOutError("missing file", f"{name!r}: {error.strerror}") from None
