"""Interface: how the runtime sees a stage, and what the network of a user or a host program must offer.

A stage is a function of its inputs and the description of its share. Its inputs and outputs are flat rows, and between
the stages of a module one row of S positions, samples end to end (`core.base.row`).

| stage | inputs | outputs |
|---|---|---|
| first, nothing feeds it | ``rows`` | |
| first, fed | the rows of each feeder by its name | |
| first, `gpt` | also ``tokens``, -1 at placeholders | |
| any but the last | | the module's own name: hidden states [S, 1, H] |
| any but the first | the module's own name: hidden states | |
| last | | rows by the name of each target |
| last, with targets | ``labels``, ``loss_weights`` (`gpt`); ``targets`` (`regressor`) | ``loss``, a sum |
| last, without targets | | ``logits`` (`gpt`); ``prediction`` (`regressor`) |
| any with an auxiliary loss, in training | | ``NAME.aux``, this rank's term of it; its gradient is attached |

Under tensor and context parallelism every rank has the complete inputs and outputs, and the complete gradients of the
inputs. Two things differ between cp ranks: hidden states, of which a rank has its part of S, and the loss, of which a
rank has its term. Building, forward and backward run inside `megatron.cpu.on_device`.

Shapes in names: S positions of a row, H hidden, T tokens, R rows, V vocabulary.

The parameters of a stage have layout-independent names, in the order of the core's table.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimogrid.core.job.layer_engines import Choice
from mimogrid.core.job.models import Parameter
from mimogrid.core.step.step import Share
from mimogrid.core.topology.topology import Module, StageInfo
from mimogrid.shell.megatron.cache import Cache
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy
from mimogrid.shell.modules.projectors import projector_of


class StageGroups(Protocol):
    """The process groups of a module that a stage computes over. A group has size 1 if its axis has."""

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
        """Ranks that exchange tokens for experts, expert_tp fastest; without experts only this rank."""

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of the same experts; without experts only this rank."""

    @property
    def expert_dp(self) -> dist.ProcessGroup:
        """Ranks that hold copies of the same experts; without experts only this rank."""

    @property
    def tie(self) -> dist.ProcessGroup | None:
        """The first and the last rank of the pipeline, if both hold a tied weight."""


class OwnNetwork(Protocol):
    """What a user's builder returns: an `nn.Module` with this forward.

    The builder is called with the module's options as keywords. The inputs are those of a first stage (see
    the table above), all other tensors that the samples have for the module, concatenated (targets, image sizes), and
    row counts per sample as int64 tensors: ``lengths``, and ``lengths.FEEDER`` for each feeder. A source module also
    gets ``grids`` [segments, sizes], where all have as many sizes and no tensor has this name. The outputs are
    ``rows`` [R, width] if the module feeds another one, and ``loss`` (a sum, not a mean) if it has a loss. Where it is
    to generate, ``prediction`` [samples, ...] stands in place of the loss.

    If it has an attribute `weight_names`, these are the names of its parameters in checkpoints, by those in the module.
    """

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return rows, a loss, or both."""


class HostNetwork(Protocol):
    """A host program's network for one stage of a built-in module: an `nn.Module` with this forward.

    The plan counts layers, heads and tokens as in the built-in model. The network decides what they compute, and with
    which parameters. Under tp, cp and ep it communicates over its own groups or the job's.

    If the module has an auxiliary loss, the network attaches its gradient and returns this rank's term as
    ``NAME.aux``. Before each forward its attribute `aux_scale` is set to the factor of that term.
    """

    def __call__(self, inputs: Mapping[str, Tensor], share: Share) -> Mapping[str, Tensor]:
        """Compute the stage for a share; see the table of `interface`.

        It returns rows for other modules as ``rows``, as many for each sample as came in; projections are part of the
        network. A language model computes its loss by calling its attribute ``loss`` (`shell.modules.loss.Loss`),
        which is set before each forward.
        """

    def table(self, info: StageInfo, *, tp: int, expert_tp: int) -> Mapping[str, Parameter]:
        """Return the description of each parameter on this rank, by its name in the network.

        `tp` ranks hold the shards of a parameter, `expert_tp` ranks those of an expert's. Described names do not
        depend on the layout: layers are numbered within the module, experts within the layer.
        """


@attrs.frozen(eq=False)
class MadeCut:
    """A place where a forward was cut: what the layers above it read has no history.

    Attributes:
        layer: the layer above it.
        hidden: the output of the layer below.
        leaf: what the layer read in its place; the backward of the layers above leaves its gradient here.
    """

    layer: int
    hidden: Tensor
    leaf: Tensor


class StageModule(nn.Module):
    """One stage of a module on this rank.

    Attributes:
        draws: Whether its forward draws from torch's random states in training (`megatron.draws.begin_draws`).
        draw_key: The key of what a built-in model draws in the step.
        reads_entire: Whether it gets all tensors that samples of a source module have, not only the rows.
        weight_grads: The store in which its layers note deferred products while the store is open.
        loss_scale: The factor of the gradients that it attaches itself.
        layers_by: The engine that its layers come from.
        loss: The loss that the last stage of a language model computes.
        generates: Whether a network of the user's returns a prediction in place of its loss.
        can_cache: Whether a language model can compute a token behind what a cache has.
        cache: The cache that a language model goes on from, and adds to; None: it computes whole samples.
    """

    draws = False
    draw_key = 0
    reads_entire = False
    loss_scale = 1.0
    generates = False
    can_cache = False
    cache: Cache | None = None
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
                f"to_{edge.target}": projector_of(edge, module.model, dtype=dtype, weight_grads=weight_grads)
                for edge in self.edges
                if edge.projected and module.model.hidden
            }
        )

    def forward(self, inputs: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
        """Compute the stage for a share; see the table of `interface`."""
        raise NotImplementedError

    @contextlib.contextmanager
    def cut_before(self, layers: Collection[int]) -> Iterator[list[MadeCut]]:
        """Cut a forward that runs while this is open before layers of the module, as far as the network can.

        The list gets the cuts that were made, in the order of layers.
        """
        del layers
        yield []

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        raise NotImplementedError

    def emit(self, rows_RH: Tensor, inner: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Return the rows for each target; `inner` are those of inner layers, which lie beside them."""
        return {
            edge.target: self.projectors[f"to_{edge.target}"](rows_RH, inner) if edge.projected else rows_RH
            for edge in self.edges
        }


def named_weights(stage: StageModule) -> dict[str, nn.Parameter]:
    """Return this rank's parts of the stage's parameters, by layout-independent name, in the table's order."""
    weights = {name_of_weight(stage, built): weight for built, weight in stage.named_parameters()}
    planned = (p.name for p in stage.info.parameters if p.name in weights)
    return {name: weights[name] for name in dict.fromkeys((*planned, *weights))}


def name_of_weight(stage: StageModule, built: str) -> str:
    """Return the layout-independent name of a parameter of the network or of a projector."""
    if built.startswith("projectors."):
        return built.replace("projectors.to_", "projector.", 1)
    return stage.weight_name(built)


def ep_position(groups: StageGroups) -> int:
    """Return this rank's position along ep."""
    return groups.together.rank() // groups.expert_tp.size()
