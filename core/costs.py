"""Costs: how long things take: seconds per microbatch of a stage, latency and bandwidth of links.

Costs are data: measured, written by hand, or assumed. They are complete, so what they do not name costs
nothing. `assumed` is what a simulation starts from when nobody has measured anything.
"""

import math
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.errors import Problem, nearest
from mimogrid.core.models import FIRST, Own
from mimogrid.core.topology import Link, Stage, StageInfo, Topology


ASSUMED = (
    "per microbatch a layer takes 1 s forward, and backward 1 s for each gradient that is wanted of it, "
    "of its inputs and of its weights; sending takes no time"
)
"""What `assumed` assumes, in words."""


@attrs.frozen(kw_only=True)
class StageCosts:
    """Seconds per microbatch of a stage. The backward is given whole, or as its two halves."""

    forward: float = 0.0
    backward: float | None = None
    input_gradient: float | None = None
    weight_gradient: float | None = None

    @property
    def splits(self) -> bool:
        """Whether the halves of the backward are known; if not, it is never split."""
        return self.input_gradient is not None or self.weight_gradient is not None

    @property
    def whole_backward(self) -> float:
        """Seconds of the backward in one piece."""
        if self.backward is not None:
            return self.backward
        return (self.input_gradient or 0.0) + (self.weight_gradient or 0.0)


@attrs.frozen(kw_only=True)
class EdgeCosts:
    """What a message costs: it arrives ``latency + bytes / bytes_per_s`` after both ends have posted it.

    Without `overlap` the sender does nothing else in that time.
    """

    latency: float = 0.0
    bytes_per_s: float = math.inf
    overlap: bool = True

    def carry_s(self, size_bytes: float) -> float:
        """Return how long a message occupies its channel."""
        return size_bytes / self.bytes_per_s


@attrs.frozen(kw_only=True)
class Costs:
    """The costs of a job on a machine.

    Attributes:
        stages: by the name of a stage (``vision.0``).
        edge: what holds on every link that `edges` does not name.
        edges: by the name of an edge (``vision -> language``) or of a link (``language.0 -> language.1``).
        cores: how many compute actions run at once at full speed, all ranks being on one host; None: all.
    """

    stages: Mapping[str, StageCosts] = attrs.field(factory=dict[str, StageCosts])
    edge: EdgeCosts = EdgeCosts()
    edges: Mapping[str, EdgeCosts] = attrs.field(factory=dict[str, EdgeCosts])
    cores: float | None = None

    def of(self, stage: Stage) -> StageCosts:
        """Return the costs of a stage; nothing where it is not named."""
        return self.stages.get(str(stage), FREE)

    def on(self, link: Link) -> EdgeCosts:
        """Return the costs of a link."""
        return self.edges.get(str(link)) or self.edges.get(str(link.edge)) or self.edge


FREE = StageCosts(backward=0.0)


def assumed(topology: Topology) -> Costs:
    """Return costs for a job that nobody has measured: time goes by layers (see `ASSUMED`)."""
    return Costs(stages={str(stage): _assumed(topology, info) for stage, info in topology.stages.items()})


def _assumed(topology: Topology, info: StageInfo) -> StageCosts:
    if isinstance(topology.modules[info.stage.module].model, Own):
        trains = float(bool(info.trainable))
        return StageCosts(forward=1.0, input_gradient=float(info.trains_upstream), weight_gradient=trains)
    train = {p.layer for p in info.parameters if p.name in info.trainable}
    before = info.trains_upstream or FIRST in train
    inputs = sum(before or not train.isdisjoint(range(info.layers.start, layer)) for layer in info.layers)
    weights = sum(layer in train for layer in info.layers)
    return StageCosts(
        forward=float(len(info.layers)), input_gradient=float(inputs), weight_gradient=float(weights)
    )


def misfits(costs: Costs, topology: Topology) -> Iterator[Problem]:
    """Yield what costs say of things that the job does not have."""
    stages = [str(stage) for stage in topology.stages]
    links = list(dict.fromkeys(str(name) for link in topology.links for name in (link.edge or link, link)))
    for table, named, known in (("stages", costs.stages, stages), ("edges", costs.edges, links)):
        for name in named:
            if name not in known:
                kind = "stage" if table == "stages" else "edge"
                yield Problem(f'{table}."{name}"', f"the job has no {kind} '{name}'.", nearest(name, known))
