"""Workload: a CLIP encoder that feeds a language model, as jobs on one rank and on four.

Weights and samples are random. Every sample has one image and text up to the full sequence, so all microbatches are
alike, and what a module's dp ranks send is too.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    OptimizerSpec,
    TrainSpec,
)
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job, open_job


CLIP = Vit(layers=24, hidden=1024, heads=16, features=3 * 14 * 14)
"""ViT-L/14 at 336 pixels: 576 patches of an image."""
PATCHES = 576
# The sizes of TinyLlama and Llama 2. Their MLPs have three matrices, ours two, half again as wide.
LANGUAGE = {
    "1b": Gpt(layers=22, hidden=2048, heads=32, kv_heads=4, ffn=8448, vocab=32000),
    "7b": Gpt(layers=32, hidden=4096, heads=32, ffn=16512, vocab=32000),
}
OPTIMIZER = {"tiny": "adamw", "1b": "adamw", "7b": "sgd"}
"""AdamW's moments of 7 billion parameters would leave no room for activations."""
TINY = "tiny"
TINY_SEQUENCE = 32

Layout = Mapping[str, GridSpec]
ALONE: Layout = {"vision": GridSpec(), "language": GridSpec(offset=0)}
"""Both modules on one rank."""
APART: Layout = {"vision": GridSpec(dp=2), "language": GridSpec(pp=2)}
"""The encoder in two dp ranks on ranks 0 and 1, the language model in two stages on ranks 2 and 3.

Four ranks, three stages deep: rows of two dp ranks meet at a bridge, hidden states cross a pipeline link, and the
encoder's gradients are summed.
"""


@attrs.frozen
class Options:
    """What the command was asked for. `samples` are those of a microbatch."""

    device: str
    samples: int
    microbatches: int
    precision: str
    engine: str
    recompute: str
    steps: int
    pairs: int

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.device == "cuda"


def job_of(options: Options, model: str, sequence: int, layout: Layout) -> JobSpec:
    """Return the job of a model and a sequence length in a layout."""
    vision, language, patches = CLIP, LANGUAGE.get(model), PATCHES
    if language is None:
        vision = Vit(layers=2, hidden=32, heads=4, features=12)
        language, patches = Gpt(layers=2, hidden=32, heads=4, vocab=64), 4
    text = sequence - patches
    modules = {
        "vision": ModuleSpec(model="vit", options=vision, feeds=("language",)),
        "language": ModuleSpec(model="gpt", options=language),
    }
    how = {"engine": options.engine, "recompute": options.recompute}
    return JobSpec(
        modules={name: attrs.evolve(module, grid=layout[name], **how) for name, module in modules.items()},
        data=DataSpec(
            source="synthetic",
            options={"sequence": sequence, "rows": {"vision": [patches, patches]}, "text": [text, text]},
        ),
        batch=BatchSpec(
            global_size=options.samples * options.microbatches, microbatches=options.microbatches
        ),
        optimizer=OptimizerSpec(name=OPTIMIZER[model], betas=None),
        train=TrainSpec(steps=1_000_000, evaluate=False),
        precision=options.precision,
    )


@contextlib.contextmanager
def opened(spec: JobSpec) -> Iterator[Job]:
    """Open a job from a file of its own, which every rank reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.toml")
        path.write_text(jobfile.dump(spec), encoding="utf-8")
        yield open_job(path)
