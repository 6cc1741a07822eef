"""Ragged: steps of samples whose segments have any lengths, and the same samples one by one in mere torch."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

import plain
from mimogrid.core.base.samples import Sample
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.reductions import loss_weight
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.parity import ParityReport, compare, full_gradients
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step
from stages import batch_of, full_weights


Drawn = tuple[int, Mapping[str, Sequence[int]]]
"""A sample: the length of its text, and by source module the lengths of the segments of its rows."""
Batch = list[dict[str, dict[str, Tensor]]]


def step_with(topology: Topology, drawn: Sequence[Drawn], seed: int = 0) -> tuple[Step, Batch]:
    """Return a step of such samples, and what a source has for each."""
    samples = tuple(
        Sample(
            id=i,
            length=text if topology.graph.texts else 0,
            rows={name: sum(lengths) for name, lengths in of.items()},
            segments={name: tuple((length,) for length in lengths) for name, lengths in of.items()},
        )
        for i, (text, of) in enumerate(drawn)
    )
    batch = batch_of(step_of(topology, samples), seed=seed)
    counted = tuple(
        attrs.evolve(sample, units={n: float(data[n]["loss_weights"].sum()) for n in topology.graph.texts})
        for sample, data in zip(samples, batch, strict=True)
    )
    return step_of(topology, counted), batch


@attrs.frozen(eq=False)
class Given:
    """A batch as a source."""

    batch: Batch

    def load(self, sample_id: int, module: str) -> Mapping[str, Tensor]:
        """Return what a sample has for a module."""
        return self.batch[sample_id][module]


def weighed(topology: Topology, step: Step, losses: Mapping[str, Tensor]) -> Tensor:
    """Return the job's loss: each sum over what it counts, if it counts anything."""
    parts = [loss_weight(topology, n) * loss / (step.units[n] or 1.0) for n, loss in losses.items()]
    return torch.stack(parts).sum()


def each_alone(
    topology: Topology, step: Step, drawn: Sequence[Drawn], batch: Batch
) -> tuple[float, Mapping[str, Tensor]]:
    """Return the loss of a step and its gradients, one sample at a time and one segment at a time."""
    weights = full_weights(topology)
    losses = plain.losses(topology, weights, batch, [of for _, of in drawn])
    total = weighed(topology, step, losses)
    total.backward()
    return float(total.detach()), {
        f"{module}.{name}": torch.zeros_like(weight) if weight.grad is None else weight.grad
        for module, own in weights.items()
        for name, weight in own.items()
    }


def against_each_alone(
    place: RankPlace, job: Job, steps: Sequence[Sequence[Drawn]]
) -> list[ParityReport] | None:
    """Run on every rank: compare each step; the first rank of the job returns the reports."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        reports = []
        for index, drawn in enumerate(steps):
            step, batch = step_with(job.topology, drawn, seed=index)
            outcome = train_step(session.runtime, index, step, step, update=False, source=Given(batch))
            ours = full_gradients(session.runtime)
            if place.rank == job.topology.ranks[0]:
                loss, gradients = each_alone(job.topology, step, drawn, batch)
                reports.append(compare((outcome.loss, loss), ours, gradients, precision="fp64"))
        return reports or None
