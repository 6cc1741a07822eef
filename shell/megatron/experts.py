"""Experts: the MLP of a layer in which each token chooses some of many experts, spread over ranks.

One rank routes each token, and each token is computed once, in every layout. A rank routes the tokens of its dp rank
and of its part of the row, under context or sequence parallelism. With plain tensor parallelism several ranks have the
same tokens, and each routes a share of them. Padding is not routed. Then

    route       logits = tokens * router; the `top_k` highest are chosen, weighted by their softmax as in Megatron
                (with top_k = 1 or without `norm_top_k` by the softmax over all experts: with one expert the router
                would get no gradient else)
    dispatch    one row for every choice and every rank that holds a shard of the expert, all to all
    compute     expert by expert, an MLP as that of a dense layer; the result of a shard is a term of a sum over
                expert_tp
    combine     rows return, and are summed with their weights

No token is dropped. The number of rows for each rank depends on the data, so ranks exchange these numbers first; no
other sizes are exchanged in a step. Ranks without tokens take part too. If two logits are almost equal, layouts that
round differently may choose different experts. That is another function, and no tolerance covers it.

The auxiliary loss of a layer is, for each sample, E * sum over experts of f * P. f is the fraction of the sample's
choices that are this expert (a constant for the gradient), and P the mean probability of the expert over the sample's
tokens. Given f it is a sum over tokens, so each rank has a term of its own and only counts are all-reduced. As in
Megatron, the forward attaches its gradient to the output of the layer, so the backward computes it too, recomputed or
not.

Shapes in names: S positions of a row, B samples, H hidden; T this rank's tokens, K choices, E experts; C rows to send
(T * K * expert_tp); M ranks among which rows cross, L experts that one of them holds, X shards of an expert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mimogrid.core.job.models import BuiltIn
from mimogrid.shell.megatron.layers import ACTIVATIONS, Linear, ReadsRow
from mimogrid.shell.megatron.names import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore


@attrs.frozen(eq=False)
class ExpertGroups:
    """The ranks that share a module's tokens and experts with this rank.

    Attributes:
        together: The ranks that exchange rows; expert_tp varies fastest.
        expert_tp: The number of shards of each expert.
        held: The experts that this rank has a shard of.
        same_tokens: The ranks that have the same tokens and route a share of them each; None if there are none.
        same_samples: Groups of the ranks that route other tokens of the same samples.
    """

    together: dist.ProcessGroup
    expert_tp: int
    held: range
    same_tokens: dist.ProcessGroup | None
    same_samples: tuple[dist.ProcessGroup, ...]

    @property
    def shard(self) -> int:
        """The shard that this rank has of its experts."""
        return self.together.rank() % self.expert_tp


@attrs.frozen(eq=False)
class ExpertsSpec:
    """What Megatron's layer builds its MLP from. The layer takes a `ModuleSpec` of Megatron's own MLPs only.

    megatron-core 0.16 builds it as it builds a `ModuleSpec`. 0.19 calls it, with arguments that only Megatron's own
    MLPs need (groups, a name, whether the layer predicts several tokens).
    """

    params: Mapping[str, Any]
    module: type[nn.Module]

    def __call__(self, *, config: TransformerConfig, **_: object) -> nn.Module:
        """Return the module."""
        return self.module(config, **self.params)


def experts_spec(
    model: BuiltIn, expert_groups: ExpertGroups, *, trains: bool, weight_grads: WeightGradStore
) -> ExpertsSpec:
    """Return the specification of an `Experts`."""
    params = {"model": model, "expert_groups": expert_groups, "trains": trains, "weight_grads": weight_grads}
    return ExpertsSpec(params, Experts)


class Experts(ReadsRow, nn.Module):
    """The MLP of one layer.

    `scale` multiplies the auxiliary loss in the loss of the job; 0 means that there is none. `aux` is this rank's term
    of the auxiliary loss in the last forward, not scaled. `trains` says whether any of the layer's experts or its
    router trains, on this rank or another one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: BuiltIn,
        expert_groups: ExpertGroups,
        trains: bool,
        weight_grads: WeightGradStore,
    ) -> None:
        super().__init__()
        self.expert_groups = expert_groups
        self.trains = trains
        self.top_k = model.top_k
        self.among_chosen = model.norm_top_k and model.top_k > 1
        self.router = Linear(
            model.hidden, model.experts, config=config, bias=False, weight_grads=weight_grads
        )
        self.experts = nn.ModuleDict(
            {str(e): Expert(config, model, expert_groups, weight_grads) for e in expert_groups.held}
        )
        self.scale = 0.0
        self.aux: Tensor | None = None

    def forward(self, hidden_S1H: Tensor, **_: object) -> tuple[Tensor, None]:
        """Return the mixture [S, 1, H], and None for the bias; the row says which tokens this rank routes."""
        row, same_tokens = self.row, self.expert_groups.same_tokens
        assert row is not None
        if torch.is_grad_enabled() and self.trains and not hidden_S1H.requires_grad:
            # All ranks take part in the all-to-alls of the backward, also those whose own experts are frozen.
            hidden_S1H = hidden_S1H.detach().requires_grad_()
        if same_tokens:
            hidden_S1H = copy_to_tensor_model_parallel_region(hidden_S1H, group=same_tokens)
        flat = hidden_S1H.flatten(0, 1)
        mixed_TH, logits_TE, chosen_TK = self._mixed(flat.index_select(0, row.entries))
        if self.scale and self.training:
            aux = imbalance(
                logits_TE.softmax(dim=1),
                chosen_TK,
                row.sample_of,
                samples=row.samples,
                among=self.expert_groups.same_samples,
            )
            self.aux = aux.detach()
            mixed_TH = attached(mixed_TH, aux, self.scale)
        flat = torch.zeros_like(flat).index_copy(0, row.entries, mixed_TH)
        if same_tokens:
            flat = reduce_from_tensor_model_parallel_region(flat, group=same_tokens)
        return flat.view_as(hidden_S1H), None

    def _mixed(self, tokens_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixture of this rank's tokens [T, H], the logits [T, E] and the chosen experts [T, K]."""
        logits_TE, _ = self.router(tokens_TH)
        logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        highest_TK, chosen_TK = logits_TE.topk(self.top_k, dim=1)
        over = highest_TK if self.among_chosen else logits_TE
        weights_TK = (highest_TK - over.logsumexp(dim=1, keepdim=True)).exp().to(tokens_TH.dtype)
        crossing = _crossing(chosen_TK, self.expert_groups)
        rows_CH = _Spread.apply(tokens_TH, crossing)  # type: ignore[no-untyped-call]
        rows_CH = self._computed(_exchanged(rows_CH, crossing), crossing)
        rows_CH = _exchanged(rows_CH, crossing.reverse())
        rows_CH = _Permuted.apply(rows_CH, crossing.back, crossing.order)  # type: ignore[no-untyped-call]
        rows_TKH = rows_CH.view(*chosen_TK.shape, self.expert_groups.expert_tp, tokens_TH.shape[1]).sum(dim=2)
        mixed_TH = torch.bmm(weights_TK[:, None], rows_TKH).squeeze(1)
        return mixed_TH, logits_TE, chosen_TK

    def _computed(self, rows: Tensor, crossing: "_Crossing") -> Tensor:
        """Return the received rows after this rank's experts, in the same order."""
        if crossing.by_expert is not None:
            rows = _Permuted.apply(rows, *crossing.by_expert)  # type: ignore[no-untyped-call]
        parts = rows.split(crossing.rows_of_experts)
        rows = torch.cat([expert(part) for expert, part in zip(self.experts.values(), parts, strict=True)])
        if crossing.by_expert is not None:
            rows = _Permuted.apply(rows, *reversed(crossing.by_expert))  # type: ignore[no-untyped-call]
        return rows


class Expert(nn.Module):
    """This rank's shard of one expert. The results of its expert_tp shards are summed."""

    def __init__(
        self,
        config: TransformerConfig,
        model: BuiltIn,
        expert_groups: ExpertGroups,
        weight_grads: WeightGradStore,
    ) -> None:
        super().__init__()
        width, bias = model.expert_ffn // expert_groups.expert_tp, model.mlp_bias
        self.adds_bias = expert_groups.shard == 0
        self.weight_grads = weight_grads
        self.activation, self.gated = ACTIVATIONS[model.activation], model.gated
        self.up = Linear(
            model.hidden, model.up_blocks * width, config=config, bias=bias, weight_grads=weight_grads
        )
        self.down = Linear(width, model.hidden, config=config, bias=bias, weight_grads=weight_grads)

    def forward(self, rows: Tensor) -> Tensor:
        """Return this shard's term for each row."""
        middle, _ = self.up(rows)
        if self.gated:
            gate, middle = middle.chunk(2, dim=-1)
            middle = self.activation(gate) * middle
        else:
            middle = self.activation(middle)
        bias: Tensor | None = self.down.bias
        if bias is not None and not self.adds_bias:
            # The sum over shards has the bias once, and every shard's copy of it gets the complete gradient.
            bias = bias - bias.detach()
        return self.weight_grads.multiply(
            lambda weight: functional.linear(middle, weight, bias), self.down.weight, middle
        )


# -- the auxiliary loss ------------------------------------------------------------------------------------


def imbalance(
    probabilities_TE: Tensor,
    chosen_TK: Tensor,
    samples_T: Tensor,
    *,
    samples: int,
    among: Sequence[dist.ProcessGroup],
) -> Tensor:
    """Return this rank's term of the auxiliary loss, summed over samples.

    Args:
        probabilities_TE: The probabilities of the experts for each token.
        chosen_TK: The experts that each token goes to.
        samples_T: The sample of each token.
        samples: The number of samples.
        among: Groups of the ranks that route other tokens of the same samples.
    """
    experts, choices = probabilities_TE.shape[1], chosen_TK.shape[1]
    where = (samples_T[:, None] * experts + chosen_TK).flatten()
    counts = torch.zeros(samples * experts, dtype=torch.int64, device=where.device)
    counts.scatter_add_(0, where, torch.ones_like(where))
    for group in among:
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
    counts_BE = counts.view(samples, experts).to(probabilities_TE.dtype)
    choices_B1 = counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    # f / tokens of the sample; a sample has K choices for each token.
    slope_BE = experts * choices * counts_BE / choices_B1.square()
    return (slope_BE.index_select(0, samples_T) * probabilities_TE).sum()


def attached(carrier: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return the carrier; a backward through it also gives `value`, which nothing else reads, the gradient `scale`."""
    carrier = _Attached.apply(carrier, value, scale)  # type: ignore[no-untyped-call]
    return carrier


# -- how rows cross ----------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Crossing:
    """Where the rows of one forward go.

    Attributes:
        order: The order in which rows are sent. Before, they are in order of token, choice and shard.
        back: The inverse of `order`.
        copies: Rows of each token.
        sent: Rows to each rank.
        got: Rows from each rank.
        by_expert: The order that sorts received rows by expert, and its inverse; None if they are sorted already.
        rows_of_experts: Received rows of each expert.
        group: The ranks that exchange rows.
    """

    order: Tensor
    back: Tensor
    copies: int
    sent: list[int]
    got: list[int]
    by_expert: tuple[Tensor, Tensor] | None
    rows_of_experts: list[int]
    group: dist.ProcessGroup

    def reverse(self) -> "_Crossing":
        """Return the crossing in the opposite direction."""
        return attrs.evolve(self, sent=self.got, got=self.sent)


def _crossing(chosen_TK: Tensor, expert_groups: ExpertGroups) -> _Crossing:
    """Return where the rows go of tokens that chose these experts."""
    group, each, shards = expert_groups.together, len(expert_groups.held), expert_groups.expert_tp
    ranks, device = group.size(), chosen_TK.device
    shard = torch.arange(shards, device=device)
    rank_TKX = (chosen_TK // each * shards)[:, :, None] + shard
    key_C = (rank_TKX * each + (chosen_TK % each)[:, :, None]).flatten()
    order, back = _sorted(key_C)
    sent_ML = torch.zeros(ranks * each, dtype=torch.int64, device=device)
    sent_ML = sent_ML.scatter_add_(0, key_C, torch.ones_like(key_C)).view(ranks, each)
    got_ML = sent_ML
    if ranks > 1:
        got_ML = torch.empty_like(sent_ML)
        dist.all_to_all_single(got_ML, sent_ML, group=group)
    # The host waits for the device here, so it gets all counts at once.
    counts_sent, counts_got = torch.stack((sent_ML, got_ML)).tolist()
    sent, got = ([sum(of_rank) for of_rank in counts] for counts in (counts_sent, counts_got))
    by_expert = None
    if ranks > 1 and each > 1:
        expert = torch.arange(each, device=device).repeat(ranks)
        by_expert = _sorted(expert.repeat_interleave(got_ML.flatten(), output_size=sum(got)))
    return _Crossing(
        order=order,
        back=back,
        copies=chosen_TK.shape[1] * shards,
        sent=sent,
        got=got,
        by_expert=by_expert,
        rows_of_experts=[sum(of_expert) for of_expert in zip(*counts_got, strict=True)],
        group=group,
    )


def _sorted(key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stable order that sorts, and its inverse."""
    order = key.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def _exchanged(rows: Tensor, crossing: _Crossing) -> Tensor:
    if crossing.group.size() == 1:
        return rows
    exchanged: Tensor = _Exchanged.apply(rows, crossing)  # type: ignore[no-untyped-call]
    return exchanged


def _all_to_all(rows: Tensor, crossing: _Crossing) -> Tensor:
    received = rows.new_empty(sum(crossing.got), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), crossing.got, crossing.sent, group=crossing.group)
    return received


class _Exchanged(torch.autograd.Function):
    """All to all. Backward exchanges in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, crossing: _Crossing) -> Tensor:
        ctx.back = crossing.reverse()
        return _all_to_all(rows, crossing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.back), None


# These only move rows. Their backward is written out: autograd's would scatter, which CUDA does in any order.


class _Spread(torch.autograd.Function):
    """Rows of tokens to rows in the order of sending. Backward sums the rows of a token."""

    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        return tokens_TH.index_select(0, crossing.order // crossing.copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CH: Tensor) -> tuple[Tensor, None]:
        copies, width = ctx.crossing.copies, grad_CH.shape[1]
        return grad_CH.index_select(0, ctx.crossing.back).view(-1, copies, width).sum(dim=1), None


class _Permuted(torch.autograd.Function):
    """Rows in another order. Backward applies the inverse order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Attached(torch.autograd.Function):
    """The identity; it gives a value that nothing reads a gradient."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, value.detach()
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None
