"""A layout run agrees with a model written down in plain torch, and with difference quotients of its loss."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import plain
from layouts import job
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.update.reductions import loss_scale
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from scale import drawn, nightly_only
from stages import full_weights


pytestmark = pytest.mark.world

CLOSE = 1e-9
Opened = Callable[[JobSpec], Job]
Weights = Mapping[str, Mapping[str, Tensor]]


def plain_loss(opened_job: Job, weights: Weights) -> Tensor:
    """The job's loss of the first step, from the plain models."""
    topology, source, step = opened_job.topology, opened_job.source, opened_job.step(0)
    assert source is not None
    batch = [
        {name: _in_fp64(source.load(sample.id, name)) for name in topology.modules} for sample in step.samples
    ]
    sums = plain.losses(topology, weights, batch)
    total = torch.zeros((), dtype=torch.float64)
    for name, value in sums.items():
        total = total + value * loss_scale(topology, name, step.units[name])
    return total


def _in_fp64(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def layout_gradients(pool: Pool, opened_job: Job) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients from the layout."""
    said = pool.run("bodies:gradients", opened_job.topology.world_size, opened_job)
    ((loss, found),) = [one for one in said if one is not None]
    return loss, {name: torch.from_numpy(gradient) for name, gradient in found.items()}


@pytest.mark.parametrize(
    ("grids", "changes"),
    [
        ("enc(2,1,2)@0 lm(1,2,2)@4", {"lm": {"options": {"tied_embeddings": True}}}),
        ("enc(1,1,3)@0->mid,lm mid(2,1,1)@3 lm(1,2,1)@5->gen gen(1,1,1)@7", {"gen": {"loss_weight": 0.5}}),
        *nightly_only([("img(1,2,1)@0->mid aud(1,1,2)@2->mid,gen mid(1,1,3)@4->gen gen(2,1,1)@0", {})]),
    ],
)
def test_the_layout_is_the_plain_model(
    pool: Pool, opened: Opened, grids: str, changes: dict[str, dict[str, Any]]
) -> None:
    """Loss and every gradient are those of the models in mere torch, sample by sample."""
    opened_job = opened(job(grids, changes=changes, microbatches=2))
    weights = full_weights(opened_job.topology)
    expected = plain_loss(opened_job, weights)
    expected.backward()
    loss, found = layout_gradients(pool, opened_job)
    assert float(expected.detach()) == pytest.approx(loss, rel=CLOSE)
    names = {f"{module}.{name}" for module, own in weights.items() for name in own}
    assert names == found.keys()
    for module, own in weights.items():
        floor = 1e-3 * max(float(w.grad.abs().max()) for w in own.values() if w.grad is not None)
        for name, weight in own.items():
            assert weight.grad is not None, (module, name)
            apart = float((weight.grad - found[f"{module}.{name}"]).abs().max())
            assert apart <= CLOSE * max(float(weight.grad.abs().max()), floor), (module, name)


def test_gradients_are_difference_quotients(pool: Pool, opened: Opened) -> None:
    """Nudging weights of every module changes the loss as the layout's gradients say."""
    grids = "enc(1,1,2)@0->mid,lm mid(1,2,1)@2 lm(2,1,1)@4->gen gen(1,1,2)@6"
    opened_job = opened(job(grids, microbatches=2, samples=2))
    _, found = layout_gradients(pool, opened_job)
    chosen, nudge = random.Random(5), 1e-5
    weights = full_weights(opened_job.topology)
    for module, own in weights.items():
        largest = max(float(found[f"{module}.{name}"].abs().max()) for name in own)
        for name in chosen.sample(sorted(own), min(drawn(2), len(own))):
            where = chosen.randrange(own[name].numel())
            values = own[name].detach().view(-1)
            losses, before = [], values[where].clone()
            for step in (nudge, -nudge):
                values[where] = before + step
                with torch.no_grad():
                    losses.append(float(plain_loss(opened_job, weights)))
            values[where] = before
            expected = (losses[0] - losses[1]) / (2 * nudge)
            got = float(found[f"{module}.{name}"].view(-1)[where])
            assert expected == pytest.approx(got, abs=1e-5 * largest, rel=1e-5), (module, name, where)
