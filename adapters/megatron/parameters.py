"""The parameters of Megatron's networks: their names, layers and shards.

Names are those of a model on one process: layers are numbered through the module, and experts through the layer. How a
parameter is sharded follows from the attributes that megatron-core sets on it (`tensor_model_parallel`,
`partition_dim`, `sequence_parallel`). Whether it belongs to an expert follows from its name, because megatron-core
marks those (``allreduce=False``) only if ep is above 1.
"""

import re
from collections.abc import Iterator
from typing import Any

from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.mlp import MLP
from torch import nn

from mimogrid.adapters.megatron.experts import expert_layers
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import FIRST, LAST, Parameter
from mimogrid.core.topology.topology import StageInfo


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_IN_LAYER = re.compile(r"(.*\blayers)\.(\d+)(\..+)")
_OF_EXPERT = re.compile(r"(.*\.local_experts)\.(\d+)(\..+)")


def whole_names(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each key of a network's state dict with its name in a network on one process.

    Megatron numbers the layers of a stage and the experts of a rank from 0. Each layer knows its number in the module.
    """
    numbers = {
        name: layer.layer_number - 1
        for name, layer in network.named_modules()
        if isinstance(getattr(layer, "layer_number", None), int)
    }
    firsts = {
        f"{name}.experts.local_experts": layer.local_expert_indices[0]
        for name, layer in expert_layers(network).items()
    }
    for key in network.state_dict():
        name = key
        of_expert = _OF_EXPERT.fullmatch(key)
        if of_expert:
            name = f"{of_expert[1]}.{firsts[of_expert[1]] + int(of_expert[2])}{of_expert[3]}"
        inside = _IN_LAYER.fullmatch(name)
        here = f"{inside[1]}.{inside[2]}" if inside else ""
        yield key, f"{inside[1]}.{numbers[here]}{inside[3]}" if inside and here in numbers else name


def table_of(
    network: nn.Module, info: StageInfo, *, tp: int, expert_tp: int = 1, tied: bool = False
) -> dict[str, Parameter]:
    """Return the parameters of a network by their keys; see `shell.modules.interface.HostNetwork.table`.

    Raises PlanError for a sharded weight without the attributes that say how it is sharded.
    """
    _check_marks(network, info, tp=tp, expert_tp=expert_tp)
    names, found = dict(whole_names(network)), {}
    gated = {
        f"{name}.linear_fc1"
        for name, part in network.named_modules()
        if isinstance(part, MLP) and part.config.gated_linear_unit
    }
    for key, weight in network.named_parameters():
        name = names[key]
        copy = LAST if tied and name in (EMBEDDING, OUTPUT) else None
        inside, of_expert = _IN_LAYER.fullmatch(name), _OF_EXPERT.fullmatch(name)
        parts = expert_tp if of_expert else tp
        marks: Any = weight
        dim: int | None = marks.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        found[key] = Parameter(
            name=EMBEDDING if copy else name,
            shape=tuple(size * parts if d == dim else size for d, size in enumerate(weight.shape)),
            layer=int(inside[2]) if inside else FIRST if info.first else LAST,
            tp_dim=dim,
            tp_blocks=2 if key.rpartition(".")[0] in gated else 1,
            partial=getattr(weight, "sequence_parallel", False) and not of_expert,
            copy=copy,
            expert=int(of_expert[2]) if of_expert else None,
        )
    return found


def _check_marks(network: nn.Module, info: StageInfo, *, tp: int, expert_tp: int) -> None:
    for name, module in network.named_modules():
        is_cut = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        weight = getattr(module, "weight", None)
        axis, parts = ("expert_tp", expert_tp) if _OF_EXPERT.fullmatch(f"{name}.") else ("tp", tp)
        if parts > 1 and is_cut and weight is not None and not hasattr(weight, "partition_dim"):
            fact = f"'{name}.weight' of '{info.stage}' is cut over {axis}={parts} and does not say along which dim."
            remedy = (
                "Build it with perform_initialization=True: megatron-core marks weights as it draws them."
            )
            raise PlanError([Problem(f"modules.{info.stage.module}", fact, remedy)])
