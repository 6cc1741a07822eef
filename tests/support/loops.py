"""Loops: a forward step and a loss function as a program for Megatron has them, here and in a job's program."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import megatrons
import specs
from hosts import host
from mimogrid.adapters.megatron import forward_backward_func
from mimogrid.adapters.megatron.batches import Batch, examples_of
from mimogrid.core.base.errors import EchoError, PlanError, WorldError
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.tensor_slices import full_tensors


SEQUENCE, SAMPLES, MICROBATCHES = 16, 12, 4
ROWS = (4, 2, 0, 6)
"""Placeholders of one sample after the other."""
PACKED = (5, 6, 13, SEQUENCE)
"""Where the segments of a row end in batches that are packed."""


def batches(
    *,
    labels: bool = True,
    images: bool = False,
    several: bool = False,
    steps: int = 2,
    turned: bool = False,
    masked: bool = False,
    packed: bool = False,
    sounds: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield microbatches: all of their samples, placeholders among the text, some tokens half or not counted."""
    generator = torch.Generator().manual_seed(3)
    size = SAMPLES // MICROBATCHES
    for microbatch in range(steps * MICROBATCHES):
        counts = [ROWS[(microbatch + i) % len(ROWS)] * (3 if several else 2) // 2 for i in range(size)]
        ids = torch.randint(0, specs.IMAGE, (size, SEQUENCE), generator=generator)
        for sample, count in zip(ids, counts, strict=True):
            sample[torch.randperm(SEQUENCE, generator=generator)[:count]] = megatrons.PLACEHOLDER
        if sounds:
            text = (ids != megatrons.PLACEHOLDER).nonzero()[microbatch % 3 :: 4]
            ids[text[:, 0], text[:, 1]] = megatrons.SOUND
        mask = torch.randint(0, 3, ids.shape, generator=generator) / 2
        pixels = torch.randn(sum(counts), specs.PIXELS, dtype=torch.float64, generator=generator)
        eye = {"pixels": pixels}
        if images:
            brightness = torch.rand(sum(counts) // 2, dtype=torch.float64, generator=generator)
            eye = {"images": pixels.view(-1, 2, specs.PIXELS), "brightness": brightness}
        inputs = {"eye": eye}
        if several:
            frames = torch.randn(sum(counts) // 3, 2, specs.PIXELS, dtype=torch.float64, generator=generator)
            far = {"images": frames, "brightness": frames[:, 0, 0]}
            inputs = {"near": {"pixels": pixels[: sum(counts) // 3]}, "far": far}
        count = int((ids == megatrons.SOUND).sum())
        heard = torch.randn(count, specs.PIXELS, dtype=torch.float64, generator=generator)
        counted = torch.arange(SEQUENCE).expand_as(ids)
        turns = torch.stack([counted, counted // 3, counted % 5 + ids % 2])
        hidden = torch.ones(size, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        for sample, of_sample in enumerate(hidden):
            of_sample[0, : 4 + sample, : 4 + sample] = False
        ends = torch.tensor(
            [0, *(SEQUENCE * row + end for row in range(size) for end in PACKED)], dtype=torch.int32
        )
        inside = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise((0, *PACKED))])
        yield {
            "input_ids": ids,
            "position_ids": turns if turned else inside.expand_as(ids) if packed else counted,
            "attention_mask": hidden if masked else None,
            "loss_mask": mask,
            **({"labels": ids.roll(-1, dims=1) % specs.VOCAB} if labels else {}),
            **({"packing_kwargs": {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}} if packed else {}),
            "modality_inputs": {
                "vision": inputs,
                **({"audio": {"ear": {"pixels": heard}}} if sounds else {}),
            },
        }


def of_losses(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A loss that no cross entropy is: powers of the losses [B, S] of the labels."""
    loss = (output**1.5 * loss_mask).sum()
    return loss, loss_mask.sum(), {"lm loss": torch.stack([loss.detach(), loss_mask.sum()])}


def of_logits(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A loss of logits [B, S, V], which has no labels."""
    loss = ((output.tanh() ** 2).sum(dim=-1) * loss_mask).sum()
    return loss, loss_mask.sum(), {"lm loss": torch.stack([loss.detach(), loss_mask.sum()])}


def of_means(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of the losses, as most programs begin; it is not a number where there are no tokens."""
    total = (output * loss_mask).sum()
    return total / loss_mask.sum(), {"lm loss": total.detach()[None]}


def of_counted_means(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of a loss of logits [B, S, V]; its report has the sum and the number of tokens."""
    total, count, report = of_logits(loss_mask, output)
    return total / count, report


def step_with(loss: Any) -> Any:
    """Return a forward step as a program for `MimoModel` has it."""

    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        output, loss_mask = model(**next(data_iterator))
        return output, partial(loss, loss_mask)

    return forward_step


@attrs.frozen
class Stepped:
    """What a step and an evaluation reported on a rank, and the gradients by Megatron's names (first rank)."""

    reports: list[list[float]]
    evaluated: list[list[float]]
    gradients: Mapping[str, Any]


STEP: Mapping[str, Any] = {
    "num_microbatches": MICROBATCHES,
    "seq_length": SEQUENCE,
    "micro_batch_size": SAMPLES // MICROBATCHES,
}


def one_by_one(batch: Mapping[str, Any], ends: Sequence[int]) -> Iterator[tuple[int, slice, dict[str, Any]]]:
    """Yield each segment of each row of a batch as a batch; its items are in proportion to its placeholders."""
    places = batch["input_ids"] == megatrons.PLACEHOLDER
    begin, total = 0, int(places.sum())
    for row, (start, stop) in itertools.product(range(len(places)), itertools.pairwise((0, *ends))):
        part = slice(begin, begin + int(places[row, start:stop].sum()))
        begin = part.stop
        inputs = {
            encoder: {
                name: tensor[part.start * len(tensor) // total : part.stop * len(tensor) // total]
                for name, tensor in arguments.items()
            }
            for encoder, arguments in batch["modality_inputs"]["vision"].items()
        }
        yield (
            row,
            slice(start, stop),
            {
                **{
                    n: batch[n][row : row + 1, start:stop] for n in ("input_ids", "position_ids", "loss_mask")
                },
                "attention_mask": None,
                "modality_inputs": {"vision": inputs if part.stop > part.start else None},
            },
        )


class InFull(nn.Module):
    """`MimoModel` with losses in the precision of its logits; its own are rounded to fp32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor | None = None, **batch: Any) -> tuple[Tensor, Tensor]:
        """Return losses [B, S], or logits [B, S, V] where there are no labels."""
        packed, encoders = batch.pop("packing_kwargs", None), batch["modality_inputs"]["vision"] or ()
        if packed is not None or len(encoders) > 1 < len(batch["input_ids"]):
            # Megatron puts the rows of all samples of one encoder before those of the next, and packs only on CUDA.
            parts = one_by_one(batch, PACKED if packed else (SEQUENCE,))
            said = [
                self(None if labels is None else labels[row : row + 1, at], **one)[0]
                for row, at, one in parts
            ]
            in_row = len(said) // len(batch["input_ids"])
            rows = [torch.cat(said[i : i + in_row], dim=1) for i in range(0, len(said), in_row)]
            return torch.cat(rows), batch["loss_mask"]
        # In 0.16 the language model gets no position ids, by which mrope turns; in 0.19 it gets no mask.
        language, turns = self.model.language_model, batch["position_ids"]
        given = {"attention_mask": batch["attention_mask"]}
        if turns.dim() > 2:
            given, batch = {**given, "position_ids": turns}, {**batch, "position_ids": None}
        whole = language.forward
        with mock.patch.object(language, "forward", lambda **named: whole(**{**named, **given})):
            logits, loss_mask = self.model(**batch)
        output = logits if labels is None else cross_entropy(logits.mT, labels, reduction="none")
        return output, loss_mask


def expected(config: Mapping[str, Any], loss: Any, options: Mapping[str, Any]) -> tuple[Stepped, Any]:
    """What Megatron's model on one process comes to, whose gradients are divided by all tokens; and its weights."""
    whole = megatrons.whole(megatrons.config_of(**config))
    model, iterator, forward_step = InFull(whole), batches(**options), step_with(loss)
    reports, total, count = [], torch.zeros((), dtype=torch.float64), 0.0
    for _ in range(MICROBATCHES):
        output, loss_func = forward_step(iterator, model)
        returned = loss_func(output)
        if len(returned) == 2:  # (mean, report): its sum is over the tokens of the mask
            mean, report = returned
            tokens = loss_func.args[0].sum()
            of_microbatch = mean * tokens
        else:
            of_microbatch, tokens, report = returned
        total, count = total + of_microbatch, count + float(tokens)
        reports.append(report["lm loss"].tolist())
    (total / count).backward()
    gradients = {name: w.grad.numpy() for name, w in whole.named_parameters() if w.grad is not None}
    weights = {n: t.numpy() for n, t in whole.state_dict().items() if isinstance(t, Tensor)}
    return Stepped(reports, reports, gradients), weights


def stepped(  # noqa: PLR0917 -- what a pool calls has no keywords
    place: RankPlace,
    job: Job,
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    loss: Any,
    options: Mapping[str, Any],
    encoder_inputs: Mapping[str, str] | None,
) -> Stepped:
    """Evaluate the first samples in a job's program, then train on them."""
    hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
    with host(place):
        made = megatrons.config_of(**config, here=hosted)
        function = forward_backward_func(job, made, encoder_inputs=encoder_inputs, optimizer="host")
        function.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        arguments = {**STEP, "forward_step_func": step_with(loss), "model": [function.model]}
        evaluated = function(**arguments, data_iterator=batches(**options), forward_only=True)
        reports = function(**arguments, data_iterator=[batches(**options)])
        runtime = function.embedded.runtime
        assert runtime is not None
        of_stage = {
            stage: {name: w.grad for name, w in buffer.weights.items()}
            for stage, buffer in runtime.buffers.items()
        }
        gradients = full_tensors(runtime, of_stage)
        function.embedded.close()
        return Stepped(
            [report["lm loss"].tolist() for report in reports],
            [report["lm loss"].tolist() for report in evaluated],
            {name: gradient.numpy() for name, gradient in gradients.items()},
        )


def of_tokens(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss that a job has of its own."""
    loss = torch.dot(loss_mask.flatten().to(output.dtype), output.flatten())
    return loss, loss_mask.sum(), {}


def both_ways(place: RankPlace, job: Job) -> tuple[list[Any], list[Any]]:
    """Take a step on a forward step of the program's, and the same one on samples; return gradients of both."""
    found = []
    for forward_step in (step_with(of_tokens), None):
        with host(attrs.evolve(place, meeting=f"{place.meeting}-{len(found)}")):
            tokens = {"vision": megatrons.PLACEHOLDER}
            function = forward_backward_func(job, special_token_ids=tokens, optimizer="host")
            language = job.topology.modules["language"]
            size = {"samples": SAMPLES // MICROBATCHES, "sequence": SEQUENCE, "rows_of": {}}
            samples = (examples_of(Batch(**batch), language, tokens, **size) for batch in batches())
            iterator = samples if forward_step is None else batches()
            function(**STEP, forward_step_func=forward_step, data_iterator=iterator, model=None)
            found.append([w.grad.tolist() for w in function.embedded.parameters() if w.grad is not None])
            function.embedded.close()
    return found[0], found[1]


def miscounted(place: RankPlace, job: Job, config: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """Count every position, whatever the mask says.

    Return what this rank is told, whether a weight has changed, and whether the step was taken.
    """

    def loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
        return (output * loss_mask).sum(), loss_mask.numel(), {}

    with host(place):
        hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
        function = forward_backward_func(job, megatrons.config_of(**config, here=hosted))
        for weight in function.embedded.parameters():
            nn.init.normal_(weight, std=0.1)
        before = [weight.detach().clone() for weight in function.embedded.parameters()]
        said, step = "", step_with(loss)
        try:
            function(**STEP, forward_step_func=step, data_iterator=batches(), model=[function.model])
        except WorldError as error:
            said = str(error)
        # What nobody has drawn may be anything, NaN too.
        exact = functools.partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
        assert function.outcome is not None
        changed = not all(map(exact, before, function.embedded.parameters()))
        return said, changed, function.outcome.taken


def failing(place: RankPlace, job: Job, config: Mapping[str, Any], broken: int) -> tuple[str, str, bool]:
    """Fail on one rank to make the first step's batch; return what this one is told, and whether it takes the next."""

    def forward_step(data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        if place.rank == broken:
            raise KeyError("input_ids")
        output, loss_mask = model(**batch)
        return output, partial(of_losses, loss_mask)

    with host(place):
        hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
        function = forward_backward_func(job, megatrons.config_of(**config, here=hosted))
        for weight in function.embedded.parameters():
            nn.init.normal_(weight, std=0.1)
        error: Exception = AssertionError("no failure")
        arguments = {**STEP, "model": [function.model]}
        try:
            function(**arguments, forward_step_func=forward_step, data_iterator=batches())
        except (KeyError, EchoError) as caught:
            error = caught
        function(**arguments, forward_step_func=step_with(of_losses), data_iterator=batches())
        return type(error).__name__, str(error), function.outcome is not None and function.outcome.taken


def meaning(place: RankPlace, job: Job, config: Mapping[str, Any]) -> str:
    """Return a mean of logits without a count, on the ranks of the last stage; return what fails here by that."""

    def loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return output.mean(), {"lm loss": loss_mask.mean()}

    with host(place):
        hosted = {info.stage.module: len(info.layers) for info in job.topology.role(place.rank).stages}
        function = forward_backward_func(job, megatrons.config_of(**config, here=hosted))
        arguments = {
            "forward_step_func": step_with(loss),
            "data_iterator": batches(labels=False),
            "model": [function.model],
        }
        try:
            function(**STEP, **arguments)
        except (PlanError, WorldError, RuntimeError) as error:
            return type(error).__name__
        return ""
