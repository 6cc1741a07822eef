"""What the parameters of Megatron's networks are: names, layers, and how each is cut.

They go by the names that they have in a model of one stage: layers are counted through the module. How each is cut is
read from the marks that megatron-core leaves on them (`tensor_model_parallel`, `partition_dim`,
`sequence_parallel`).
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

from mimogrid.core.errors import PlanError, Problem
from mimogrid.core.models import FIRST, LAST, Parameter
from mimogrid.core.topology import StageInfo


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_IN_LAYER = re.compile(r"(.*\blayers)\.(\d+)(\..+)")


def whole_names(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each key of a network's state dict with its name in a network of one stage.

    Megatron counts the layers of a stage from 0; each of them knows its number in the whole.
    """
    numbers = {
        name: layer.layer_number - 1
        for name, layer in network.named_modules()
        if hasattr(layer, "layer_number")
    }
    for key in network.state_dict():
        inside = _IN_LAYER.fullmatch(key)
        here = f"{inside[1]}.{inside[2]}" if inside else ""
        yield key, f"{inside[1]}.{numbers[here]}{inside[3]}" if inside and here in numbers else key


def table_of(network: nn.Module, info: StageInfo, *, tp: int, tied: bool = False) -> dict[str, Parameter]:
    """Return what the parameters of a network are, by their keys; see `shell.modules.HostNetwork.table`.

    Raises PlanError for a weight that is cut and lacks the marks that say how.
    """
    _check_marks(network, info, tp)
    names, found = dict(whole_names(network)), {}
    gated = {
        f"{name}.linear_fc1"
        for name, part in network.named_modules()
        if isinstance(part, MLP) and part.config.gated_linear_unit
    }
    for key, weight in network.named_parameters():
        name = names[key]
        copy = LAST if tied and name in (EMBEDDING, OUTPUT) else None
        inside = _IN_LAYER.fullmatch(name)
        marks: Any = weight
        dim: int | None = marks.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        found[key] = Parameter(
            name=EMBEDDING if copy else name,
            shape=tuple(size * tp if d == dim else size for d, size in enumerate(weight.shape)),
            layer=int(inside[2]) if inside else FIRST if info.first else LAST,
            tp_dim=dim,
            tp_blocks=2 if key.rpartition(".")[0] in gated else 1,
            partial=getattr(weight, "sequence_parallel", False),
            copy=copy,
        )
    return found


def _check_marks(network: nn.Module, info: StageInfo, tp: int) -> None:
    for name, module in network.named_modules():
        is_cut = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        weight = getattr(module, "weight", None)
        if tp > 1 and is_cut and weight is not None and not hasattr(weight, "partition_dim"):
            fact = f"'{name}.weight' of '{info.stage}' is cut over tp={tp} and does not say along which dim."
            remedy = (
                "Build it with perform_initialization=True: megatron-core marks weights as it draws them."
            )
            raise PlanError([Problem(f"modules.{info.stage.module}", fact, remedy)])
