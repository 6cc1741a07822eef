"""Encoding: a conversation as tokens, labels, pixels and mels, by the processor and the chat template of a checkpoint.

Only what assistants say counts in the loss. A template may mark that itself (``{% generation %}``). Otherwise a turn
of an assistant is what the template writes between the conversation up to it, with the prompt for an answer, and the
conversation with it; blanks at its end do not count. Both must be the beginning of the whole, or the sample is left
out: a template that rewrites earlier turns does not say what an assistant has said.
"""

import bisect
import contextlib
import functools
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from PIL import Image, ImageOps

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.models.families import read_config
from mimogrid.core.models.network import Model
from mimogrid.shell.data.batches import IGNORED, Encoded, examples_of, segments_of
from mimogrid.shell.data.conversations import Conversation, LeftOutError, Medium, Turn


_KNOWN = ("attention_mask", "mm_token_type_ids", "token_type_ids")
"""What follows from the tokens."""
_MARKS = re.compile(r"\{%-?\s*generation\b")


@attrs.frozen(eq=False)
class Encoder:
    """The processor of a checkpoint, and the model that reads what it makes."""

    processor: Any
    model: Model
    template: str

    @classmethod
    def of(cls, folder: Path) -> "Encoder":
        """Return the encoder of a checkpoint's folder. Raises PlanError if it has no processor or no chat template."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with _silent():
                processor = transformers.AutoProcessor.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        except (OSError, ValueError, ImportError, KeyError, TypeError, RecursionError) as error:
            fact = next(iter(str(error).strip().splitlines()), type(error).__name__)
            remedy = "Name the folder of a checkpoint with its config.json, tokenizer and processor."
            raise PlanError([Problem(str(folder), f"has no processor: {fact}", remedy)]) from None
        tokenizer = getattr(processor, "tokenizer", processor)
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        if not template:
            remedy = "Give it one: processor.chat_template = TEMPLATE; processor.save_pretrained(FOLDER)."
            raise PlanError([Problem(str(folder), "its processor has no chat template.", remedy)])
        if not tokenizer.is_fast:
            remedy = "Use a checkpoint with a tokenizer.json."
            raise PlanError(
                [Problem(str(folder), "its tokenizer does not say where tokens come from.", remedy)]
            )
        return cls(processor, read_config(config), template)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """What no text of a turn may hold: it would be read as what the template or the processor writes."""
        added = self._tokenizer.added_tokens_decoder.values()
        special = {*self._tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return re.compile("|".join(map(re.escape, sorted(special))) or "(?!)")

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def _is_whole(self) -> bool:
        """Whether the processor reads more than text."""
        return self.processor is not self._tokenizer

    def encode(self, conversation: Conversation, media: Sequence[Any]) -> Encoded:
        """Return a conversation as a sample. Raises LeftOutError.

        Args:
            conversation: what is said.
            media: its images (Pillow's, in RGB) and sounds (waveforms, [samples] in float32), in their order.
        """
        for turn in conversation.turns:
            for part in turn.parts:
                if isinstance(part, str) and (found := self._special.search(part)):
                    raise LeftOutError("control token", f"its text holds {found.group()}")
        with _refusals():
            tokens, counted, batch = self._tokens(self._messages(conversation.turns, media))
            labels = [token if counts else IGNORED for token, counts in zip(tokens, counted, strict=True)]
            if all(label == IGNORED for label in labels[1:]):
                raise LeftOutError("no counted token", "no token of an assistant is left to learn")
            made = {"input_ids": torch.tensor([tokens]), "labels": torch.tensor([labels])}
            return examples_of(self.model, made | batch)[0]

    def decoded(self, kind: str, raw: bytes, name: str) -> Any:
        """Return an image, or a sound at the rate of the processor. Raises LeftOutError."""
        if kind == "image":
            return decoded(raw, name)
        if self._sounds is None:
            raise LeftOutError("processor", "the model reads no sounds")
        return waveform(raw, name, self._sounds.sampling_rate, getattr(self._sounds, "n_samples", None))

    def rows(self, kind: str, media: Sequence[Any]) -> torch.Tensor:
        """Return the rows that a tower reads of images, or of sounds: those of `encode`, without a text."""
        if kind == "image":
            made = self.processor.image_processor(list(media), return_tensors="pt")
        else:
            made = self._sounds(
                list(media),
                sampling_rate=self._sounds.sampling_rate,
                return_attention_mask=True,
                padding="max_length",
                return_tensors="pt",
            )
            made["feature_attention_mask"] = made.pop("attention_mask")
        return torch.cat([segment.rows for segment in segments_of(self.model, kind, made)])

    def module(self, kind: str) -> str:
        """Return the module that reads images or sounds."""
        return self.model.placeholders[kind].module

    @property
    def _sounds(self) -> Any:
        """What makes mels of sounds; None if nothing does."""
        return getattr(self.processor, "feature_extractor", None)

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        return str(self._tokenizer.decode(tokens))

    def _messages(self, turns: Sequence[Turn], media: Sequence[Any]) -> list[dict[str, Any]]:
        unused = iter(media)

        def content(part: str | Medium) -> dict[str, Any]:
            if isinstance(part, str):
                return {"type": "text", "text": part}
            return {"type": part.kind, part.kind: next(unused)}

        if self._is_whole:
            return [{"role": turn.role, "content": [content(part) for part in turn.parts]} for turn in turns]
        if media:
            raise LeftOutError("processor", "the model reads text only")
        return [{"role": turn.role, "content": "".join(map(str, turn.parts))} for turn in turns]

    def _tokens(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool], dict[str, torch.Tensor]]:
        """Return tokens, which of them count, and what the processor makes of the images."""

        def made(**more: Any) -> dict[str, Any]:
            asked = {"chat_template": self.template, "tokenize": True, "return_dict": True}
            batch = self.processor.apply_chat_template([messages], **asked, **more)
            return {name: values for name, values in batch.items() if name not in _KNOWN}

        if _MARKS.search(self.template):
            batch = made(return_assistant_tokens_mask=True)
            (tokens,), (counted,) = batch.pop("input_ids"), batch.pop("assistant_masks")
            return list(tokens), [bool(counts) for counts in counted], _tensors(batch)
        offsets = {"return_offsets_mapping": True}
        if self._is_whole:
            batch = made(processor_kwargs={**offsets, "return_text_replacement_offsets": True})
        else:
            batch = made(tokenizer_kwargs=offsets)
        (tokens,), (places,) = batch.pop("input_ids"), batch.pop("offset_mapping")
        (grown,) = batch.pop("text_replacement_offsets", None) or [[]]
        spans = [(_moved(start, grown), _moved(end, grown)) for start, end in self._spans(messages)]
        counted = [any(first < end and last > start for start, end in spans) for first, last in places]
        return list(tokens), counted, _tensors(batch)

    def _spans(self, messages: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """Yield where the turns of assistants begin and end in the text. Raises LeftOutError."""

        def rendered(count: int, **more: Any) -> str:
            text: str = self.processor.apply_chat_template(
                messages[:count], chat_template=self.template, tokenize=False, **more
            )
            return text

        whole = rendered(len(messages))
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = rendered(number, add_generation_prompt=True), rendered(number + 1)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise LeftOutError("template", f"turn {number} is written otherwise when another follows")
                yield len(before), len(after.rstrip())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Let transformers say nothing but errors."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what a template or a processor says of a sample into a reason to leave it out."""
    try:
        yield
    except LeftOutError:
        raise
    except TemplateError as error:
        raise LeftOutError("template", str(error)) from None
    except PlanError as error:
        raise LeftOutError("processor", error.problems[0].message) from None
    except Exception as error:
        raise LeftOutError("processor", f"{type(error).__name__}: {error}"[:200]) from None


def _tensors(made: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(each) for each in values]) for name, values in made.items()}


def _moved(place: int, grown: Sequence[Mapping[str, Any]]) -> int:
    """Return where a place of a text is after its markers have grown to one for each row."""
    before = bisect.bisect_right([each["span"][1] for each in grown], place)
    return place + (grown[before - 1]["new_span"][1] - grown[before - 1]["span"][1] if before else 0)


def decoded(raw: bytes, name: str) -> Image.Image:
    """Return an image as transformers loads one: upright, in RGB. Raises LeftOutError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return ImageOps.exif_transpose(_opened(raw)).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LeftOutError("huge image", f"{name!r}: {error}") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them
        raise LeftOutError("broken image", f"{name!r}: {error}"[:200]) from None


def _opened(raw: bytes) -> Image.Image:
    """Return an image that is not decoded yet. Raises ValueError for PostScript, which Pillow runs Ghostscript on."""
    image = Image.open(io.BytesIO(raw))
    if image.format == "EPS":
        raise ValueError("is PostScript")
    return image


def waveform(raw: bytes, name: str, rate: int, most: int | None) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return a sound as transformers loads one: the mean of its channels at a rate, [samples].

    Raises LeftOutError for one of more than `most` samples, which a processor would cut; PlanError without soundfile.
    """
    try:
        import soundfile  # noqa: PLC0415 -- who has no sounds needs none
        import soxr  # noqa: PLC0415
    except ImportError as error:
        remedy = "Install it: pip install 'mimogrid[data]'."
        raise PlanError([Problem(name, f"cannot be read: {error}.", remedy)]) from None
    if raw[:4] == b"RIFF" and len(raw) < 8 + int.from_bytes(raw[4:8], "little") < _STREAMED:
        raise LeftOutError("broken sound", f"{name!r} is cut off: it has {len(raw)} bytes")
    with _readable(name), soundfile.SoundFile(io.BytesIO(raw)) as file:
        frames, found = file.frames, file.samplerate
        if frames * rate > (most or SAMPLES_MOST) * found:
            fact = (
                f"{name!r} takes {frames / found:.1f} s; at most {(most or SAMPLES_MOST) / rate:g} s are read"
            )
            raise LeftOutError("long sound", fact)
        samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
    if not frames:
        raise LeftOutError("empty sound", f"{name!r} has no samples")
    if len(samples) != frames:
        raise LeftOutError("broken sound", f"{name!r} is cut off: it has {len(samples)} of {frames} samples")
    if not np.isfinite(samples).all():
        raise LeftOutError("broken sound", f"{name!r} has samples that are no finite numbers")
    if found != rate:
        samples = soxr.resample(samples, found, rate, quality="HQ")
    return np.asarray(samples[:most], np.float32)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what libsndfile says of a broken file into a reason to leave it out."""
    try:
        yield
    except LeftOutError:
        raise
    except Exception as error:
        raise LeftOutError("broken sound", f"{name!r}: {error}"[:200]) from None


SAMPLES_MOST = 100_000_000
"""The longest sound that is decoded where the processor has no limit: 1.7 hours at 16 kHz."""
_STREAMED = 0xFFFFFF00
"""What the header of a WAV says from here on is that nobody knew its length."""
