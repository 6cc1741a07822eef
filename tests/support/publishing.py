"""Publishing: what the ranks of a world do with a published checkpoint, ``publishing:function``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from hosts import host
from mimogrid.adapters.huggingface import Job
from mimogrid.adapters.torch_module import Example
from mimogrid.shell.data.batches import examples_of
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.published import published


Batch = Mapping[str, torch.Tensor]
Layout = Mapping[str, Any]
"""Keywords of `Job.from_pretrained`."""


@attrs.frozen
class Seen:
    """The loss of a step on a layout, and full gradients by name on the first rank."""

    loss: float | None
    gradients: Mapping[str, np.ndarray]


def steps(place: RankPlace, folder: Path, layouts: Sequence[Layout], batch: Batch) -> list[Seen]:
    """Run one step of a batch on each of several layouts, one after the other."""
    seen = []
    with host(place):
        for layout in layouts:
            with Job.from_pretrained(folder, **layout).open() as running:
                outcome, gradients = running.step(batch), running.gradients()
            assert (gradients is None) == (place.rank != 0)
            arrays = {name: tensor.float().numpy() for name, tensor in (gradients or {}).items()}
            if layout["precision"] == "fp64":
                arrays = {name: tensor.numpy() for name, tensor in (gradients or {}).items()}
            seen.append(Seen(outcome.loss if outcome else None, arrays))
    return seen


def saved(
    place: RankPlace, folder: Path, layout: Layout, batches: Sequence[Batch], out: Path
) -> list[float | None]:
    """Train on batches and save; return their losses."""
    with host(place), Job.from_pretrained(folder, **layout).open() as running:
        outcomes = [running.step(batch) for batch in batches]
        running.save_pretrained(out)
    return [outcome.loss if outcome else None for outcome in outcomes]


def adapted(
    place: RankPlace, folder: Path, layouts: Sequence[Layout], batches: Sequence[Batch], out: Path
) -> list[Seen]:
    """Train LoRA on each of several layouts; save it, alone and merged; return a step of the last batch after it."""
    seen = []
    with host(place):
        for number, layout in enumerate(layouts):
            with Job.from_pretrained(folder, **layout).open() as running:
                for batch in batches[:-1]:
                    running.step(batch)
                running.save_pretrained(out / f"{number}", merge=False)
                running.save_pretrained(out / f"{number}-merged")
                outcome, gradients = running.step(batches[-1]), running.gradients()
            arrays = {name: tensor.numpy() for name, tensor in (gradients or {}).items()}
            seen.append(Seen(outcome.loss if outcome else None, arrays))
    return seen


def answered(
    place: RankPlace, folder: Path, layout: Layout, batches: Sequence[Batch], out: Path
) -> list[np.ndarray]:
    """Train LoRA on batches and save it, alone and merged; return the logits [tokens, V] of the last batch after it."""
    with host(place), Job.from_pretrained(folder, **layout).open() as running:
        for batch in batches:
            running.step(batch)
        running.save_pretrained(out / "adapter", merge=False)
        running.save_pretrained(out / "merged")
        examples = [
            Example(each.sample, each.tensors) for each in examples_of(published(folder).model, batches[-1])
        ]
        return [logits.numpy() for logits in running._opened().answers(examples)]
