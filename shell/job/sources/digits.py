"""Digits: a small vision-language task that a CPU learns in a minute.

A strip of one to five handwritten digits (from scikit-learn's 1,797 images of 8 x 8 pixels) is cut
into upright bands of 8 x 4 pixels, left to right. A band and its place in the strip are one patch
row. The text spells the strip. One sample in ten is text only, so that the language model also
learns text: it copies a few digits, or counts marks.

    read    ▯ ▯ ▯ ▯ ▯ ▯  read  3 1 4  stop       two rows per digit wait at the placeholders ▯
    copy    copy 7 0 2 =  7 0 2  stop             the digits of a copy are distinct
    count   count | | | =  3  stop

What follows the prompt has a loss weight of 1, the stop included. The stop is only predicted, so it
is among the labels and not among the tokens.

Samples depend on (seed, id) only. Ids never end and no epoch repeats: each id has a new strip, and
each digit is jittered. A jitter (shift, turn, scale, slant, bend, brightness) is linear in the
pixels, so it is one product with a matrix from a bank of 64 x 64 matrices.

One image in five is held out. The split is the same for every seed, so that runs can be compared.
`Digits.held_out` draws its strips from these images only, without jitter.

>>> source = digits(seed=0, row_modules=("vision",), text_modules=("language",))
>>> sample = source.describe(3)
>>> sample.length, sample.rows, sample.units
(2, {'vision': 2}, {'language': 2.0})
>>> source.spell(source.prompt(3, "language"))
'▯ ▯ read'
>>> copies = source.held_out(task="copy")
>>> copies.spell((*copies.prompt(2, "language"), *copies.answer(2)))
'copy 5 6 8 = 5 6 8'

Torch and numpy are imported when tensors are loaded, because checking a job must not need them.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

from mimogrid.core.base.hashing import draw_bits
from mimogrid.core.base.samples import Sample


if TYPE_CHECKING:
    import torch


Task = Literal["read", "copy", "count"]
Split = Literal["mixed", "read", "copy", "count"]

WORDS = (*"0123456789", "read", "copy", "count", "=", "|", "stop")
READ, COPY, COUNT, EQUALS, MARK, STOP = range(10, 16)
PLACEHOLDER = -1

DIGITS_MOST = 5
SIDE = 8
BAND = 4  # With 2 pixels the model learns more slowly; with 8 the encoder has nothing to join.
ROWS_PER_DIGIT = SIDE // BAND
ROWS_MOST = DIGITS_MOST * ROWS_PER_DIGIT
TEXT_MOST = 2 * DIGITS_MOST + 2  # copy, five digits, =, five digits

IMAGES = 1797
JITTERS = 1024


@attrs.frozen
class Digits:
    """The strips of one seed: for training, or the held-out ones of one task.

    Attributes:
        seed: The seed of every draw but the split.
        row_modules: Modules that read the patch rows; all read the same rows.
        rows_into: For each language model, the row modules whose rows reach it, in the order of
            its blocks. A module is named once for each path.
        task: "mixed" draws task and length (for training). Another task gives every sample that
            task, with 1 + id % 5 digits or marks (held out).
    """

    seed: int
    row_modules: tuple[str, ...]
    rows_into: Mapping[str, tuple[str, ...]]
    task: Split = "mixed"

    vocab = len(WORDS)
    features = SIDE * BAND + ROWS_MOST
    rows_most = ROWS_MOST
    stop = STOP
    tasks = ("read", "copy", "count")

    @property
    def sequence(self) -> int:
        """Positions of a language sequence that fit every sample."""
        blocks = max((len(feeders) for feeders in self.rows_into.values()), default=0)
        return max(TEXT_MOST, blocks * ROWS_MOST + DIGITS_MOST + 1)

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample. Pure, without torch."""
        task, digits_count = self._draw(sample_id)
        text, answer = _lengths(task, digits_count)
        rows = digits_count * ROWS_PER_DIGIT if task == "read" else 0
        return Sample(
            id=sample_id,
            length=text,
            rows=dict.fromkeys(self.row_modules, rows),
            units=dict.fromkeys(self.rows_into, float(answer + 1)),
        )

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Return a module's tensors: patch rows, or tokens, labels and loss weights.

        A language model gets one entry for each position in use, placeholders (-1) included.
        """
        import torch  # noqa: PLC0415 -- see the module's docstring

        if module in self.row_modules:
            return {"rows": torch.from_numpy(_bands(self.image(sample_id)))}
        prompt, answer = self.prompt(sample_id, module), self.answer(sample_id)
        tokens = (*prompt, *answer)
        silent = len(prompt) - 1  # The last token of the prompt predicts the first of the answer.
        return {
            "tokens": torch.tensor(tokens),
            "labels": torch.tensor((*tokens[1:], STOP)).clamp(min=0),
            "loss_weights": torch.tensor([0.0] * silent + [1.0] * (len(answer) + 1)),
        }

    def held_out(self, *, task: Task = "read") -> "Digits":
        """Return one task on images that training never uses. Five ids have all five lengths.

        Copies and counts have draws of their own, but there are few short ones, so some recur.
        """
        return attrs.evolve(self, task=task)

    def prompt(self, sample_id: int, module: str) -> tuple[int, ...]:
        """Return the tokens before the answer, -1 at each placeholder of the language model."""
        task, digits_count = self._draw(sample_id)
        match task:
            case "read":
                rows = digits_count * ROWS_PER_DIGIT * len(self.rows_into[module])
                return (*[PLACEHOLDER] * rows, READ)
            case "copy":
                return (COPY, *self.answer(sample_id), EQUALS)
            case "count":
                return (COUNT, *[MARK] * digits_count, EQUALS)

    def answer(self, sample_id: int) -> tuple[int, ...]:
        """Return the true answer, without the stop."""
        task, digits_count = self._draw(sample_id)
        match task:
            case "read":
                return tuple(_images()[1][image] for image in self._pictures(sample_id))
            case "copy":
                return _distinct(self._bits(sample_id, "copied"), digits_count)
            case "count":
                return (digits_count,)

    def spell(self, tokens: Iterable[int]) -> str:
        """Return tokens as words, up to a stop."""
        words: list[str] = []
        for token in tokens:
            if token == STOP:
                break
            words.append("▯" if token == PLACEHOLDER else WORDS[token])
        return " ".join(words)

    def image(self, sample_id: int) -> Any:
        """Return the strip as the model gets it: float32 [8, 8n], ink about 1; [8, 0] without digits."""
        import numpy as np  # noqa: PLC0415

        pictures = self._pictures(sample_id)
        if not pictures:
            return np.zeros((SIDE, 0), np.float32)
        pixels = _images()[0][list(pictures)]
        if self.task == "mixed":
            places = range(len(pictures))
            jitters = [self._bits(sample_id, f"jitter.{i}") % JITTERS for i in places]
            pixels = np.matmul(_jitters(self.seed)[jitters], pixels[:, :, None])
        return pixels.reshape(-1, SIDE, SIDE).transpose(1, 0, 2).reshape(SIDE, -1)

    def _pictures(self, sample_id: int) -> tuple[int, ...]:
        """Return the images of a strip, left to right; () for text only."""
        task, count = self._draw(sample_id)
        pool = pools()[0 if self.task == "mixed" else 1]
        places = range(count if task == "read" else 0)
        return tuple(pool[self._bits(sample_id, f"picture.{i}") % len(pool)] for i in places)

    def _draw(self, sample_id: int) -> tuple[Task, int]:
        """Return the task of a sample, and its number of digits or marks."""
        if self.task != "mixed":
            return self.task, 1 + sample_id % DIGITS_MOST
        length, chance = divmod(self._bits(sample_id, "task"), 20)
        text_only: dict[int, Task] = {0: "copy", 1: "count"}
        return text_only.get(chance, "read"), 1 + length % DIGITS_MOST

    def _bits(self, sample_id: int, field: str) -> int:
        return draw_bits(self.seed, sample_id, f"{self.task}.{field}")


def digits(
    seed: int,
    row_modules: tuple[str, ...],
    text_modules: tuple[str, ...],
    *,
    rows_into: Mapping[str, tuple[str, ...]] | None = None,
) -> Digits:
    """Return the source. By default every row module feeds every text module once."""
    return Digits(
        seed=seed,
        row_modules=row_modules,
        rows_into=dict.fromkeys(text_modules, row_modules) if rows_into is None else rows_into,
    )


@functools.cache
def pools() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the images for training, and the held-out images, about one in five."""
    out = [draw_bits(0, image, "held out") % 5 == 0 for image in range(IMAGES)]
    kept = tuple(image for image in range(IMAGES) if not out[image])
    return kept, tuple(image for image in range(IMAGES) if out[image])


def _lengths(task: Task, digits_count: int) -> tuple[int, int]:
    """Return the number of text tokens of a sample, and how many of them are the answer."""
    match task:
        case "read":
            return digits_count + 1, digits_count
        case "copy":
            return 2 * digits_count + 2, digits_count
        case "count":
            return digits_count + 3, 1


def _distinct(bits: int, count: int) -> tuple[int, ...]:
    """Return distinct digits in random order. After a digit that came twice, two digits could follow."""
    left, chosen = list(range(10)), list[int]()
    for _ in range(count):
        bits, index = divmod(bits, len(left))
        chosen.append(left.pop(index))
    return tuple(chosen)


@functools.cache
def _images() -> tuple[Any, tuple[int, ...]]:
    """Return all images as float32 [1797, 64] in 0..1, and the digit of each."""
    import numpy as np  # noqa: PLC0415
    from sklearn.datasets import load_digits  # type: ignore[import-untyped] # noqa: PLC0415

    bunch = load_digits()
    return (bunch.data / 16).astype(np.float32), tuple(bunch.target.tolist())


def _bands(strip: Any) -> Any:
    """Return a strip [8, 8n] as patch rows [2n, features]: the pixels of a band, then its place, one-hot.

    Rotary attention depends on distances only, so the place says which half of which digit a band is.
    """
    import numpy as np  # noqa: PLC0415

    count = strip.shape[1] // BAND
    bands = strip.reshape(SIDE, count, BAND).transpose(1, 0, 2).reshape(count, SIDE * BAND)
    return np.concatenate([bands, np.eye(ROWS_MOST, dtype=np.float32)[:count]], axis=1)


@functools.lru_cache(maxsize=4)
def _jitters(seed: int) -> Any:
    """Return the bank of jitters: float32 [JITTERS, 64, 64], pixels to jittered pixels, bilinear."""
    import numpy as np  # noqa: PLC0415

    # Philox is a counter-based hash too, and faster than a digest for each of 27,000 draws.
    draws = np.random.Generator(np.random.Philox(key=draw_bits(seed, 0, "jitters")))

    def within(most: float, *shape: int) -> Any:
        return draws.uniform(-most, most, (JITTERS, *(shape or (1, 1))))

    turn, slant, brightness = within(math.radians(12)), within(0.15), 1 + within(0.15)
    scale_y, scale_x = np.exp(within(0.12)), np.exp(within(0.12))
    shift_y, shift_x = within(0.9), within(0.9)
    # The place in the original from which a jittered pixel is read: an affine map about the centre,
    # bent by a mesh of 3 x 3 knots with tents between them.
    across = np.arange(float(SIDE))
    centre = (SIDE - 1) / 2
    y, x = np.meshgrid(across - centre, across - centre, indexing="ij")
    tents = np.maximum(0, 1 - np.abs(across[:, None] / centre - np.arange(3)))
    bend_y, bend_x = np.einsum("ya,jcab,xb->cjyx", tents, within(0.35, 2, 3, 3), tents)
    look_y = centre + scale_y * (np.cos(turn) * y + np.sin(turn) * x) + shift_y + bend_y
    look_x = centre + scale_x * (np.cos(turn) * x - np.sin(turn) * y) + shift_x + bend_x
    look_x += slant * y
    weights_y = np.maximum(0, 1 - np.abs(look_y[..., None] - across))
    weights_x = np.maximum(0, 1 - np.abs(look_x[..., None] - across))
    maps = weights_y[..., :, None] * weights_x[..., None, :]
    return (maps.reshape(JITTERS, SIDE**2, SIDE**2) * brightness).astype(np.float32)
