"""Hugging Face: a folder with a published checkpoint trains on grids of ranks, and leaves as such a folder.

    job = Job.from_pretrained(folder, grids={"vision": dict(dp=2), "language": dict(tp=2, pp=2)}, precision="fp64")
    print(job.check())
    with job.open() as running:                 # in a world that torchrun or the host has made
        out = running.step(batch)               # what the processor makes, and labels: the whole batch, on every rank
        gradients = running.gradients()         # {Hugging Face name: full tensor}, on the first rank
        running.save_pretrained("out")

Loss and gradients are those of transformers: the mean over the tokens with a label, each predicted from those before
it. It needs safetensors, and not transformers. docs/models.md says which checkpoints it takes.

`Trainer` puts a job behind the names of transformers' trainer, and needs transformers.
"""

from typing import TYPE_CHECKING, Any

from mimogrid.adapters.huggingface.arguments import Arguments
from mimogrid.adapters.huggingface.job import Job, Running


if TYPE_CHECKING:
    from mimogrid.adapters.huggingface.trainer import Trainer

__all__ = ["Arguments", "Job", "Running", "Trainer"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from mimogrid.adapters.huggingface.trainer import Trainer  # noqa: PLC0415 -- only it needs transformers

        return Trainer
    raise AttributeError(name)
