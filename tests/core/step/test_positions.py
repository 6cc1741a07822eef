"""The rotary positions of a share's row, by hand: samples end to end, segments where their placeholders are."""

import itertools
from collections.abc import Mapping
from typing import Any

import attrs
import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Block, Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.models.positions import patch_positions, windows
from mimogrid.core.step.positions import rotary_positions
from mimogrid.core.step.step import Share, step_of
from mimogrid.core.topology.parse import assemble


SIZES: Mapping[str, Any] = {"layers": 1, "hidden": 8, "heads": 1}
VISION = Vit(**SIZES, features=12, merge=2, positions="rotary_2d")
AUDIO = Vit(**SIZES, features=5, stem="whisper")
LANGUAGE = Gpt(**SIZES, vocab=16, rotary_sections=(2, 1, 1))

MIXED = Sample(
    id=0,
    length=3,
    rows={"vision": 24, "audio": 4},
    segments={"vision": ((1, 4, 2), (2, 2, 4)), "audio": ((4,),)},
    placeholders={"language": (1, 2, 5, 6, 7, 8, 3, 4)},
    intervals={"vision": (1.0, 3.0)},
)
TEXT = Sample(id=1, length=2, rows={})


def share_of(module: str, *samples: Sample, language: Gpt = LANGUAGE, vision: Vit = VISION) -> Share:
    """The share of a module of a job of two towers and a language model on one rank."""
    feeds = ("language",)
    modules = {
        "vision": ModuleSpec(model="vit", options=vision, feeds=feeds),
        "audio": ModuleSpec(model="vit", options=AUDIO, feeds=feeds),
        "language": ModuleSpec(model="gpt", options=language),
    }
    batch = BatchSpec(global_size=len(samples))
    spec = JobSpec(modules=modules, data=DataSpec(source="none"), batch=batch)
    return step_of(assemble(spec, SourceFacts(sequence=64)), samples).share(module, 0, 0)


def test_a_language_model_with_sections() -> None:
    """Sounds count as text; an image and a clip go on by their largest side, and a clip's frames by its interval."""
    time, height, width = rotary_positions(LANGUAGE, share_of("language", MIXED, TEXT))
    #      text | 2x1 image | sound | clip of 2 frames, 1x2 | text
    assert (0, 1, 1, 3, 4, 5, 5, 8, 8, 9, 10, 0, 1) == time
    assert (0, 1, 2, 3, 4, 5, 5, 5, 5, 9, 10, 0, 1) == height
    assert (0, 1, 1, 3, 4, 5, 6, 5, 6, 9, 10, 0, 1) == width


def test_text_within_an_image_is_refused() -> None:
    """It has no place between two rows of one image."""
    sample = attrs.evolve(MIXED, placeholders={"language": (1, 4, 5, 6, 7, 8, 2, 3)})
    with pytest.raises(
        PlanError, match="sample 0: has text between position 1 and 4 of 'language', inside an image"
    ):
        share_of("language", sample)
    assert share_of("language", sample, language=Gpt(**SIZES, vocab=16))


def test_most_modules_count() -> None:
    """Without sections a language model has no axes of its own, and neither has a tower of sound or a block."""
    plain = Gpt(**SIZES, vocab=16)
    assert () == rotary_positions(plain, share_of("language", MIXED, language=plain))
    assert () == rotary_positions(AUDIO, share_of("audio", MIXED))
    assert () == rotary_positions(Block(**SIZES), share_of("language", MIXED))


@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_tower_turns_patches_by_height_and_width(window: int) -> None:
    """In the order of its layers: block by block, window by window."""
    vision = attrs.evolve(VISION, window=window)
    axes = rotary_positions(vision, share_of("vision", MIXED, TEXT, vision=vision))
    grids = [(1, 4, 2), (2, 2, 4)]
    blocks = windows(grids, 2, window).order if window else range(6)
    patches = list(itertools.chain.from_iterable(range(4 * block, 4 * block + 4) for block in blocks))
    assert tuple(tuple(axis[i] for i in patches) for axis in patch_positions(grids, 2)) == axes
