"""Inputs of the reference: what a processor gives becomes samples of a job, and these become the same inputs again."""

from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest
import torch

from checkpoints import VIDEOS, WHOLES, Batch, batch, make
from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.shell.data.batches import examples_of
from mimogrid.shell.job.published import Published, published
from mimogrid.shell.run.reference_inputs import inputs_of


@attrs.frozen
class Given:
    """A source of samples that are given."""

    tensors: tuple[Mapping[str, Mapping[str, torch.Tensor]], ...]

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return what a module reads of a sample."""
        return self.tensors[sample_id][module]


def back(found: Published, given: Batch) -> Batch:
    """A batch as samples of a job, and as inputs again."""
    examples = examples_of(found.model, given)
    return inputs_of(
        found, [e.sample for e in examples], Given(tuple(e.tensors for e in examples)), "language"
    )


@pytest.mark.parametrize("name", WHOLES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Tokens, masks, images of several sizes, and what of sounds a model sees."""
    found, given = published(make(name, tmp_path / name)), batch(name)
    seen = back(found, given)
    assert {"labels", "mm_token_type_ids"} >= given.keys() - seen.keys()
    for key, tensor in seen.items():
        if key == "input_features":
            frames = [int(mask.sum()) + 1 for mask in seen["feature_attention_mask"]]
            for ours, theirs, count in zip(tensor, given[key], frames, strict=True):
                assert torch.equal(ours[:, :count], theirs[:, :count])
        elif key == "feature_attention_mask":
            assert torch.equal((tensor.sum(dim=1) + 1) // 2, (given[key].sum(dim=1) + 1) // 2)
        else:
            assert torch.equal(tensor, given[key]), key


def test_videos_come_back(tmp_path: Path) -> None:
    """With the seconds between their frames, where positions depend on these."""
    found, given = published(make("qwen2.5-vl", tmp_path / "a")), batch("qwen2.5-vl", samples=VIDEOS)
    seen = back(found, given)
    for key in ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw", "input_ids"):
        assert torch.equal(seen[key], given[key]), key


def test_what_no_processor_gives(tmp_path: Path) -> None:
    """A token in the text that stands for rows, images that touch, and a sound that is cut too short."""
    whole = published(make("qwen2.5-vl", tmp_path / "images"))
    token = {"language": {"tokens": torch.tensor([3, 258])}}
    with pytest.raises(PlanError, match="its text has the token 258"):
        inputs_of(whole, [Sample(0, 2, {})], Given((token,)), "language")
    rows = {"vision": {"rows": torch.zeros(8, 96)}, "language": {"tokens": torch.tensor([-1, -1, 3])}}
    two = Sample(0, 1, {"vision": 8}, segments={"vision": ((1, 2, 2), (1, 2, 2))})
    with pytest.raises(PlanError, match="no text stands between two of its segments"):
        inputs_of(whole, [two], Given((rows,)), "language")
    sounds = published(make("qwen2-audio", tmp_path / "sounds"))
    heard = {"audio": {"rows": torch.zeros(8, 10)}, "language": {"tokens": torch.tensor([-1, -1, 3])}}
    short = Sample(0, 1, {"audio": 8}, segments={"audio": ((8,),)})
    with pytest.raises(PlanError, match="a sound of 8 frames lacks the one"):
        inputs_of(sounds, [short], Given((heard,)), "language")
