"""Footprint: the bytes that a rank keeps, and those of each microbatch that a stage has in flight.

Weights, gradients and what the optimizer keeps follow from the table of parameters, exactly. What a microbatch
in flight keeps for its backward is an estimate: per layer and position the values that a pre-norm transformer
layer saves (inputs of norms and linears, queries, keys and values, the middle of the MLP twice), and per head
the attention scores and their softmax. Temporary buffers and the allocator's losses are not in it, nor is a
module of the user's own.
"""

from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.models import BuiltIn, Gpt, Own
from mimogrid.core.optimizers import MAIN_BYTES
from mimogrid.core.samples import Sample
from mimogrid.core.shards import local_size, optimizer_bytes
from mimogrid.core.topology import Link, Module, Stage, StageInfo, Topology


VALUE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one value, by the job's precision."""


@attrs.frozen
class Kept:
    """Bytes that a rank holds all the time."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def kept(topology: Topology, rank: int) -> Kept:
    """Return what a rank holds all the time: its weights, and gradients and the optimizer's for those that train."""
    precision = topology.spec.precision
    weights = trained = 0
    for info in topology.stages_of(rank):
        module = topology.modules[info.stage.module]
        for parameter in module.held(info, module.position(rank).get("ep", 0)):
            size = local_size(module, parameter)
            weights += size
            trained += size * (parameter.name in info.trainable)
    return Kept(
        VALUE_BYTES[precision] * weights, MAIN_BYTES[precision] * trained, optimizer_bytes(topology, rank)
    )


def saved_values(module: Module, info: StageInfo, shape: tuple[int, int, int], recompute: str) -> float:
    """Return how many values a stage saves of a microbatch until its backward, where there is one.

    `shape` is (positions, samples, hidden) of the hidden states on a rank.
    """
    if isinstance(module.model, Own) or not info.backward:
        return 0.0
    return len(info.layers) * _of_layer(module, module.model, shape, recompute)


def _of_layer(module: Module, model: BuiltIn, shape: tuple[int, int, int], recompute: str) -> float:
    positions, samples, hidden = shape
    tp = module.grid.extent("tp")
    shared = tp if module.sequence_parallel else 1
    tokens = positions * samples
    keys = positions * module.cp
    middle = model.ffn * (model.top_k if model.experts else 1)
    inputs = tokens * hidden
    if recompute == "full":
        return inputs / shared
    qkv = (model.heads + 2 * model.kv_heads) * model.head_width
    linear = tokens * (qkv + hidden + 2 * middle) / tp
    scores = 0.0 if recompute == "selective" else 2 * tokens * keys * model.heads / tp
    return 4 * inputs / shared + linear + scores


# -- for the largest sample of the source ------------------------------------------------------------------


def largest_shape(topology: Topology, module: Module) -> tuple[int, int, int]:
    """Return (positions, samples, hidden) of a microbatch on a rank if all samples are as large as they get."""
    samples = -(-topology.samples_per_microbatch[module.name] // module.lanes)
    positions = topology.sequence if isinstance(module.model, Gpt) else _most_rows(topology)[module.name]
    return module.padded(positions) // module.cp, samples, module.model.hidden or 0


def _most_rows(topology: Topology) -> Mapping[str, int]:
    source = topology.source
    return topology.graph.rows_out(Sample(id=0, length=source.length or 0, rows=source.rows))


def most_bytes_in_flight(topology: Topology, stage: Stage) -> float:
    """Return what a rank of a stage keeps for a microbatch in flight, at most."""
    module, info = topology.modules[stage.module], topology.stages[stage]
    recompute = topology.spec.modules[stage.module].recompute
    values = saved_values(module, info, largest_shape(topology, module), recompute)
    return VALUE_BYTES[topology.spec.precision] * values


def most_message_bytes(topology: Topology, link: Link) -> float:
    """Return how large a microbatch is on a link, at most, from one rank to another that mirrors it."""
    target = topology.modules[link.target.module]
    positions, samples, hidden = largest_shape(topology, target)
    if link.edge:
        rows = _most_rows(topology)[link.source.module] * samples
        values = rows * link.edge.width / (target.cp * target.grid.extent("tp"))
    else:
        values = positions * samples * hidden
    return VALUE_BYTES[topology.spec.precision] * values


def hosts(topology: Topology) -> Iterator[tuple[int, frozenset[Stage]]]:
    """Yield the first rank of every set of stages that share ranks, with the set."""
    seen: set[frozenset[Stage]] = set()
    for rank in topology.ranks:
        stages = frozenset(info.stage for info in topology.stages_of(rank))
        if stages not in seen:
            seen.add(stages)
            yield rank, stages
