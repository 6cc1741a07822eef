"""Cuts: where the last backward of a stage is cut, so that sums of its gradients run beside the rest of it.

A backward goes through a stage from its end to its begin, and completes bucket after bucket (`update.buckets`). In the
last one of a step nothing is added to a complete bucket any more. So the backward is cut between layers: a part of it
runs down to a layer, ranks post the sums of what is complete, and go on with the next part. ::

    language.1 B3/8        the head, and layers 11 to 8
    language.1 REDUCE0
    language.1 B3/4        layers 7 to 4
    language.1 REDUCE1
    language.1 B3          the rest

A part ends where `optimizer.cut_mb` of gradients that are summed have become complete. Fewer would not pay: a cut costs
the host some 0.1 ms, as long as a GPU takes to sum so many. Below the last cut a layer must train, or else nothing is
left that a sum could run beside.

Only the stage that computes last on some rank is cut: the sums of others run beside the stages that follow. Some are
never cut: split backwards, because weight gradients come after them; layers that are recomputed together; modules
with rows of inner layers, which enter or leave between layers; and modules of the user's own, which have no layers.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from mimogrid.core.job.models import FIRST, Gpt, Own
from mimogrid.core.job.precision import MAIN_BYTES
from mimogrid.core.pricing.flops import Load, module_units, of_units
from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.schedule.order import Cut
from mimogrid.core.topology.topology import Module, Stage, StageInfo, Topology
from mimogrid.core.update.buckets import MEGA, Bucket, buckets_of, shared_by


def cuts_of(topology: Topology, actions: Sequence[Compute]) -> Mapping[Stage, tuple[Cut, ...]]:
    """Return where the last backward of each stage is cut in an order of training steps; of most stages nowhere."""
    if not topology.spec.optimizer.cut_mb:
        return {}
    last = {action.stage: place for place, action in enumerate(actions)}
    ending = {max(stages, key=last.__getitem__) for stages in topology.ranks_by_stages}
    return {
        stage: cuts
        for stage in topology.stages
        if stage in ending and actions[last[stage]].kind is Kind.BACKWARD
        if (cuts := tuple(_cuts(topology, topology.stages[stage])))
    }


def _cuts(topology: Topology, info: StageInfo) -> Iterator[Cut]:
    module = topology.modules[info.stage.module]
    if not _may_be_cut(topology, module):
        return
    rank = module.tp_cp_ranks(info.stage, 0)[0]
    buckets = buckets_of(topology, info, rank)
    values_least = topology.spec.optimizer.cut_mb * MEGA / MAIN_BYTES[topology.spec.precision]
    layer_of = {parameter.name: parameter.layer for parameter in info.parameters}
    down_to = itertools.accumulate((_complete_at(bucket, info, layer_of) for bucket in buckets), min)
    above, lowest = info.layers.stop + 1, _lowest(info)
    complete: list[int] = []
    values = 0
    for layer, found in itertools.groupby(
        zip(down_to, range(len(buckets)), strict=True), lambda each: each[0]
    ):
        if layer <= lowest:
            return
        for _, number in found:
            complete.append(number)
            if len(shared_by(module, rank, buckets[number].section)) > 1:
                values += buckets[number].size
        if values >= values_least:
            yield Cut(layer, tuple(complete), _share(topology, info, range(layer, above)))
            above, complete, values = layer, [], 0


def _may_be_cut(topology: Topology, module: Module) -> bool:
    """Whether the layers of a module pass hidden states on one after the other, and nothing else."""
    if isinstance(module.model, Own) or topology.spec.modules[module.name].recompute == "full":
        return False
    return all(edge.parts == 1 for edge in (*module.inputs, *module.outputs))


def _complete_at(bucket: Bucket, info: StageInfo, layer_of: Mapping[str, int | str]) -> int:
    """Return the layer down to which a backward must have come to complete a bucket.

    The end of a stage stands for a layer behind the last one, its entry for one before the first.
    """
    places = [layer_of[span.name] for span in bucket.spans]
    if FIRST in places and info.first:
        return info.layers.start - 1
    return min((place for place in places if isinstance(place, int)), default=info.layers.stop)


def _lowest(info: StageInfo) -> int:
    """Return the lowest layer in which a backward has something to compute."""
    places = [parameter.layer for parameter in info.parameters if parameter.name in info.trainable]
    if info.trains_upstream or (FIRST in places and info.first):
        return info.layers.start
    return min((place for place in places if isinstance(place, int)), default=info.layers.stop)


def _share(topology: Topology, info: StageInfo, layers: range) -> float:
    """Return the share of these layers in the operations of a stage's backward, the end counting as a layer."""
    module = topology.modules[info.stage.module]
    load = Load.of((max(topology.sequence, 1),), causal=isinstance(module.model, Gpt))
    flops = of_units(info, module_units(topology, module, load))
    work = [each.input_gradient + each.weight_gradient + each.recomputed for each in flops]
    first = info.layers.start - info.first
    mine = sum(work[layer - first] for layer in layers if layer - first < len(work))
    return mine / sum(work) if sum(work) else 0.0
