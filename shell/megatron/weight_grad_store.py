"""Ledger: products for the gradients of weights, left by a backward for later.

The backward of Y = X W^T has two products. Everything before it waits for dY W; nobody waits for dY^T X but the
optimizer. So a backward can be split in two (zero-bubble pipelines, arXiv 2401.10241): one half computes the
gradients of the inputs, and the other, at any later time, those of the weights.

While a weight-grad store is open, the network multiplies by weights that autograd does not know as such. That
leaves out dY^T X, and nothing else. When dY is there, it is noted together with X on a page of the weight-grad
store, one for each microbatch; whoever works the page off adds the product to the gradient, as autograd would have
done. What is no product with a weight (norms, embeddings, biases) keeps its place in the first half. While the
weight-grad store is closed, autograd does all of it.

    with weight-grad store.open(page):          forward, and again the first half: recomputation runs forwards in it
        root.backward()
    work_off(page)                   the second half

A network is given its weight-grad store when it is built, and opens it never; its stage does, microbatch by microbatch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimogrid.shell.megatron import gather_from_sequence_parallel_region


@attrs.frozen(eq=False)
class WeightGrad:
    """What a weight's gradient still lacks: the gradient [..., out] of an output times the input [..., in].

    `parts`: the ranks that hold the input in equal parts of its first dim; None: it is whole.
    """

    weight: Tensor
    input: Tensor
    gradient: Tensor
    parts: dist.ProcessGroup | None

    def add(self) -> None:
        """Add it to the weight's gradient; joint over `parts`."""
        whole = self.input
        if self.parts is not None:
            whole = gather_from_sequence_parallel_region(whole, group=self.parts)
        product = self.gradient.flatten(0, -2).t() @ whole.flatten(0, -2)
        assert self.weight.grad is not None
        self.weight.grad += product


WeightGrads = list[WeightGrad]
"""The products of one microbatch."""


class WeightGradStore:
    """Where the layers of one stage note their products."""

    def __init__(self) -> None:
        self._deferred: WeightGrads | None = None

    @contextlib.contextmanager
    def open(self, deferred: WeightGrads) -> Iterator[None]:
        """Let what is multiplied meanwhile note its products on a page."""
        assert self._deferred is None
        self._deferred = deferred
        try:
            yield
        finally:
            self._deferred = None

    def multiply(
        self,
        by: Callable[[Tensor], Tensor],
        weight: Tensor,
        input: Tensor,  # noqa: A002
        *,
        parts: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Return `by(weight)`, which multiplies an input by a weight [out, in]; see `WeightGrad`."""
        deferred = self._deferred
        if deferred is None or not weight.requires_grad:
            return by(weight)

        def note(of_input: Tensor, gradient: Tensor) -> None:
            deferred.append(WeightGrad(weight, of_input, gradient, parts))

        output: Tensor = _Noted.apply(by(weight.detach()), weight, input, note)  # type: ignore[no-untyped-call]
        return output


def flush(deferred: WeightGrads) -> None:
    """Add every product of a page to its gradient, and forget it."""
    while deferred:
        deferred.pop(0).add()


class _Noted(torch.autograd.Function):
    """The identity of an output; backward notes its gradient beside the input.

    The weight takes part so that the output has a backward even if neither input nor bias wants a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        weight: Tensor,
        input: Tensor,  # noqa: A002
        note: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.note = note
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (of_input,) = ctx.saved_tensors
        ctx.note(of_input.detach(), grad)
        return grad, None, None, None
