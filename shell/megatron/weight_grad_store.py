"""Weight-grad store: puts off the weight gradients of a backward.

The backward of Y = X W^T has two products. The stages upstream wait for dY W; only the optimizer waits for dY^T X. So
a backward can be split in two (zero-bubble pipelines, arXiv 2401.10241): one half computes the gradients of the
inputs, and the other half, at any later time, those of the weights.

While a store is open, the network multiplies by detached weights, so that autograd leaves out dY^T X and nothing else.
When dY is there, the store notes dY and X in the list of the microbatch (`WeightGrads`). `flush` computes the products
of such a list and adds them to the gradients, as autograd would have done. What is not a product with a weight (norms,
embeddings, biases) stays in the first half. While the store is closed, autograd does everything.

    with store.open(deferred):     # forward, and also the first half: recomputation runs forwards in it
        root.backward()
    flush(deferred)                # the second half

A network gets its store when it is built. The stage opens the store, microbatch by microbatch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimogrid.shell.megatron.names import gather_from_sequence_parallel_region


@attrs.frozen(eq=False)
class WeightGrad:
    """A product that a weight's gradient still lacks.

    Attributes:
        weight: The weight [out, in].
        input: The input [..., in] that the weight was multiplied with.
        gradient: The gradient [..., out] of the output.
        parts: The ranks that hold equal parts of the input's first dim; None if `input` is complete.
    """

    weight: Tensor
    input: Tensor
    gradient: Tensor
    parts: dist.ProcessGroup | None

    def add(self) -> None:
        """Add the product to the weight's gradient; joint over `parts`."""
        complete = self.input
        if self.parts is not None:
            complete = gather_from_sequence_parallel_region(complete, group=self.parts)
        product = self.gradient.flatten(0, -2).t() @ complete.flatten(0, -2)
        assert self.weight.grad is not None
        self.weight.grad += product


WeightGrads = list[WeightGrad]
"""The deferred products of one microbatch."""


class WeightGradStore:
    """Notes the deferred products of the layers of one stage."""

    def __init__(self) -> None:
        self._deferred: WeightGrads | None = None

    @contextlib.contextmanager
    def open(self, deferred: WeightGrads) -> Iterator[None]:
        """Defer the products of weight gradients to a list while open."""
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
        """Return `by(weight)`, which multiplies `input` by a weight; see `WeightGrad`.

        A weight of another dtype is frozen, and is converted for as long as the product lasts.
        """
        if weight.dtype != input.dtype:
            return _converted(by, weight, input.dtype)
        deferred = self._deferred
        if deferred is None or not weight.requires_grad:
            return by(weight)

        def note(of_input: Tensor, gradient: Tensor) -> None:
            deferred.append(WeightGrad(weight, of_input, gradient, parts))

        output: Tensor = _Noted.apply(by(weight.detach()), weight, input, note)  # type: ignore[no-untyped-call]
        return output


def flush(deferred: WeightGrads) -> None:
    """Add every deferred product to its weight's gradient, and empty the list."""
    while deferred:
        deferred.pop(0).add()


def _converted(by: Callable[[Tensor], Tensor], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `by(weight)` of a frozen weight in another dtype, of which a backward keeps nothing but the weight.

    What autograd saves of the converted weight is a view of it. It is made again, of the weight, when it is asked for.
    """
    assert not weight.requires_grad
    converted = weight.to(dtype)
    place = converted.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != place:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else weight.to(dtype).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return by(converted)


class _Noted(torch.autograd.Function):
    """The identity of an output. Its backward notes the output's gradient with the input.

    The weight is an argument so that the output has a backward even if neither input nor bias needs a gradient.
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
