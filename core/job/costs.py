"""Costs: how long things take: seconds per microbatch of a stage, latency and bandwidth of links.

Costs are data: measured, written by hand, or assumed (`pricing`). They are complete, so what they do not name
costs nothing. They know stages and links by what these print.
"""

import math
from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class StageCosts:
    """Seconds of a stage: per microbatch, and at the end of a step.

    The backward is given whole, or as its two halves. `reduce` is the sum of the gradients over dp ranks where
    there are several, `update` the step of the optimizer.
    """

    forward: float = 0.0
    backward: float | None = None
    input_gradient: float | None = None
    weight_gradient: float | None = None
    reduce: float = 0.0
    update: float = 0.0

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
        origin: where the numbers come from, in words; "" where nobody says so.
    """

    stages: Mapping[str, StageCosts] = attrs.field(factory=dict[str, StageCosts])
    edge: EdgeCosts = EdgeCosts()
    edges: Mapping[str, EdgeCosts] = attrs.field(factory=dict[str, EdgeCosts])
    cores: float | None = None
    origin: str = attrs.field(default="", eq=False)

    def of(self, stage: object) -> StageCosts:
        """Return the costs of a stage; nothing where it is not named."""
        return self.stages.get(str(stage), FREE)

    def on(self, link: object, edge: object) -> EdgeCosts:
        """Return the costs of a link, which may lie on an edge."""
        return self.edges.get(str(link)) or self.edges.get(str(edge)) or self.edge


FREE = StageCosts(backward=0.0)
