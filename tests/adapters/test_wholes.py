"""Published wholes: towers and a language model on grids of their own have the loss and gradients of transformers."""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import batch, make
from mimogrid.shell.job.published import published
from mimogrid.shell.run.reference import ReferenceStep, losses_and_gradients, reference
from mimogrid.shell.world.launch import Pool
from publishing import Seen
from scale import SCALE


FROZEN = {"lr": 0.0, "weight_decay": 0.0}
TWO = {"microbatches": 2}
TOWER = {"qwen2-audio": "audio"}
WHOLES = ("llava", "llava-siglip")
EVERY_DAY = ("llava",)


def layout(
    tower: Mapping[str, Any], language: Mapping[str, Any], *, precision: str = "fp64", **tables: Any
) -> dict[str, Any]:
    """A layout on which a step changes no weight; the tower's grid is named `tower`."""
    grids = {"tower": tower, "language": language}
    return {"grids": grids, "precision": precision, "optimizer": FROZEN, **tables}


FLOOR = 1e-3
ZB = {"name": "zb-h1"}
LAYOUTS = {
    "one rank": layout({}, {"offset": 0}),
    "dp2 | tp2 pp2": layout({"dp": 2}, {"tp": 2, "pp": 2, "offset": 0}, batch=TWO),
    "tp2 | dp2": layout({"tp": 2}, {"dp": 2}),
    "cp2 | cp2": layout({"cp": 2}, {"cp": 2}),
    "sp | sp": layout({"tp": 2, "sequence_parallel": True}, {"tp": 2, "sequence_parallel": True}),
    "zb-h1": layout({"pp": 2}, {"pp": 2}, batch=TWO, schedule=ZB),
}


@functools.cache
def folder(name: str) -> Path:
    """A checkpoint that all tests of this file share."""
    return make(name, Path(tempfile.mkdtemp(), name))


@functools.cache
def modules(name: str) -> Mapping[str, str]:
    """The module that each tensor of a checkpoint is of."""
    return {
        tensor.name: module
        for module, described in published(folder(name)).model.modules.items()
        for recipe in described.recipes.values()
        for tensor in recipe.tensors
    }


def differences(name: str, seen: Seen, of: ReferenceStep) -> tuple[float, float]:
    """How far the loss and any gradient are from the reference's, relative to the largest value of each.

    A gradient is not compared more finely than a thousandth of the largest of its module: that of a key's bias is zero
    in theory where nothing turns.
    """
    assert seen.loss is not None
    assert seen.gradients.keys() == of.gradients.keys()
    largest: dict[str, float] = {}
    for tensor, gradient in of.gradients.items():
        module = modules(name)[tensor]
        largest[module] = max(largest.get(module, 0.0), float(gradient.abs().max()))
    worst = max(
        float(np.abs(seen.gradients[tensor] - gradient.numpy()).max())
        / max(float(gradient.abs().max()), FLOOR * largest[modules(name)[tensor]])
        for tensor, gradient in of.gradients.items()
    )
    return abs(seen.loss - of.loss) / of.loss, worst


@functools.cache
def expected(name: str) -> ReferenceStep:
    """What transformers computes in double precision."""
    return losses_and_gradients(reference(folder(name)), batch(name))


def of(name: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """A layout of a model, whose tower has a name of its own."""
    grids = dict(written["grids"])
    tower = grids.pop("tower")
    return {**written, "grids": {TOWER.get(name, "vision"): tower, **grids}}


@pytest.mark.world
@pytest.mark.parametrize("name", WHOLES if SCALE > 1 else EVERY_DAY)
def test_every_layout_has_the_gradients_of_transformers(pool: Pool, name: str) -> None:
    """By their names on disk."""
    layouts = [of(name, written) for written in LAYOUTS.values()]
    said = pool.run("publishing:steps", 4, folder(name), layouts, batch(name))
    for label, seen in zip(LAYOUTS, said[0], strict=True):
        assert max(differences(name, seen, expected(name))) < 1e-9, label
