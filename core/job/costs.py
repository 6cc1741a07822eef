"""Costs: seconds per microbatch of each stage, latency and bandwidth of each link.

Costs are measured, written by hand, or assumed (`pricing`). They are complete: what they do not name costs nothing.
Their keys are the names that stages and links print.
"""

import math
from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class StageCosts:
    """Seconds of a stage, per microbatch and at the end of a step.

    The backward is one number, or two for its halves. `reduce` is the sum of gradients over dp ranks, if there are
    several, `gather` the all-gather of weights after a sharded update; `update` is the step of the optimizer.
    """

    forward: float = 0.0
    backward: float | None = None
    input_gradient: float | None = None
    weight_gradient: float | None = None
    reduce: float = 0.0
    gather: float = 0.0
    update: float = 0.0

    @property
    def splits(self) -> bool:
        """Whether the halves of the backward are known; otherwise it is never split."""
        return self.input_gradient is not None or self.weight_gradient is not None

    @property
    def whole_backward(self) -> float:
        """Seconds of the backward when it is not split."""
        if self.backward is not None:
            return self.backward
        return (self.input_gradient or 0.0) + (self.weight_gradient or 0.0)


@attrs.frozen(kw_only=True)
class EdgeCosts:
    """The cost of a message: it arrives ``latency + bytes / bytes_per_s`` seconds after both ends have posted it.

    Without `overlap` the sender computes nothing in that time.
    """

    latency: float = 0.0
    bytes_per_s: float = math.inf
    overlap: bool = True

    def carry_s(self, size_bytes: float) -> float:
        """Return how many seconds a message occupies its channel."""
        return size_bytes / self.bytes_per_s


@attrs.frozen(kw_only=True)
class Costs:
    """The costs of a job on a machine.

    Attributes:
        stages: costs by name of the stage (``vision.0``).
        edge: costs of every link that `edges` does not name.
        edges: costs by name of the edge (``vision -> language``) or of the link (``language.0 -> language.1``).
        cores: how many compute actions run at once at full speed, if all ranks share one host; None: no limit.
        origin: where the numbers come from, in words; "": unknown.
    """

    stages: Mapping[str, StageCosts] = attrs.field(factory=dict[str, StageCosts])
    edge: EdgeCosts = EdgeCosts()
    edges: Mapping[str, EdgeCosts] = attrs.field(factory=dict[str, EdgeCosts])
    cores: float | None = None
    origin: str = attrs.field(default="", eq=False)

    def of(self, stage: object) -> StageCosts:
        """Return the costs of a stage; a stage without a name here costs nothing."""
        return self.stages.get(str(stage), FREE)

    def on(self, link: object, edge: object) -> EdgeCosts:
        """Return the costs of a link; `edge` is the edge that it belongs to, or None."""
        return self.edges.get(str(link)) or self.edges.get(str(edge)) or self.edge


FREE = StageCosts(backward=0.0)
