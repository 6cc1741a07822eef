"""Inputs of the reference: samples of a job's source, as the processor of a model of transformers would give them.

A tower of a job reads rows, one for each patch of an image or each frame of a sound. The processors of some models give
these (`pixel_values` [patches, values] with `image_grid_thw`), those of others whole images or sounds, which are put
together here. In the text each row that a tower emits has a placeholder: -1 in a job, a token of its own there.

Shapes in names: B samples, T tokens, C channels, H and W pixels.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.models.network import Model, Placeholder, PublishedModule
from mimogrid.shell.job.published import Published
from mimogrid.shell.runtime.data import Loads


Inputs = dict[str, torch.Tensor]
PLACEHOLDER = -1


@attrs.frozen(eq=False)
class Segment:
    """An image, a video or a sound of a sample: its kind, its grid and rows, and how far apart its frames are."""

    kind: str
    grid: SegmentGrid
    rows: torch.Tensor
    interval: float


def inputs_of(found: Published, samples: Sequence[Sample], source: Loads, language: str) -> Inputs:
    """Return what the model of transformers reads of samples, padded on the right.

    Raises PlanError where a sample has what no processor would give.
    """
    model = found.model
    segments = [list(_segments(model, sample, source)) for sample in samples]
    tokens_T = [
        _tokens(model, sample, source.load(sample.id, language)["tokens"], own)
        for sample, own in zip(samples, segments, strict=True)
    ]
    inputs = {
        "input_ids": pad_sequence(tokens_T, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in tokens_T], batch_first=True),
    }
    for kind, placeholder in model.placeholders.items():
        of_kind = [segment for own in segments for segment in own if segment.kind == kind]
        if of_kind:
            inputs |= _rows(found, kind, placeholder, of_kind)
    return inputs


def _segments(model: Model, sample: Sample, source: Loads) -> Iterator[Segment]:
    """Yield the segments of a sample, module by module."""
    for name in dict.fromkeys(placeholder.module for placeholder in model.placeholders.values()):
        grids = sample.grids(name)
        if not grids:
            continue
        sizes = [torch.Size(grid).numel() for grid in grids]
        rows = source.load(sample.id, name)["rows"].split(sizes)
        for grid, part, interval in zip(
            grids, rows, sample.intervals.get(name, itertools.repeat(1.0)), strict=False
        ):
            yield Segment(_kind(model, name, grid), grid, part, interval)


def _kind(model: Model, module: str, grid: SegmentGrid) -> str:
    """Return what a segment is: of a module for images and videos, one with several frames is a video."""
    kinds = [kind for kind, placeholder in model.placeholders.items() if placeholder.module == module]
    return "video" if "video" in kinds and grid[0] > 1 else kinds[0]


def _tokens(
    model: Model, sample: Sample, tokens_T: torch.Tensor, segments: Sequence[Segment]
) -> torch.Tensor:
    """Return the tokens of a sample with those of the placeholders."""
    filled: list[int] = []
    ends: list[int] = []
    for segment in segments:
        placeholder = model.placeholders[segment.kind]
        filled += [placeholder.token] * model.modules[placeholder.module].rows_out(segment.grid)
        ends.append(len(filled))
    _check_text(model, sample, tokens_T)
    places = (tokens_T == PLACEHOLDER).nonzero().flatten()
    assert len(places) == len(filled), f"sample {sample.id}"
    touching = [end for end in ends[:-1] if places[end] == places[end - 1] + 1]
    if touching and any(module.option("rotary_sections") for module in model.modules.values()):
        message = f"sample {sample.id}: no text stands between two of its segments, which transformers takes for one."
        raise PlanError([Problem("--reference", message, "Put a token between them.")])
    return tokens_T.index_copy(0, places, torch.tensor(filled, dtype=tokens_T.dtype))


def _check_text(model: Model, sample: Sample, tokens_T: torch.Tensor) -> None:
    """Raise PlanError where a token of the text is one that stands for a row."""
    for kind, placeholder in model.placeholders.items():
        if (tokens_T == placeholder.token).any():
            message = f"sample {sample.id}: its text has the token {placeholder.token}, which stands for rows ({kind})."
            remedy = (
                "Keep it out of the text. The source synthetic: data.options.vocab = the lowest such token."
            )
            raise PlanError([Problem("--reference", message, remedy)])


# -- rows --------------------------------------------------------------------------------------------------


def _rows(found: Published, kind: str, placeholder: Placeholder, segments: Sequence[Segment]) -> Inputs:
    """Return all segments of a kind as their processor gives them."""
    module = found.model.modules[placeholder.module]
    if kind == "audio":
        return _sounds(module, segments)
    if module.grid is not None:
        return {"pixel_values": torch.stack([_image(found.config, module, segment) for segment in segments])}
    rows, grids = torch.cat([s.rows for s in segments]), torch.tensor([s.grid for s in segments])
    if kind == "image":
        return {"pixel_values": rows, "image_grid_thw": grids}
    inputs = {"pixel_values_videos": rows, "video_grid_thw": grids}
    if placeholder.per_second:
        seconds = [segment.interval / placeholder.per_second for segment in segments]
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def _image(config: Mapping[str, object], module: PublishedModule, segment: Segment) -> torch.Tensor:
    """Return an image [C, H, W] of its patches; pixels behind the last whole patch, which are not read, are zero."""
    assert module.grid is not None
    (_, height, width), (_, down, across) = module.patch, module.grid
    if len(segment.rows) != down * across:
        message = f"an image has {len(segment.rows)} rows, and the model takes images of {down} x {across}."
        remedy = (
            f"The source synthetic: data.options.rows = [{down * across}, {down * across}] for the module."
        )
        raise PlanError([Problem("--reference", message, remedy)])
    patches = segment.rows.unflatten(0, (down, across)).unflatten(-1, (-1, height, width))
    image_CHW = patches.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    table = config.get("vision_config")
    pixels = table.get("image_size", image_CHW.shape[1]) if isinstance(table, Mapping) else image_CHW.shape[1]
    return functional.pad(
        image_CHW, (0, int(pixels) - image_CHW.shape[2], 0, int(pixels) - image_CHW.shape[1])
    )


def _sounds(module: PublishedModule, segments: Sequence[Segment]) -> Inputs:
    """Return sounds [sounds, mels, frames], padded to the longest that the model takes.

    Two frames make a position. The mask is of these; the convolutions of transformers see one frame more.
    """
    longest = 2 * module.option("position_count")
    if short := [len(s.rows) for s in segments if len(s.rows) % 2 == 0 and len(s.rows) < longest]:
        message = (
            f"a sound of {short[0]} frames lacks the one that the convolutions of transformers see behind it."
        )
        raise PlanError([Problem("--reference", message, "Describe and load one frame more.")])
    features = [functional.pad(segment.rows.t(), (0, longest - len(segment.rows))) for segment in segments]
    mask = [torch.arange(longest) < len(segment.rows) // 2 * 2 for segment in segments]
    return {"input_features": torch.stack(features), "feature_attention_mask": torch.stack(mask).long()}
