"""Batches: what a processor makes of texts, images and sounds, as samples of a job.

A processor gives the tokens of all samples, and the patches or frames of all images and sounds, one after the other.
Which of them belong to a sample follows from its tokens: where rows of an image go, it has as many tokens of the
image's id. Such a run of tokens takes the next image.

| input | shape |
|---|---|
| `input_ids`, `labels`, `attention_mask` | [samples, tokens]; padding is on the right or on the left |
| `pixel_values` | [images, channels, height, width], or [patches, values] with `image_grid_thw` [images, 3] |
| `pixel_values_videos` | [patches, values] with `video_grid_thw` [videos, 3] |
| `input_features` | [sounds, mels, frames] with `feature_attention_mask` [sounds, frames] |
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch
from torch.nn import functional

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.data.record import LANGUAGE
from mimogrid.core.models.network import Model, Placeholder, PublishedModule
from mimogrid.core.models.positions import frame_interval, single_frames
from mimogrid.core.models.segments import PLANE


IGNORED = -100
"""The label of a token that does not count in the loss."""
TEXT = ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
"""What every model reads; a job finds the kinds of tokens itself."""
SECONDS = "second_per_grid_ts"
"""How many seconds lie between two frames of each video; a list of numbers will do."""
INPUTS: Mapping[str, tuple[str, ...]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw", SECONDS),
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
    batch = {name: value for name, value in batch.items() if value is not None}
    if problems := [*_strange(model, batch)] or [*_misshapen(batch)] or [*_beyond(model, batch)]:
        raise PlanError(problems)
    tokens, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    spans = _spans(batch, tokens, labels)
    segments = {kind: iter(segments_of(model, kind, batch)) for kind in model.placeholders}
    examples = tuple(
        _example(model, index, tokens[index, span], labels[index, span], segments)
        for index, span in enumerate(spans)
    )
    for kind, left in segments.items():
        if count := len(tuple(left)):
            message = f"has {count} more of its kind '{kind}' than the tokens have placeholders for."
            remedy = f"Give as many as there are runs of the token {model.placeholders[kind].token}."
            raise PlanError([Problem(f"batch.{INPUTS[kind][0]}", message, remedy)])
    return examples


def _strange(model: Model, batch: Batch) -> Iterator[Problem]:
    """Yield what a batch has too much or too little of, and what is no tensor."""
    known = {*TEXT, *(name for kind in model.placeholders for name in INPUTS[kind])}
    for name, value in batch.items():
        if name not in known:
            yield Problem(
                f"batch.{name}", "is nothing that the model reads.", f"Give {', '.join(sorted(known))}."
            )
        elif not isinstance(value, torch.Tensor) and name != SECONDS:
            message = f"is of the type {type(value).__name__}; expected a tensor."
            yield Problem(f"batch.{name}", message, 'Ask the processor for tensors: return_tensors="pt".')
    for name in ("input_ids", "labels"):
        if name not in batch:
            yield Problem(f"batch.{name}", "is missing.", "Give each step tokens with their labels.")


def _misshapen(batch: Batch) -> Iterator[Problem]:
    """Yield which tensors of the text are no integers of one shape."""
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2 or 0 in shape:  # noqa: PLR2004 -- samples and tokens
        message = f"has the shape {shape}; expected [samples, tokens], at least one of each."
        yield Problem("batch.input_ids", message, "Give the whole batch of a step.")
        return
    for name in TEXT:
        tensor = batch.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            message = f"has the shape {tuple(tensor.shape)}, and input_ids {shape}."
            yield Problem(f"batch.{name}", message, "Give a value for each token.")
        if name in {"input_ids", "labels"} and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            message = f"is of the dtype {str(tensor.dtype).removeprefix('torch.')}; expected integers."
            yield Problem(f"batch.{name}", message, "Give the ids of tokens.")


def _beyond(model: Model, batch: Batch) -> Iterator[Problem]:
    """Yield which of the tokens and labels are in no row of the vocabulary; placeholders and padding are none."""
    if LANGUAGE not in model.modules:
        return
    vocabulary = model.modules[LANGUAGE].options["vocab"]
    tokens, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    read = batch.get("attention_mask", torch.ones_like(tokens)).cpu().bool()
    for placeholder in model.placeholders.values():
        read = read & (tokens != placeholder.token)
    for name, ids, counts in (("input_ids", tokens, read), ("labels", labels, labels != IGNORED)):
        strange = (counts & ((ids < 0) | (ids >= vocabulary))).nonzero()
        if len(strange):
            sample, place = strange[0].tolist()
            found = int(ids[sample, place])
            message = f"sample {sample}: has {found} at token {place}; the vocabulary has {vocabulary}."
            ignored = f" A label that does not count is {IGNORED}." if name == "labels" else ""
            yield Problem(f"batch.{name}", message, f"Use the checkpoint's tokenizer.{ignored}")


def _spans(batch: Batch, tokens: torch.Tensor, labels: torch.Tensor) -> list[slice]:
    """Return where the tokens of each sample are, between padding on the left and on the right."""
    mask = batch.get("attention_mask", torch.ones_like(tokens)).cpu().bool()
    begins = functional.pad(mask.long(), (1, 0)).diff(dim=1) > 0
    if (begins.sum(dim=1) > 1).any():
        remedy = "Leave out tokens at the ends of a sample only."
        raise PlanError([Problem("batch.attention_mask", "leaves out tokens between others.", remedy)])
    if (labels[~mask] != IGNORED).any():
        raise PlanError([Problem("batch.labels", "has labels of padding.", f"Set them to {IGNORED}.")])
    early = (begins & (labels != IGNORED))[:, 1:].any(dim=1).nonzero().flatten()
    if len(early):
        message = (
            f"sample {int(early[0])}: has a label for its first token, which only padding stands before."
        )
        raise PlanError([Problem("batch.labels", message, f"Set it to {IGNORED}, or pad on the right.")])
    starts, lengths = begins.long().argmax(dim=1).tolist(), mask.sum(dim=1).tolist()
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]


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
    if read is _patches:
        _check_grids(kind, batch)
    intervals = _intervals(kind, placeholder, batch)
    for (grid, rows), interval in zip(read(kind, module, batch), intervals, strict=False):
        # Where text stands between the frames of a video, each is a segment.
        apart = kind == "video" and not placeholder.per_second
        grids = single_frames((grid[0], grid[1], grid[2])) if apart else (grid,)
        for one, part in zip(grids, rows.chunk(len(grids)), strict=True):
            yield Segment(placeholder.module, one, part, _emitted(module, one, f"batch.{values}"), interval)


def _intervals(kind: str, placeholder: Placeholder, batch: Batch) -> Iterator[float]:
    """Yield how many positions lie between the frames of each segment of a kind."""
    if kind != "video" or SECONDS not in batch:
        return itertools.repeat(1.0 if kind != "video" else float(max(placeholder.per_second, 1)))
    seconds, grids = torch.as_tensor(batch[SECONDS]).tolist(), batch[INPUTS[kind][1]]
    if len(seconds) != len(grids):
        message = f"has {len(seconds)} numbers for {len(grids)} videos."
        raise PlanError([Problem(f"batch.{SECONDS}", message, "Give one for each video, or none.")])
    return iter([frame_interval(placeholder.per_second, each) for each in seconds])


def _check_grids(kind: str, batch: Batch) -> None:
    """Raise PlanError where patches come without their grids, or with what are no grids."""
    name, of_grids, *_ = INPUTS[kind]
    if of_grids not in batch:
        raise PlanError([Problem(f"batch.{of_grids}", f"is missing, and {name} is there.", "Give both.")])
    grids = batch[of_grids]
    if grids.dim() != 2 or grids.shape[1] != PLANE or grids.is_floating_point() or (grids < 1).any():  # noqa: PLR2004
        message = (
            f"has the shape {tuple(grids.shape)} and the dtype {str(grids.dtype).removeprefix('torch.')}; expected "
            "integers of 1 or more: frames, height and width of each."
        )
        raise PlanError([Problem(f"batch.{of_grids}", message, "Use the processor of the checkpoint.")])


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
    patches, grids = batch[name].cpu(), [tuple(grid) for grid in batch[of_grids].tolist()]
    sizes = [frames * height * width for frames, height, width in grids]
    if tuple(patches.shape) != (sum(sizes), module.options["features"]):
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
