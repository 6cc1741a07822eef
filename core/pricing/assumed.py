"""Assumed: costs where nothing is known. Every layer takes a second, which is enough to see the shape of a schedule."""

from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.job.models import FIRST, Own
from mimogrid.core.topology.topology import Module, StageInfo, Topology


ASSUMED = "each layer counts 1 unit forward, 1 for the input gradient, 1 for the weight gradient; communication is free"
"""The assumption, in words."""


def assumed(topology: Topology) -> Costs:
    """Return costs for a job of which nothing is measured (see `ASSUMED`)."""
    return Costs(stages={str(stage): _assumed(topology, info) for stage, info in topology.stages.items()})


def _assumed(topology: Topology, info: StageInfo) -> StageCosts:
    """Return the costs assumed for a stage; one of the user's own counts as a layer."""
    module = topology.modules[info.stage.module]
    if isinstance(module.model, Own):
        trains = float(bool(info.trainable))
        return StageCosts(forward=1.0, input_gradient=float(info.trains_upstream), weight_gradient=trains)
    of_layers = assumed_of_layers(module)[info.layers.start : info.layers.stop]
    return StageCosts(
        forward=sum(each.forward for each in of_layers),
        input_gradient=sum(each.input_gradient or 0.0 for each in of_layers),
        weight_gradient=sum(each.weight_gradient or 0.0 for each in of_layers),
    )


def assumed_of_layers(module: Module) -> tuple[StageCosts, ...]:
    """Return the costs assumed for every layer of a built-in model, however it is cut into stages."""
    train = {p.layer for p in module.parameters for info in module.stages if p.name in info.trainable}
    before = module.stages[0].trains_upstream or FIRST in train
    costs: list[StageCosts] = []
    for layer in range(module.model.layers):
        trains = layer in train
        costs.append(StageCosts(forward=1.0, input_gradient=float(before), weight_gradient=float(trains)))
        before = before or trains
    return tuple(costs)
