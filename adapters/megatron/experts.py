"""Experts of Megatron's networks: which of them a job can train, and their auxiliary loss.

Layers, routers, dispatchers and experts are Megatron's. The gradient of an expert includes the tokens of all ranks that
send to it, so it is summed over its copies (expert_dp) only.

In a job every layout has the gradients of one process. Many of Megatron's settings for experts depend on which tokens
share a rank: capacities, a z-loss that is a mean over a rank's tokens, Sinkhorn routing, auxiliary losses over the
tokens of a microbatch or of all microbatches so far. They are refused by name. The auxiliary loss by sequence remains,
with Megatron's formula (`shell.megatron.experts`). Its scale is replaced on the routers that a job trains, because
Megatron's depends on the layout:

- Megatron multiplies it by one number per process (`MoEAuxLossAutoScaler`), which averages over microbatches and dp,
  and with `calculate_per_token_loss` by the number of tokens of a rank. Here it is divided by the samples of the step.
- Megatron divides by the mean length of a microbatch's samples, padding included. Here each sample is divided by its
  own length without padding.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from torch import Tensor, nn

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.models import Own
from mimogrid.core.topology.topology import Module
from mimogrid.shell.megatron.experts import attached, imbalance


BY_SEQUENCE = "seq_aux_loss"
"""Megatron's name for the auxiliary loss that is a sum over samples."""

_LAYOUT_DEPENDENT = {
    "moe_expert_capacity_factor": "drops tokens by how many a rank has for an expert",
    "moe_z_loss_coeff": "has a z-loss, a mean over the tokens that a rank happens to have",
    "moe_input_jitter_eps": "draws noise for its routers rank by rank",
    "moe_router_force_load_balancing": "routes at random, rank by rank",
    "moe_router_enable_expert_bias": "moves a bias of its routers in finalize_model_grads, which a job does not call",
    "moe_latent_size": "has latent projections, whose gradients are not known to be sums over tp",
}
"""Settings with which the result depends on the layout, and why."""


def expert_layers(network: nn.Module) -> Mapping[str, MoELayer]:
    """Return the layers with experts, by name."""
    return {name: part for name, part in network.named_modules() if isinstance(part, MoELayer)}


def aux_weight(config: Any) -> float:
    """Return the weight of the auxiliary loss by sequence in a configuration; 0 if it has none."""
    kinds, weights = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, weights = [kinds], [weights]
    return float(dict(zip(kinds, weights, strict=True)).get(BY_SEQUENCE, 0.0))


def unable_experts(
    network: nn.Module, module: Module, position: Mapping[str, int], samples: int
) -> Iterator[Problem]:
    """Yield why a job's program cannot train the experts of a network.

    `position` is the position of the rank in the module (`Module.position`), `samples` the number of samples in a
    microbatch of the module.
    """
    where = f"modules.{module.name}"
    layers = list(expert_layers(network).values())
    if not layers:
        return
    model, layer = module.model, layers[0]
    if isinstance(model, Own) or module.experts is None:
        fact = f"has {layer.config.num_moe_experts} experts, the job's module none."
        yield Problem(
            where, fact, "Set num_moe_experts where job_of finds the configuration, or options.experts."
        )
        return
    yield from _misplaced(layer, module, position, where)
    yield from _inexact(layer, where)
    if aux_weight(layer.config) != model.aux_loss:
        fact = f"weighs its auxiliary loss by {aux_weight(layer.config)}, the job by {model.aux_loss}."
        yield Problem(f"{where}.options.aux_loss", fact, "Make them the same.")
    if not isinstance(layer.experts, SequentialMLP):
        fact = f"keeps its experts as {type(layer.experts).__name__}, several in one weight."
        yield Problem(where, fact, "Use SequentialMLP: moe_grouped_gemm=False.")
    if layer.attn_tp_group.size() > 1 and not layer.config.sequence_parallel:
        fact = "has experts under tensor parallelism, where Megatron trains only with sequence_parallel."
        yield Problem(where, fact, "Set sequence_parallel=True.")
    kind = layer.config.moe_token_dispatcher_type
    if kind == "flex":
        fact = "sends tokens by a dispatcher (flex) that was never compared with one process."
        yield Problem(where, fact, "Use moe_token_dispatcher_type='alltoall'.")
    if kind == "alltoall" and dist.get_backend(layer.token_dispatcher.tp_group) == "gloo":
        cut = layer.token_dispatcher.tp_size
        if cut > 1:
            fact = f"gathers unlike numbers of tokens over expert_tp={cut}, which gloo cannot."
            yield Problem(where, fact, "Use moe_token_dispatcher_type='allgather', or expert_tp = 1.")
    crosses = layer.token_dispatcher.tp_size * layer.token_dispatcher.ep_size > 1
    if kind == "allgather" and crosses and samples % module.dp_size:
        fact = (
            f"gathers equally many tokens of each dp rank; "
            f"a microbatch has {samples} samples for {module.dp_size} dp ranks."
        )
        yield Problem(where, fact, "Use moe_token_dispatcher_type='alltoall', or another batch.microbatches.")


def _misplaced(layer: MoELayer, module: Module, position: Mapping[str, int], where: str) -> Iterator[Problem]:
    """Yield differences between the places of the network's experts and those in the plan."""
    experts = module.experts
    assert experts is not None
    planned = list(module.experts_at(position["ep"]))
    if layer.local_expert_indices != planned:
        fact = f"has experts {layer.local_expert_indices} on a rank where the plan has {planned}."
        yield Problem(
            where, fact, "Build it over the job's groups, with the ep and experts that the job has."
        )
    cut, wanted = layer.token_dispatcher.tp_size, experts.extent("expert_tp")
    if cut != wanted:
        fact = f"cuts its experts over {cut} ranks, the plan over expert_tp={wanted}."
        yield Problem(where, fact, f"Set expert_tensor_parallel_size={wanted}.")


def _inexact(layer: MoELayer, where: str) -> Iterator[Problem]:
    """Yield settings with which the result for a token depends on the other tokens of its rank."""
    config = layer.config
    for setting, fact in _LAYOUT_DEPENDENT.items():
        if getattr(config, setting):
            yield Problem(where, f"{fact} ({setting}).", f"Leave {setting} out.")
    kinds, weights = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    listed = [(kinds, weights)] if isinstance(kinds, str) else zip(kinds, weights, strict=True)
    for kind, weight in listed:
        if kind in ("sinkhorn", "quantile_balancing"):
            fact = f"chooses experts for all tokens of a rank together ({kind})."
            yield Problem(where, fact, f"Use moe_router_load_balancing_type='none' or '{BY_SEQUENCE}'.")
        elif kind != BY_SEQUENCE and weight:
            fact = f"has an auxiliary loss ({kind}) of all tokens that a rank has together."
            yield Problem(
                where, fact, f"Use '{BY_SEQUENCE}', which is of one sample, or moe_aux_loss_coeff=0."
            )


class Balance:
    """The auxiliary loss of one router, sample by sample; it replaces the `routing` of the router.

    `value` is this rank's term in the last training forward. `scale` is its factor in the loss of the job; 0: there is
    no auxiliary loss.
    """

    def __init__(self, router: Any) -> None:
        self.router = router
        before = router.routing
        # A model may be used by several jobs, one after another.
        self.route: Any = before.route if isinstance(before, Balance) else before
        self.scale = 0.0
        self.value: Tensor | None = None
        router.routing = self
        router.routing_type = "none"

    def __call__(self, logits_SBE: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices [S * B, E] as the router does; the backward of the weights adds the loss.

        `padding_mask` [S, B] is True where there is no token.
        """
        weights, chosen = self.route(logits_SBE, padding_mask=padding_mask)
        if self.scale and self.router.training:
            loss = self._of(logits_SBE, padding_mask)
            self.value = loss.detach()
            weights = attached(weights, loss, self.scale)
        return weights, chosen

    def _of(self, logits_SBE: Tensor, padding_mask: Tensor | None) -> Tensor:
        samples, experts = logits_SBE.shape[1:]
        tokens = torch.arange(len(logits_SBE) * samples, device=logits_SBE.device)
        if padding_mask is not None:
            tokens = tokens[~padding_mask.reshape(-1)]
        logits_TE = logits_SBE.reshape(-1, experts).index_select(0, tokens)
        # Megatron computes this loss from scores without expert biases.
        chosen_TE, scores_TE = compute_routing_scores_for_aux_loss(
            logits_TE, self.router.topk, self.router.score_function
        )
        chosen_TK = chosen_TE.nonzero()[:, 1].view(-1, self.router.topk)
        among = (self.router.tp_cp_group,)
        return imbalance(scores_TE, chosen_TK, tokens % samples, samples=samples, among=among)
