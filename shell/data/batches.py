"""Batches: what a processor makes of texts, images and sounds, as samples of a job.

A processor gives the tokens of all samples, and the patches or frames of all images and sounds, one after the other.
Which of them belong to a sample follows from its tokens: where rows of an image go, it has as many tokens of the
image's id. Such a run of tokens takes the next image.

| input | shape |
|---|---|
| `input_ids`, `labels`, `attention_mask` | [samples, tokens]; padding is on the right |
| `pixel_values` | [images, channels, height, width], or [patches, values] with `image_grid_thw` [images, 3] |
| `pixel_values_videos` | [patches, values] with `video_grid_thw` [videos, 3] |
| `input_features` | [sounds, mels, frames] with `feature_attention_mask` [sounds, frames] |
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.data.record import LANGUAGE
from mimogrid.core.models.network import Model, Placeholder, PublishedModule
from mimogrid.core.models.positions import frame_interval, single_frames


IGNORED = -100
"""The label of a token that does not count in the loss."""
TEXT = ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
"""What every model reads; a job finds the kinds of tokens itself."""
INPUTS: Mapping[str, tuple[str, ...]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
    "audio": ("input_features", "feature_attention_mask"),
}
"""What the kinds of placeholders read besides."""

Batch = Mapping[str, torch.Tensor]


@attrs.frozen(eq=False)
class Encoded:
    """A sample: its description, and the tensors that each module reads of it, as a source loads them."""

    sample: Sample
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


@attrs.frozen(eq=False)
class Segment:
    """An image, a frame, a clip or a sound: the rows that a tower reads, and how many it emits for them.

    `interval` says how many positions lie between two frames of a clip.
    """

    module: str
    grid: SegmentGrid
    rows: torch.Tensor
    emitted: int
    interval: float = 1.0


def examples_of(model: Model, batch: Batch) -> tuple[Encoded, ...]:
    """Return the samples of a batch; labels move one token to the left, under the token that predicts them.

    Raises PlanError, with all that is wrong, if the batch is none of the model's.
    """
    known = {*TEXT, *(name for kind in model.placeholders for name in INPUTS[kind])}
    problems = [
        Problem(f"batch.{name}", "is nothing that the model reads.", f"Give {', '.join(sorted(known))}.")
        for name in batch
        if name not in known
    ]
    problems += [
        Problem(f"batch.{name}", "is missing.", "Give each step tokens with their labels.")
        for name in ("input_ids", "labels")
        if name not in batch
    ]
    if problems:
        raise PlanError(problems)
    tokens, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    lengths = _lengths(batch, tokens, labels)
    segments = {kind: iter(segments_of(model, kind, batch)) for kind in model.placeholders}
    examples = tuple(
        _example(model, index, tokens[index, :length], labels[index, :length], segments)
        for index, length in enumerate(lengths)
    )
    for kind, left in segments.items():
        if count := len(tuple(left)):
            message = f"has {count} more of its kind '{kind}' than the tokens have placeholders for."
            remedy = f"Give as many as there are runs of the token {model.placeholders[kind].token}."
            raise PlanError([Problem(f"batch.{INPUTS[kind][0]}", message, remedy)])
    return examples


def _lengths(batch: Batch, tokens: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Return how many tokens each sample has."""
    mask = batch.get("attention_mask", torch.ones_like(tokens)).cpu().bool()
    if (mask.long().diff(dim=1) > 0).any():
        remedy = 'Pad on the right: tokenizer.padding_side = "right".'
        raise PlanError([Problem("batch.attention_mask", "leaves out tokens before others.", remedy)])
    if (labels[~mask] != IGNORED).any():
        raise PlanError([Problem("batch.labels", "has labels of padding.", f"Set them to {IGNORED}.")])
    lengths: list[int] = mask.sum(dim=1).tolist()
    return lengths


def _example(
    model: Model,
    index: int,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    segments: Mapping[str, Iterator[Segment]],
) -> Encoded:
    own = tuple(_taken(model, index, tokens.tolist(), segments))
    modules = [name for name in model.modules if name != LANGUAGE]
    of_module = {
        name: [(place, segment) for place, segment in own if segment.module == name] for name in modules
    }
    places = [
        place + row
        for placed in of_module.values()
        for place, segment in placed
        for row in range(segment.emitted)
    ]
    following = torch.cat([labels[1:], labels.new_full((1,), IGNORED)])
    counts = following != IGNORED
    text = {
        "tokens": tokens.index_fill(0, torch.tensor(places, dtype=torch.int64), -1),
        "labels": following.where(counts, 0),
        "loss_weights": counts.to(torch.float32),
    }
    rows = {
        name: torch.cat([segment.rows for _, segment in placed])
        for name, placed in of_module.items()
        if placed
    }
    sample = Sample(
        id=index,
        length=len(tokens) - len(places),
        rows={name: len(found) for name, found in rows.items()},
        placeholders={LANGUAGE: tuple(places)},
        segments={name: tuple(s.grid for _, s in placed) for name, placed in of_module.items() if placed},
        units={LANGUAGE: float(counts.sum())},
        intervals={
            name: tuple(s.interval for _, s in placed) for name, placed in of_module.items() if placed
        },
    )
    return Encoded(sample, {LANGUAGE: text, **{name: {"rows": found} for name, found in rows.items()}})


def _taken(
    model: Model, index: int, tokens: Sequence[int], segments: Mapping[str, Iterator[Segment]]
) -> Iterator[tuple[int, Segment]]:
    """Yield the segments of a sample, each with the place of its first placeholder."""
    kinds = {placeholder.token: kind for kind, placeholder in model.placeholders.items()}
    place = 0
    while place < len(tokens):
        kind = kinds.get(tokens[place])
        if kind is None:
            place += 1
            continue
        segment = next(segments[kind], None)
        if segment is None:
            message = f"sample {index}: token {place} stands for a row of the kind '{kind}', and there is none left."
            remedy = f"Give {INPUTS[kind][0]} for every run of the token {tokens[place]}."
            raise PlanError([Problem("batch.input_ids", message, remedy)])
        run = sum(1 for token in tokens[place : place + segment.emitted] if token == tokens[place])
        if run != segment.emitted:
            message = (
                f"sample {index}: has {run} placeholders from token {place} on, where the next segment of the kind "
                f"'{kind}', with a grid of {segment.grid}, makes {segment.emitted} rows."
            )
            raise PlanError(
                [Problem("batch.input_ids", message, "Take tokens and rows from one call of the processor.")]
            )
        yield place, segment
        place += run


# -- segments ----------------------------------------------------------------------------------------------


def segments_of(model: Model, kind: str, batch: Batch) -> Iterator[Segment]:
    """Yield the segments of a kind (image, video, audio) that a batch has, in their order. Raises PlanError."""
    placeholder = model.placeholders[kind]
    module = model.modules[placeholder.module]
    values, *_ = INPUTS[kind]
    if values not in batch:
        return
    read = _sounds if kind == "audio" else _images if module.grid is not None else _patches
    intervals = _intervals(kind, placeholder, batch)
    for (grid, rows), interval in zip(read(kind, module, batch), intervals, strict=False):
        # Where text stands between the frames of a video, each is a segment.
        apart = kind == "video" and not placeholder.per_second
        grids = single_frames((grid[0], grid[1], grid[2])) if apart else (grid,)
        for one, part in zip(grids, rows.chunk(len(grids)), strict=True):
            yield Segment(placeholder.module, one, part, _emitted(module, one, f"batch.{values}"), interval)


def _intervals(kind: str, placeholder: Placeholder, batch: Batch) -> Iterator[float]:
    """Yield how many positions lie between the frames of each segment of a kind."""
    if kind != "video" or "second_per_grid_ts" not in batch:
        return itertools.repeat(1.0 if kind != "video" else float(max(placeholder.per_second, 1)))
    seconds, grids = torch.as_tensor(batch["second_per_grid_ts"]).tolist(), batch[INPUTS[kind][1]]
    if len(seconds) != len(grids):
        message = f"has {len(seconds)} numbers for {len(grids)} videos."
        raise PlanError([Problem("batch.second_per_grid_ts", message, "Give one for each video, or none.")])
    return iter([frame_interval(placeholder.per_second, each) for each in seconds])


def _emitted(module: PublishedModule, grid: SegmentGrid, where: str) -> int:
    try:
        return module.rows_out(grid)
    except ValueError as error:
        raise PlanError([Problem(where, f"{error}.", "Use the processor of the checkpoint.")]) from None


Rows = Iterator[tuple[SegmentGrid, torch.Tensor]]
Reader = Callable[[str, PublishedModule, Batch], Rows]


def _images(kind: str, module: PublishedModule, batch: Batch) -> Rows:
    """Yield images of one size, cut into patches row by row."""
    name, *_ = INPUTS[kind]
    pixels = batch[name].cpu()
    _, height, width = module.patch
    assert module.grid is not None
    sides = [module.grid[1] * height, module.grid[2] * width]
    channels = module.option("features") // (height * width)
    if (
        pixels.dim() != len("NCHW")
        or pixels.shape[1] != channels
        or not all(
            0 <= pixel - side < patch
            for pixel, side, patch in zip(pixels.shape[2:], sides, (height, width), strict=True)
        )
    ):
        message = (
            f"has the shape {tuple(pixels.shape)}; the model takes images of {channels} channels and "
            f"{sides[0]} x {sides[1]} pixels."
        )
        raise PlanError([Problem(f"batch.{name}", message, "Use the processor of the checkpoint.")])
    for image in pixels:
        patches = image.unfold(1, height, height).unfold(2, width, width)
        yield module.grid, patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


def _patches(kind: str, module: PublishedModule, batch: Batch) -> Rows:
    """Yield images and videos that are cut into patches already."""
    name, of_grids, *_ = INPUTS[kind]
    if of_grids not in batch:
        raise PlanError([Problem(f"batch.{of_grids}", f"is missing, and {name} is there.", "Give both.")])
    patches, grids = batch[name].cpu(), [tuple(grid) for grid in batch[of_grids].tolist()]
    sizes = [frames * height * width for frames, height, width in grids]
    if sum(sizes) != len(patches) or patches.shape[1] != module.options["features"]:
        message = (
            f"has the shape {tuple(patches.shape)}; {of_grids} has {sum(sizes)} patches, and the model reads "
            f"{module.options['features']} values of each."
        )
        raise PlanError([Problem(f"batch.{name}", message, "Use the processor of the checkpoint.")])
    yield from zip(grids, patches.split(sizes), strict=True)


def _sounds(kind: str, module: PublishedModule, batch: Batch) -> Rows:
    """Yield sounds, each with the frames that its positions see."""
    name, of_masks = INPUTS[kind]
    features = batch[name].cpu()
    expected = module.option("features"), 2 * module.option("position_count")
    if tuple(features.shape[1:]) != expected:
        message = f"has the shape {tuple(features.shape)}; the model takes {expected[0]} mels of {expected[1]} frames."
        raise PlanError(
            [Problem(f"batch.{name}", message, 'Pad sounds to the longest: padding="max_length".')]
        )
    masks = batch.get(of_masks, torch.ones(len(features), features.shape[-1])).cpu()
    if masks.shape != (len(features), features.shape[-1]):
        message = f"has the shape {tuple(masks.shape)}, and {name} {tuple(features.shape)}."
        raise PlanError([Problem(f"batch.{of_masks}", message, "Use the processor of the checkpoint.")])
    for sound, frames in zip(features, masks.sum(dim=1).tolist(), strict=True):
        grid = module.grid_of(int(frames))
        yield grid, sound[:, : grid[0]].t()
