"""Against plain: loss and gradients of a job's step in its world, and of the same step by `plain`, on one rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

import plain
from mimogrid.core.step.step import Step
from mimogrid.core.update.reductions import loss_weight
from mimogrid.shell.device.device import DTYPES
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.parity import ParityReport, compare, full_gradients
from mimogrid.shell.runtime.forward_only import predict
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step
from stages import full_weights


def parity_in_world(place: RankPlace, job: Job, index: int = 0) -> ParityReport | None:
    """Run on every rank: compare one step; the first rank of the job returns the report."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        step = job.step(index)
        outcome = train_step(session.runtime, index, step, step, update=False)
        ours = full_gradients(session.runtime)
        if place.rank != job.topology.ranks[0]:
            return None
        loss, gradients = _plainly(job, step)
        return compare((outcome.loss, loss), ours, gradients, precision=job.spec.precision)


def _plainly(job: Job, step: Step) -> tuple[float, Mapping[str, Tensor]]:
    topology, dtype = job.topology, DTYPES[job.spec.precision]
    weights = full_weights(topology, dtype)
    names = {name: _loads(job, name) for name in topology.modules}
    batch = [
        {name: _exact(job.source.load(sample.id, name), dtype) for name, wanted in names.items() if wanted}
        for sample in step.samples
    ]
    losses = plain.losses(topology, weights, batch)
    total = torch.zeros((), dtype=dtype)
    for name, loss in losses.items():
        total = total + loss_weight(topology, name) * loss / step.units[name]
    total.backward()
    return float(total), {
        f"{module}.{name}": weight.grad
        for module, own in weights.items()
        for name, weight in own.items()
        if weight.grad is not None
    }


def _loads(job: Job, name: str) -> bool:
    """Whether a module reads anything from the data."""
    return job.topology.graph.nodes[name].is_source or job.topology.modules[name].model.has_loss


def _exact(loaded: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in loaded.items()}


def norms_in_world(place: RankPlace, job: Job) -> tuple[float, float] | None:
    """Run on every rank: return the norm that clips, and the one of all full gradients (on the first rank)."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        step = job.step(0)
        outcome = train_step(session.runtime, 0, step, step, update=False)
        squares = [float(g.double().square().sum()) for g in full_gradients(session.runtime).values()]
        return (outcome.gradient_norm, sum(squares) ** 0.5) if squares else None


def chosen_in_world(place: RankPlace, job: Job) -> list[int] | None:
    """Run on every rank: the likeliest token after each sample of the first step, by a forward-only program."""
    with open_session(place, job) as session:
        return session.runtime and predict(session.runtime, job.step(0), job.source)
