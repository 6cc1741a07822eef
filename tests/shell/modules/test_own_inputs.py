"""What a module of the user's reads: whatever its source loads, joined over samples; a described count is enough."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mimogrid.core.base.errors import WorldError
from mimogrid.core.base.samples import Sample
from mimogrid.core.step.step import Step
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.data import Loader
from mimogrid.shell.world.launch import Pool


SEEING = '''
"""An image encoder that takes pixels, a caption as its second input, and a source of both."""

import torch
from torch import nn

from mimogrid.core.base.hashing import draw_integer
from mimogrid.core.base.samples import Sample

ROWS = 4  # of each image


class Eyes(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.brightness = nn.Linear(1, width)

    def forward(self, inputs):
        assert inputs["pixels"].dtype == self.patches.weight.dtype and "rows" not in inputs
        assert inputs["lengths"].sum() == ROWS * len(inputs["pixels"]) == ROWS * len(inputs["brightness"])
        patches_IWhw = self.patches(inputs["pixels"])
        rows_IRW = patches_IWhw.flatten(2).transpose(1, 2) + self.brightness(inputs["brightness"])[:, None]
        return {"rows": rows_IRW.flatten(0, 1)}


def build(width):
    return Eyes(width)


class Album:
    """Two images, or one, or none."""

    def __init__(self, seed):
        self.seed = seed

    def images(self, sample_id):
        return draw_integer(self.seed, sample_id, "images", 0, 2)

    def describe(self, sample_id):
        return Sample(id=sample_id, length=3, rows={"eyes": ROWS * self.images(sample_id)})

    def load(self, sample_id, module):
        count = self.images(sample_id)
        if module == "eyes":
            assert count, "a sample without the modality is not loaded for it"
            random = torch.Generator().manual_seed(sample_id)
            return {
                "pixels": torch.rand(count, 3, 8, 8, generator=random),
                "brightness": torch.rand(count, 1, generator=random),
            }
        tokens = torch.tensor([-1] * ROWS * count + [1, 2, sample_id % 5])
        return {"tokens": tokens, "labels": tokens.roll(-1).clamp(min=0), "loss_weights": (tokens >= 0).float()}


def album(seed, sequence):
    return Album(seed)
'''
JOB = """
precision = "fp64"
[modules.eyes]
model = "its_own:build"
width = 6
feeds = ["language"]
grid = { dp = 2 }
options = { width = 6 }
[modules.language]
model = "gpt"
grid = { pp = 2 }
options = { layers = 2, hidden = 8, heads = 2, vocab = 8 }
[data]
source = "its_own:album"
options = { sequence = 12 }
[batch]
global_size = 8
microbatches = 2
"""

NUMBERS = itertools.count()


@pytest.fixture
def seeing(tmp_path: Path) -> Job:
    """A job of an image encoder of the user's that takes pixels."""
    name = f"seeing_{next(NUMBERS)}"  # ranks may have imported that of another test
    (tmp_path / f"{name}.py").write_text(SEEING)
    (tmp_path / "job.toml").write_text(JOB.replace("its_own", name))
    return open_job(tmp_path / "job.toml")


@pytest.mark.world
def test_an_image_encoder_takes_pixels_and_has_parity(pool: Pool, seeing: Job) -> None:
    """The source loads no rows for it: `describe` says how many each sample becomes; images may lack."""
    said = pool.run("mimogrid.shell.run.parity:in_world", 4, seeing, 2)
    (report,) = [report for report in said if report]
    assert report.passed
    assert {"eyes.patches.weight", "eyes.brightness.weight"} <= {each.parameter for each in report.worst}
    assert all(each.reference > 0 for each in report.worst if each.parameter.startswith("eyes."))


class Loads:
    """A source that loads the same for every sample."""

    def __init__(self, load: Callable[[int], Mapping[str, torch.Tensor]]) -> None:
        self._load = load

    def load(self, sample_id: int, _: str) -> Mapping[str, torch.Tensor]:
        """Load a sample."""
        return self._load(sample_id)


def inputs(job: Job, load: Callable[[int], Mapping[str, torch.Tensor]]) -> Any:
    """What the encoder reads of two samples of four rows."""
    step = Step(job.topology, tuple(Sample(id=i, length=3, rows={"eyes": 4}) for i in range(8)))
    loader = Loader(Loads(load), device=torch.device("cpu"), dtype=torch.float64)
    return loader.inputs(job.topology.modules["eyes"], step.share("eyes", 0, 0))


def test_inputs_are_joined_over_samples(seeing: Job) -> None:
    """By name, along the first dim; integers stay integers."""
    found = inputs(seeing, lambda i: {"pixels": torch.full((1, 2), i), "size": torch.tensor([i])})
    assert [[0, 0], [1, 1]] == found["pixels"].tolist()
    assert torch.int64 == found["size"].dtype


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (
            lambda i: {"pixels": torch.zeros(1, 3, 8 + i)},
            r"'pixels' .* shapes such as \[1, 3, 8\] and \[1, 3, 9\]",
        ),
        (lambda i: {"size": torch.tensor(i)}, r"'size' for module 'eyes' in shapes such as \[\] and \[\]"),
        (lambda i: {"rows": torch.zeros(3, 2)}, r"described 4 rows .* and loaded 3"),
        (lambda i: {}, "loads nothing for module 'eyes'"),
    ],
)
def test_what_cannot_be_joined_is_told_with_its_shapes(seeing: Job, load: Any, said: str) -> None:
    """Before the module is called."""
    with pytest.raises(WorldError, match=said):
        inputs(seeing, load)
