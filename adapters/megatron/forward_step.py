"""A host program's `forward_step_func`: it is called at the start of a step, and its loss function later.

Megatron calls `forward_step_func` whenever a stage runs, and the function calls the model. In a job the program decides
what runs when, and it needs the samples before it starts. So the function is called once per microbatch at the start of
the step. Its model records the call (`RecordedModel`) and returns a placeholder for its output. The loss function that
it returns is called on the ranks of the last stage, when the output of the microbatch exists.

The loss function gets the same output as in Megatron: losses [b, s], or logits [b, s, V / tp] if the batch has no
labels, for the samples of this dp rank and the positions of this cp rank. It returns ``(sum, number of tokens,
report)`` or ``(mean, report)``. The number must be the sum of the loss mask that the model returns with its output.
Gradients are divided by the sum of all masks, which must be known before the first backward.

A mean is multiplied by the sum of the mask, so the loss of the step is the mean over all of its tokens, on every
layout. (Megatron averages the means of dp ranks and microbatches, however many tokens each has.) That it is a mean over
the mask must follow from what the function returns: its report has the pair (sum, number of tokens) of this mean, or
the gradient of the mean by the losses is the mask divided by its sum. Any other mean is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor, nn

from mimogrid.adapters.megatron.batches import Batch
from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.core.base.samples import share
from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.topology.topology import Module
from mimogrid.shell.modules.loss import Predictions


LossFunction = Callable[..., Any]
ForwardStep = Callable[[Any, Any], tuple[Any, LossFunction]]


class Promise:
    """A placeholder for the output of the model, which exists only when the loss function is called."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "the output of the model is not there yet: return it as it is, "
            "and compute with it in the loss function."
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _refuse

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        """Refuse any computation."""
        cls()._refuse()


class RecordedModel:
    """A model that records the arguments of its call; other attributes are those of the model of this rank."""

    def __init__(
        self, model: nn.Module | None, part_of: Callable[[Tensor], Tensor], *, needs_tokens: bool
    ) -> None:
        self._model = model
        self._part_of = part_of
        self._needs_tokens = needs_tokens
        self.batch: Batch | None = None
        self.output = Promise()

    def __call__(self, *arguments: Any, **named: Any) -> tuple[Promise, Tensor | None]:
        """Return, as `MimoModel` does, the output (a placeholder) and the part of the loss mask for it."""
        if self.batch is not None:
            raise TypeError("forward_step_func called the model twice; a microbatch goes through it once.")
        batch = self.batch = Batch(*arguments, **named)
        if self._needs_tokens and not isinstance(batch.input_ids, Tensor):
            raise TypeError("forward_step_func called the model without input_ids; every rank gives them.")
        return self.output, None if batch.loss_mask is None else self._part_of(batch.loss_mask)

    def _forward_encoders(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse what Megatron's forward step calls for features of an encoder that it has prefetched."""
        fact = "is given features of an encoder that ran ahead of the step (mimo-encoder-prefetch)."
        remedy = (
            "Give modality_inputs: a frozen encoder has no backward here, and its forwards run as far ahead of the "
            "language model as the schedule allows."
        )
        raise PlanError([Problem("model._forward_encoders", fact, remedy)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@attrs.frozen(eq=False)
class Microbatch:
    """A microbatch of a forward step: the arguments of the model, and the loss function of its output."""

    batch: Batch
    loss: LossFunction


def microbatches_of(
    forward_step: ForwardStep,
    data_iterator: Any,
    model: nn.Module | None,
    language: Module,
    *,
    rank: int,
    total: int,
    whole: bool = True,
) -> list[Microbatch]:
    """Call a forward step for each microbatch of a step with `total` samples, and return the microbatches.

    `whole` says whether a batch has all samples of a microbatch, or those of this rank. Raises PlanError if the
    function returns anything but the model's output and a loss function.
    """
    found = []
    for microbatch in range(language.microbatches):
        part = _part(language, rank, microbatch, total, whole=whole)
        asked = RecordedModel(model, part, needs_tokens=whole)
        output, loss = forward_step(data_iterator, asked)
        if output is not asked.output or asked.batch is None or not callable(loss):
            fact = f"returned a {type(output).__name__} and a {type(loss).__name__}, not what the model returned."
            remedy = "Return (output of the model, loss function), and compute with the output in the loss function."
            raise PlanError([Problem("forward_step_func", fact, remedy)])
        found.append(Microbatch(asked.batch, loss))
    return found


def _part(
    language: Module, rank: int, microbatch: int, total: int, *, whole: bool
) -> Callable[[Tensor], Tensor]:
    """Return a function that selects this rank's part of a tensor [B, S]; on ranks without the language model, all.

    Of a batch that is not `whole` it selects positions only.
    """
    if rank not in language.grid:
        return lambda of_batch: of_batch
    position = language.grid.position(rank)
    begin = share(microbatch, language.microbatches, total).start
    samples = language.samples(position["dp"], microbatch, total)
    samples_here = slice(samples.start - begin, samples.stop - begin) if whole else slice(None)
    cut = ZigZag(position["cp"], language.cp)

    def part(of_batch: Tensor) -> Tensor:
        mine = of_batch[samples_here]
        if language.cp == 1:
            return mine
        return mine[:, torch.tensor(tuple(cut.positions(of_batch.shape[1])), device=of_batch.device)]

    return part


class HostLoss:
    """The loss of a step (`shell.modules.loss.Loss`), computed by a program's loss functions.

    `reports` has their reports in order of the microbatches, on the ranks of the last stage. Whether a loss function
    counts the tokens of the loss mask is known only when the device has computed both. If it does not, its loss is NaN,
    so the update is skipped, and `check` raises the error.
    """

    def __init__(self, microbatches: Sequence[Microbatch], total: int, *, collects: bool = False) -> None:
        self._microbatches = microbatches
        self._of_sample = [m for m in range(len(microbatches)) for _ in share(m, len(microbatches), total)]
        self._collects = collects
        self._reports: dict[int, Any] = {}
        self._counts: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def reports(self) -> list[Any]:
        """The reports of the loss functions."""
        return [self._reports[microbatch] for microbatch in sorted(self._reports)]

    def __call__(self, predictions: Predictions) -> Tensor:
        """Return the sum of the losses of a microbatch on this rank."""
        samples = predictions.share.samples
        if not samples:
            return predictions.cross_entropies().sum()
        microbatch = self._of_sample[samples[0].id]
        said = self._microbatches[microbatch]
        logits = said.batch.labels is None
        flat = predictions.logits if logits else predictions.cross_entropies()
        output: Tensor = flat.unflatten(0, (len(samples), -1))
        if self._collects:
            self._reports[microbatch] = said.loss(output, non_loss_data=True)
            return output.new_zeros(())
        try:
            returned = said.loss(output)
        except Exception as error:
            error.add_note(
                f"microbatch {microbatch}: the loss function was given {tuple(output.shape)}, this rank's samples "
                "and positions. The loss mask that the model returns is cut likewise; one of the batch is not."
            )
            raise
        loss, counted, self._reports[microbatch] = self._summed(returned, output, predictions.weights)
        planned = predictions.weights.sum()
        counted = torch.as_tensor(counted, device=planned.device).to(planned.dtype)
        self._counts[microbatch] = counted, planned
        alike = (counted - planned).abs() <= NEAR * planned.clamp(min=1)
        return torch.where(alike, loss.reshape(()), torch.nan)

    @staticmethod
    def _summed(returned: Any, output: Tensor, weights_T: Tensor) -> tuple[Tensor, Any, Any]:
        """Return the sum of the losses, the number of tokens that the function counts, and the report."""
        match returned:
            case (Tensor() as loss, count, report) if loss.numel() == 1:
                return loss, count, report
            case (Tensor() as mean, Mapping() as report) if mean.numel() == 1:
                return *_sum_of_mean(mean.reshape(()), report, output, weights_T), report
            case _:
                kind = type(returned).__name__
                fact = f"returns a {kind}, neither (sum, number of tokens, report) nor (mean, report)."
        raise PlanError([Problem("loss_func", fact, _REMEDY)])

    def check(self) -> None:
        """Raise WorldError if a loss function counted other tokens than the loss mask; waits for the device."""
        for microbatch, (counted, planned) in sorted(self._counts.items()):
            if not torch.isclose(counted, planned, rtol=NEAR, atol=NEAR):
                raise WorldError(
                    f"microbatch {microbatch}: the loss function counts {float(counted):g} tokens on this rank, "
                    f"the loss mask {float(planned):g}. Gradients are divided by what the loss mask of all samples "
                    "adds up to, so the step was not taken. Return the sum of the mask that the model returns, or the "
                    "mean over it."
                )


NEAR = 1e-5
"""By how much two numbers of tokens may differ, of the larger one: those of a program may be in fp32."""

_REMEDY = "Return (sum of losses * loss_mask, loss_mask.sum(), report), as for calculate_per_token_loss."


def _sum_of_mean(
    mean: Tensor, report: Mapping[str, Any], output: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum that a mean is of, and the number of tokens that it is over.

    The number is in the report, or the gradient of the mean says that it is over the mask. It is NaN if neither does.
    Raises PlanError for a mean of logits without a number of tokens.
    """
    planned = weights_T.sum()
    pairs = [value for value in report.values() if isinstance(value, Tensor) and value.numel() == _PAIR]
    if not pairs and output.dim() != _LOSSES:
        fact = "returns a mean of logits, whose number of tokens nothing says."
        raise PlanError([Problem("loss_func", fact, _REMEDY)])
    slopes = None
    if torch.is_grad_enabled() and mean.requires_grad:
        (slopes,) = torch.autograd.grad(mean, output, retain_graph=True)
    mean = mean.detach()
    if pairs:
        total, count = pairs[0].detach().reshape(-1).to(mean.dtype)
        counted = torch.where(
            torch.isclose(mean * count, total, rtol=NEAR, atol=NEAR) | (count == 0), count, torch.nan
        )
    elif slopes is None:
        counted = planned  # Nothing trains by it.
    else:
        weights_BS = weights_T.to(slopes.dtype).view_as(slopes)
        over_mask = torch.isclose(slopes * planned, weights_BS, rtol=NEAR, atol=NEAR).all() | (planned == 0)
        counted = torch.where(over_mask, planned, 1 / slopes.sum())
    # The mean of no tokens may not be a number; its sum is 0.
    loss = torch.where(planned > 0, mean * planned, 0.0)
    if slopes is not None:
        of_sum = torch.where(planned > 0, slopes * planned, 0.0)
        loss = loss + (of_sum * (output - output.detach())).sum()
    return loss, counted


_PAIR, _LOSSES = 2, 2
"""How many numbers a sum and its count are, and how many dims losses [b, s] have."""


def first_of(data_iterator: Any) -> Any:
    """Return the iterator; a loop of Megatron has one for each virtual stage, with equal items."""
    return data_iterator[0] if isinstance(data_iterator, list) else data_iterator
