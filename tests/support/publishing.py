"""Publishing: what the ranks of a world do with a published checkpoint, ``publishing:function``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from hosts import host
from mimogrid.adapters.huggingface import Job
from mimogrid.shell.device.place import Place


@attrs.frozen
class Step:
    """The loss of a step on a layout, and full gradients by name on the first rank."""

    loss: float | None
    gradients: Mapping[str, np.ndarray] | None


def steps(
    place: Place, folder: Path, layouts: Sequence[Mapping[str, Any]], batch: Mapping[str, torch.Tensor]
) -> list[Step]:
    """Run one step of a batch on each of several layouts, in one world."""
    seen = []
    with host(place):
        for layout in layouts:
            with Job.from_pretrained(folder, **layout).open() as running:
                outcome, gradients = running.step(batch), running.gradients()
            arrays = {name: tensor.numpy() for name, tensor in gradients.items()} if gradients else None
            seen.append(Step(outcome.loss if outcome else None, arrays))
    return seen


def saved(
    place: Place,
    folder: Path,
    layout: Mapping[str, Any],
    out: Path,
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """Train steps, and save."""
    with host(place), Job.from_pretrained(folder, **layout).open() as running:
        for batch in batches:
            running.step(batch)
        running.save_pretrained(out)
