"""Parity with transformers: a job's layout against the published model that it starts from, on one process.

The reference (`shell.run.reference`) reads the same folder and the same samples of the job's source. Compared are the
loss, the logits of every sample, and every gradient by the name that its tensor has in the folder. The definition of
the loss is the job's, of transformers' logits: the sum over tokens of weight times cross entropy, divided by the sum of
all weights of the step. So any source can be compared, whatever it weighs.

In fp32 transformers computes as it is; in fp64 its casts to single precision are lifted. In both a token of the text
that is also the model's padding has a gradient, which transformers leaves out. The report lists what was lifted.
"""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn import functional

from mimogrid.core.job.models import Gpt
from mimogrid.core.models.mapping import inverse
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.reductions import loss_scale
from mimogrid.shell.device.device import DTYPES
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.job.published import Published, origin_of
from mimogrid.shell.modules.published import published_tensors
from mimogrid.shell.run.parity import ParityReport, compare, full_gradients, module_of, run_without_overflow
from mimogrid.shell.run.reference import Reference, ReferenceStep, reference, step_of
from mimogrid.shell.run.reference_inputs import inputs_of
from mimogrid.shell.runtime.data import Loads
from mimogrid.shell.runtime.forward_only import sample_logits
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.world.waiting import waiting


Tensors = Mapping[str, torch.Tensor]


@attrs.frozen
class ReferenceReport:
    """How a layout differs from transformers.

    Attributes:
        parity: of the loss and the gradients.
        logits: the largest difference of a logit, relative to the largest of the step.
        lifted: what of transformers was lifted: casts, each as the function and the operation that it called, and
            embeddings whose padding has no gradient there.
    """

    parity: ParityReport
    logits: float
    lifted: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest of all differences."""
        return max(self.parity.loss, self.parity.gradients, self.logits)

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the tolerance."""
        return self.parity.passed and self.logits <= self.parity.limit

    def as_json(self) -> dict[str, object]:
        """Return the report with the worst parameters, for a script."""
        return {**self.parity.as_json(), "passed": self.passed, "logits": self.logits, "lifted": self.lifted}

    def __str__(self) -> str:
        """Return the report with the worst parameters, for people."""
        lines = [
            str(self.parity),
            f"{'passed' if self.passed else 'FAILED'}: logits differ by {self.logits:.2e}",
        ]
        if self.lifted:
            lines += ["lifted of transformers, which casts to single precision and does not train padding:"]
            lines += [f"    {lift}" for lift in self.lifted]
        return "\n".join(lines)


def in_world(
    place: RankPlace, job: Job, steps: int, transport: str | None = None, speaks: bool = False
) -> ReferenceReport | None:
    """Compare steps of a job, on every rank of its world; the first rank of the job returns the worst report.

    If it `speaks`, that rank says what it is at.
    """
    with open_session(place, job, transport=transport, speaks=speaks) as session:
        if session.runtime is None:
            return None
        is_first = place.rank == job.topology.ranks[0]
        found = origin_of({name: module.weights for name, module in job.spec.modules.items()})
        device, dtype = session.device.torch, DTYPES[job.spec.precision]
        reports: list[ReferenceReport] = []
        with waiting(
            "reading the model of transformers", silent=not (speaks and is_first), in_place=False
        ) as shown:
            model = _model(found, dtype, device) if is_first else None
            for index in range(steps):
                step, of = job.step(index), f"step {index + 1} of {steps}"
                shown.say(f"{of} on {len(job.topology.ranks)} ranks")
                logits = sample_logits(session.runtime, step)
                outcome = run_without_overflow(session.runtime, index, step)
                ours = full_gradients(session.runtime)
                if model is not None and job.source is not None:
                    shown.say(f"{of} in transformers")
                    theirs = _reference_step(model, found, step, job.source)
                    reports.append(_compared(found, step, outcome.loss, logits, ours, theirs, model))
        return max(reports, key=lambda report: report.largest) if reports else None


# -- the reference's step ----------------------------------------------------------------------------------


def _model(found: Published, dtype: torch.dtype, device: torch.device) -> Reference:
    """Return the model of transformers; a token in its text that is also its padding has a gradient, as any other."""
    model = reference(found.folder, dtype, device=device)
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            model.casts[f"{name}: padding_idx={module.padding_idx}"] += 1
            module.padding_idx = None
    return model


def _reference_step(model: Reference, found: Published, step: Step, source: Loads) -> ReferenceStep:
    """Return what transformers computes of a step's samples, with the job's loss."""
    name = language_of(step.topology)
    loaded = [source.load(sample.id, name) for sample in step.samples]
    labels_T, weights_T = (
        torch.cat([tensors[key] for tensors in loaded]) for key in ("labels", "loss_weights")
    )
    scale = loss_scale(step.topology, name, step.units[name])
    lengths = [len(tensors["tokens"]) for tensors in loaded]

    def loss_of(output: Any) -> torch.Tensor:
        logits_TV = torch.cat([logits[:n] for logits, n in zip(output.logits, lengths, strict=True)])
        losses_T = functional.cross_entropy(logits_TV, labels_T.to(logits_TV.device), reduction="none")
        return scale * torch.dot(weights_T.to(losses_T), losses_T)

    return step_of(model, inputs_of(found, step.samples, source, name), loss_of)


def language_of(topology: Topology) -> str:
    """Return the module with the loss."""
    return next(name for name, module in topology.modules.items() if isinstance(module.model, Gpt))


# -- comparing ---------------------------------------------------------------------------------------------


def _compared(  # noqa: PLR0917 -- two sides of a step
    found: Published,
    step: Step,
    loss: float,
    logits: Mapping[int, torch.Tensor],
    ours: Tensors,
    theirs: ReferenceStep,
    model: Reference,
) -> ReferenceReport:
    """Compare a step; frozen parameters are absent on both sides."""
    topology = step.topology
    named: dict[str, torch.Tensor] = {}
    modules: dict[str, str] = {}
    for name, module in topology.modules.items():
        inside = {key.removeprefix(f"{name}."): g for key, g in ours.items() if module_of(key) == name}
        given = published_tensors(found, name, inside)
        named |= given
        modules |= dict.fromkeys(given, name)
        trainable = {weight for info in module.stages for weight in info.trainable}
        for stored, sources in inverse(found.module(name).recipes).items():
            if trainable.intersection(source.name for source in sources):
                modules[stored.name] = name
    gradients = {name: gradient.cpu() for name, gradient in theirs.gradients.items() if name in modules}
    precision = topology.spec.precision
    return ReferenceReport(
        compare((loss, theirs.loss), named, gradients, precision=precision, module=modules.__getitem__),
        _logits_apart(logits, theirs.logits.cpu()),
        model.lifted,
    )


def _logits_apart(ours: Mapping[int, torch.Tensor], theirs_BTV: torch.Tensor) -> float:
    """Return the largest difference of a logit, relative to the largest of the step."""
    pairs = [(logits, theirs_BTV[place, : len(logits)]) for place, logits in ours.items()]
    scale = max(float(theirs.abs().max()) for _, theirs in pairs)
    return max(float((logits - theirs).abs().max()) for logits, theirs in pairs) / scale
