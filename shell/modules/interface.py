"""Interface: what a stage of a module is to those who run it, and what a network of somebody else's must be.

A stage knows its parameters by layout-independent names, in the order of the core's table.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimogrid.core.job.layer_engines import Choice
from mimogrid.core.job.models import Parameter
from mimogrid.core.step.step import Share
from mimogrid.core.topology.topology import Module, StageInfo
from mimogrid.shell.megatron.layers import Affine
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy


class StageGroups(Protocol):
    """The process groups of a module that a stage computes over; of size 1 where the axis is 1."""

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of one copy."""

    @property
    def cp(self) -> dist.ProcessGroup:
        """Ranks that hold the parts of one sequence."""

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that hold copies."""

    @property
    def pp(self) -> dist.ProcessGroup:
        """Ranks that hold the stages."""

    @property
    def together(self) -> dist.ProcessGroup:
        """Ranks among whom tokens cross to their experts, expert_tp fastest; else the rank alone."""

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of the same experts; else the rank alone."""

    @property
    def expert_dp(self) -> dist.ProcessGroup:
        """Ranks that hold copies of the same experts; else the rank alone."""

    @property
    def tie(self) -> dist.ProcessGroup | None:
        """The two ends of the pipeline, where both hold a weight."""


class OwnNetwork(Protocol):
    """What a builder of the user's returns: an `nn.Module` with this forward.

    The builder is called with the module's options as keywords. Inputs are what a first stage gets (see
    `shell.modules`), whatever else the samples have for the module by its name, end to end (targets, the sizes of
    images), and row counts per sample as int64 tensors: ``lengths``, and ``lengths.FEEDER`` for each feeder.
    Outputs are ``rows`` [R, width] if the module feeds another, and ``loss`` (a sum, not a mean) if it has one.
    """

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return rows, a loss, or both."""


class HostNetwork(Protocol):
    """A network of the host's for one stage of a built-in module: an `nn.Module` with this forward.

    The plan counts layers, heads and tokens as those of the built-in model; what they compute, and with which
    parameters, is the network's own affair. Under tp, cp and ep it talks over groups of its own, or the job's.

    Where the module has an auxiliary loss the network brings its gradient along, and returns this rank's term of it
    as ``NAME.aux``. Before each forward its `aux_scale` is set: what that term is multiplied by.
    """

    def __call__(self, inputs: Mapping[str, Tensor], share: Share) -> Mapping[str, Tensor]:
        """Compute the stage for a share; see the table of `shell.modules`.

        What it gives to others it gives as ``rows``, for each sample as many as came in: projections are its own. A
        loss is what the network's attribute ``loss`` makes of its predictions (`shell.modules.loss.Loss`); it is
        set before.
        """

    def table(self, info: StageInfo, *, tp: int, expert_tp: int) -> Mapping[str, Parameter]:
        """Return what each parameter of the stage on this rank is, by its name in the network.

        `tp` ranks hold its shards, `expert_tp` those of an expert's. Names are the same whatever the layout, so a
        layer's has its number in the whole module, and an expert's in the whole layer.
        """


class StageModule(nn.Module):
    """One stage of a module on this rank.

    `draws` says that its forward draws random numbers in training, from the states of `megatron.draws`.
    `reads_entire` says that it gets all that the samples of a source module have for it, not only the rows.
    `weight_grads` is where all of its layers note their products for gradients of weights, while it is open.
    `loss_scale` multiplies the gradients that it attaches by itself. `layers_by` says whose layers it has. `loss` is
    what the last stage of a language model computes.
    """

    draws = False
    reads_entire = False
    loss_scale = 1.0
    layers_by: Choice | None = None
    loss: Loss = staticmethod(weighted_cross_entropy)

    def __init__(self, module: Module, info: StageInfo, *, dtype: torch.dtype) -> None:
        super().__init__()
        weight_grads = WeightGradStore()
        self.info = info
        self.name = module.name
        self.edges = module.outputs if info.last else ()
        self.weight_grads = weight_grads
        # The prefix keeps a target named like a method of ModuleDict ("keys") legal.
        self.projectors = nn.ModuleDict(
            {
                f"to_{edge.target}": Affine(
                    module.model.hidden, edge.width, dtype=dtype, weight_grads=weight_grads
                )
                for edge in self.edges
                if edge.projected and module.model.hidden
            }
        )

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see the table of `shell.modules`."""
        raise NotImplementedError

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        raise NotImplementedError

    def emit(self, rows_RH: Tensor) -> dict[str, Tensor]:
        """Return the rows for each target."""
        return {
            edge.target: self.projectors[f"to_{edge.target}"](rows_RH) if edge.projected else rows_RH
            for edge in self.edges
        }


def named_weights(stage: StageModule) -> dict[str, nn.Parameter]:
    """Return this rank's parts of the stage's parameters by layout-independent name, in the table's order."""
    weights = {name_of_weight(stage, built): weight for built, weight in stage.named_parameters()}
    planned = (p.name for p in stage.info.parameters if p.name in weights)
    return {name: weights[name] for name in dict.fromkeys((*planned, *weights))}


def name_of_weight(stage: StageModule, built: str) -> str:
    """Return the layout-independent name of a parameter, be it of the network or of a projector."""
    if built.startswith("projectors."):
        return built.replace("projectors.to_", "projector.", 1)
    return stage.weight_name(built)


def ep_position(groups: StageGroups) -> int:
    """This rank's position along ep."""
    return groups.together.rank() // groups.expert_tp.size()
