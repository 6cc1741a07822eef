"""Positions and rotary frequencies are those of transformers, on sizes drawn at random.

transformers computes tables in single precision; where these are compared, its casts are lifted.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLModel,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLVisionRotaryEmbedding,
)
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLTextRotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.whisper.modeling_whisper import sinusoids

from mimogrid.core.models.frequencies import axes, frequencies, parse_scaling
from mimogrid.core.models.positions import (
    Grid,
    frame_bounds,
    frame_interval,
    frames_after_pooling,
    frames_after_stride,
    interpolation,
    learned_positions,
    merged,
    multimodal_positions,
    patch_positions,
    single_frames,
    sinusoid,
    windows,
)
from mimogrid.shell.run.reference import double_precision


FEW = settings(max_examples=25)
SIDES = st.integers(1, 7)
IMAGES = st.lists(st.tuples(st.just(1), SIDES, SIDES), max_size=3)
CLIPS = st.tuples(st.integers(1, 5), SIDES, SIDES)
SEGMENTS = st.lists(CLIPS, min_size=1, max_size=4)
TEXT, IMAGE, VIDEO = 0, 1, 2


def doubled(grids: list[Grid]) -> list[Grid]:
    """Grids of patches that merge into these."""
    return [(frames, 2 * rows, 2 * columns) for frames, rows, columns in grids]


def lifted(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of transformers in double precision."""
    with double_precision(Counter()):
        return function(*arguments, **options)


def indexed(model: type, kinds: list[int], **options: Any) -> list[tuple[int, ...]]:
    """Positions of one sequence as `get_rope_index` of a model has them."""
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=25)
    host = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    host.get_vision_position_ids = lambda *a, **k: model.get_vision_position_ids(host, *a, **k)
    tokens = torch.zeros(1, len(kinds), dtype=torch.long)
    found, _ = model.get_rope_index(host, tokens, torch.tensor([kinds]), **options)
    return [tuple(axis) for axis in found[:, 0].tolist()]


def rows(grid: Grid) -> int:
    """Rows of a segment after merging."""
    frames, height, width = merged(grid, 2)
    return frames * height * width


@FEW
@given(IMAGES, st.lists(st.integers(1, 4), min_size=4, max_size=4))
@pytest.mark.parametrize("model", [Qwen2_5_VLModel, Qwen3VLModel])
def test_images_in_text(model: type, images: list[Grid], gaps: list[int]) -> None:
    """Text and images of several sizes stand where both Qwen-VL families have them."""
    grids = doubled(images)
    kinds = [TEXT] * gaps[0]
    for grid, gap in zip(grids, gaps[1:], strict=False):
        kinds += [IMAGE] * rows(grid) + [TEXT] * gap
    places = [place for place, kind in enumerate(kinds) if kind]
    ours = multimodal_positions(len(kinds), places, [merged(grid, 2) for grid in grids])
    assert indexed(model, kinds, image_grid_thw=torch.tensor(grids).reshape(-1, 3)) == list(ours)


@FEW
@given(CLIPS, st.floats(0.02, 4.0), st.integers(0, 4))
def test_videos_by_seconds(clip: Grid, seconds: float, before: int) -> None:
    """Frames of Qwen2.5-VL's videos stand as far apart as their seconds say.

    Text after a video is compared where the video is not longer than its sides: beyond that transformers lets
    it begin before the video has ended (see the tests of the reference).
    """
    (grid,) = doubled([clip])
    kinds = [TEXT] * before + [VIDEO] * rows(grid) + [TEXT] * 2
    interval = frame_interval(25, seconds)
    places = range(before, before + rows(grid))
    ours = multimodal_positions(len(kinds), places, [clip], [interval])
    theirs = indexed(
        Qwen2_5_VLModel,
        kinds,
        video_grid_thw=torch.tensor([grid]),
        second_per_grid_ts=torch.tensor([seconds]),
    )
    until = len(kinds) if (clip[0] - 1) * interval < max(clip[1:]) else len(kinds) - 2
    assert [axis[:until] for axis in theirs] == [axis[:until] for axis in ours]


@FEW
@given(SEGMENTS)
def test_videos_by_timestamps(clips: list[Grid]) -> None:
    """Frames of Qwen3-VL's videos are segments of their own between timestamps."""
    grids = doubled(clips)
    frames = [frame for grid in grids for frame in single_frames(grid)]
    kinds = [kind for frame in frames for kind in [TEXT] * 3 + [VIDEO] * rows(frame)]
    places = [place for place, kind in enumerate(kinds) if kind]
    ours = multimodal_positions(len(kinds), places, [merged(frame, 2) for frame in frames])
    assert indexed(Qwen3VLModel, kinds, video_grid_thw=torch.tensor(grids)) == list(ours)


@FEW
@given(SEGMENTS)
def test_patches(clips: list[Grid]) -> None:
    """Rows and columns of patches, and the bounds of frames."""
    grids = doubled(clips)
    theirs = vision_utils.get_vision_position_ids(torch.tensor(grids), 2)
    assert [tuple(axis) for axis in theirs.T.tolist()] == list(patch_positions(grids, merge=2))
    assert vision_utils.get_vision_cu_seqlens(torch.tensor(grids)).tolist() == list(frame_bounds(grids))


@FEW
@given(SEGMENTS, st.integers(1, 4))
def test_windows(clips: list[Grid], size: int) -> None:
    """The order of windows and their bounds."""
    grids = doubled(clips)
    order, bounds = vision_utils.get_vision_window_index(
        torch.tensor(grids), spatial_merge_size=2, window_size=size * 2 * 14, patch_size=14
    )
    ours = windows(grids, merge=2, size=size)
    assert (order.tolist(), bounds.tolist()) == (list(ours.order), list(ours.bounds))
    assert torch.argsort(order).tolist() == list(ours.inverse)


@FEW
@given(SEGMENTS, st.integers(1, 9))
def test_interpolation(clips: list[Grid], side: int) -> None:
    """Four rows of a learned table and their weights."""
    grids = doubled(clips)
    taps, weights = lifted(
        vision_utils.get_vision_interpolation_indices_and_weights,
        torch.tensor(grids),
        num_grid_per_side=side,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=2,
    )
    ours = interpolation(grids, side, merge=2)
    assert taps.tolist() == [list(four) for four in ours.rows]
    assert weights.numpy() == pytest.approx(
        torch.tensor(ours.weights, dtype=torch.float64).numpy(), abs=1e-12
    )


@pytest.mark.parametrize("side", [12, 20])
def test_learned_positions(side: int) -> None:
    """CLIP's positions begin with the class token, SigLIP's with the first patch."""
    options = {"hidden_size": 8, "num_attention_heads": 2, "image_size": side, "patch_size": 4}
    patches = (side // 4) ** 2
    clip = CLIPVisionEmbeddings(transformers.CLIPVisionConfig(**options))
    assert tuple(clip.position_ids[0].tolist()) == learned_positions(1, patches, class_token=True)
    siglip = SiglipVisionEmbeddings(transformers.SiglipVisionConfig(**options))
    assert tuple(siglip.position_ids[0].tolist()) == learned_positions(1, patches, class_token=False)


@FEW
@given(st.integers(1, 3000))
def test_frames(frames: int) -> None:
    """Frames after Whisper's convolutions, and after Qwen2-Audio's pooling."""
    strided, pooled = Qwen2AudioEncoder._get_feat_extract_output_lengths(None, torch.tensor(frames))
    assert (strided, pooled) == (
        frames_after_stride(frames),
        frames_after_pooling(frames_after_stride(frames)),
    )
    convolution = torch.nn.Conv1d(1, 1, kernel_size=3, stride=2, padding=1)
    assert convolution(torch.zeros(1, 1, frames)).shape[-1] == frames_after_stride(frames)


@FEW
@given(st.integers(1, 40), st.sampled_from([4, 6, 32]))
def test_sinusoids(length: int, width: int) -> None:
    """Whisper's fixed positions."""
    theirs = lifted(sinusoids, length, width)
    ours = torch.tensor([sinusoid(position, width) for position in range(length)], dtype=torch.float64)
    assert theirs.dtype == torch.float64
    assert theirs.numpy() == pytest.approx(ours.numpy(), abs=1e-12)


# -- rotary frequencies


WIDTHS, BASES = st.integers(1, 64).map(lambda half: 2 * half), st.floats(100.0, 1e6)
FACTORS, CONTEXTS = st.floats(1.0, 64.0), st.integers(16, 131072)


def configured(width: int, base: float, **scaling: Any) -> Any:
    """A configuration with one head of a width."""
    return transformers.LlamaConfig(
        hidden_size=width, num_attention_heads=1, rope_parameters={"rope_theta": base, **scaling}
    )


def check(width: int, base: float, kind: str, **options: Any) -> None:
    """Compare a scaling's frequencies and attention factor."""
    theirs, factor = lifted(ROPE_INIT_FUNCTIONS[kind], configured(width, base, rope_type=kind, **options))
    scaling = parse_scaling("here", {"type": kind, **options})
    assert theirs.dtype == torch.float64
    assert theirs.tolist() == pytest.approx(frequencies(width, base, scaling=scaling), rel=1e-11)
    assert factor == pytest.approx(scaling.attention_factor, rel=1e-14)


@FEW
@given(WIDTHS, BASES)
def test_plain_frequencies(width: int, base: float) -> None:
    """Without scaling."""
    theirs, factor = lifted(
        LlamaRotaryEmbedding.compute_default_rope_parameters, configured(width, base, rope_type="default")
    )
    assert theirs.tolist() == pytest.approx(frequencies(width, base), rel=1e-13)
    assert 1 == factor


@FEW
@given(WIDTHS, BASES, FACTORS, st.sampled_from([0.25, 0.5, 1.0]))
def test_linear(width: int, base: float, factor: float, fraction: float) -> None:
    """Linear scaling, of a whole head and of a part of it."""
    theirs, _ = lifted(
        ROPE_INIT_FUNCTIONS["linear"],
        configured(width, base, rope_type="linear", factor=factor, partial_rotary_factor=fraction),
    )
    scaling = parse_scaling("here", {"type": "linear", "factor": factor})
    ours = frequencies(width, base, fraction=fraction, scaling=scaling)
    assert theirs.tolist() == pytest.approx(ours, rel=1e-13)


@FEW
@given(WIDTHS, BASES, st.tuples(FACTORS, CONTEXTS, st.floats(0.5, 2.0), st.floats(0.1, 8.0)))
def test_llama3(width: int, base: float, drawn: tuple[float, int, float, float]) -> None:
    """Llama 3's scaling."""
    factor, context, low, more = drawn
    options = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low + more}
    check(width, base, "llama3", **options, original_max_position_embeddings=context)


OPTIONAL = st.fixed_dictionaries(
    {}, optional={name: st.floats(0.1, 2.0) for name in ("attention_factor", "mscale", "mscale_all_dim")}
)


@FEW
@given(
    WIDTHS, BASES, FACTORS, CONTEXTS, OPTIONAL | OPTIONAL.map(lambda options: {**options, "truncate": False})
)
def test_yarn(width: int, base: float, factor: float, context: int, options: dict[str, Any]) -> None:
    """YaRN, with and without what may be given."""
    check(width, base, "yarn", factor=factor, original_max_position_embeddings=context, **options)


@pytest.mark.parametrize(("fast", "slow"), [(32, 1), (8.0, 2.0), (1, 1)])
def test_yarn_between_two_turns(fast: float, slow: float) -> None:
    """YaRN with bounds of its ramp."""
    check(64, 1e4, "yarn", factor=4.0, original_max_position_embeddings=4096, beta_fast=fast, beta_slow=slow)


@FEW
@given(st.integers(1, 16).map(lambda quarter: 4 * quarter), BASES)
def test_rows_and_columns(width: int, base: float) -> None:
    """Each of rows and columns has the frequencies of half a head."""
    config = SimpleNamespace(
        rope_parameters={"rope_theta": base}, head_dim=None, hidden_size=width, num_attention_heads=1
    )
    theirs, _ = lifted(Qwen2_5_VLVisionRotaryEmbedding.compute_axial_rope_parameters, config)
    assert theirs.tolist() == pytest.approx(frequencies(width // 2, base), rel=1e-13)


@FEW
@given(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6)))
def test_axes(sections: tuple[int, int, int]) -> None:
    """Which axis a pair turns by, in chunks and interleaved."""
    pairs = sum(sections)
    positions = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, pairs).clone()
    chunks = Qwen2_5_VLRotaryEmbedding.recomposition_frequencies(
        SimpleNamespace(mrope_section=sections), positions
    )
    assert chunks[0, 0].tolist() == [*axes(sections, interleaved=False)] * 2
    mixed = Qwen3VLTextRotaryEmbedding.recomposition_frequencies(
        SimpleNamespace(mrope_section=sections), positions
    )
    assert mixed[0, 0].tolist() == [*axes(sections, interleaved=True)] * 2
