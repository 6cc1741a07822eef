"""Machine: accelerators of a kind, how much of their peak they reach, and the links between them.

Nodes are filled in order of ranks. The efficiency is an assumption, so it is one number that the user may set.
"""

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.pricing.accelerators import ACCELERATORS, Accelerator


EFFICIENCY = 0.5
"""The part of its peak that an accelerator reaches in the products of a large model, without communication."""
LINK_EFFICIENCY = 0.8
"""The part of its bandwidth that a link reaches with large messages."""


@attrs.frozen(kw_only=True)
class Machine:
    """Accelerators of one kind, and the part of their peaks that they reach.

    `measured` has, by module, how many times as long as this it takes; other modules take as long as this.
    """

    accelerator: Accelerator
    precision: str
    efficiency: float = EFFICIENCY
    measured: tuple[tuple[str, float], ...] = ()

    @property
    def flops(self) -> float:
        """Operations per second that products reach."""
        return self.accelerator.flops[self.precision] * self.efficiency

    @property
    def value_bytes(self) -> int:
        """Bytes of a value in computation and in messages."""
        return VALUE_BYTES[self.precision]

    @property
    def state_bytes(self) -> int:
        """Bytes of a value in an all-reduce or in the optimizer: never fewer than in fp32."""
        return max(self.value_bytes, VALUE_BYTES["fp32"])

    def times(self, module: str) -> float:
        """Return how many times as long as assumed a module takes."""
        return dict(self.measured).get(module, 1.0)

    def link(self, *, within: bool) -> EdgeCosts:
        """Return what a message costs, within a node or between two."""
        gpu = self.accelerator
        bandwidth = gpu.link_bytes_per_s if within else gpu.network_bytes_per_s
        latency = gpu.link_latency_s if within else gpu.network_latency_s
        return EdgeCosts(latency=latency, bytes_per_s=bandwidth * LINK_EFFICIENCY)

    def __str__(self) -> str:
        gpu = self.accelerator
        tera = gpu.flops[self.precision] / 1e12
        return (
            f"FLOPs at {self.efficiency:.0%} of the {tera:,.5g} TFLOP/s of {gpu.name} in {self.precision}, "
            f"messages at {LINK_EFFICIENCY:.0%} of {gpu.link_bytes_per_s / 1e9:,.4g} GB/s within a node of "
            f"{gpu.per_node} and of {gpu.network_bytes_per_s / 1e9:,.4g} GB/s between nodes "
            f"(peaks: {gpu.source})"
        )


def machine_of(gpu: str, precision: str, efficiency: float = EFFICIENCY) -> Machine:
    """Return the machine of an accelerator by its name. Raises PlanError for an unknown name or a wrong efficiency."""
    if gpu not in ACCELERATORS:
        message = f"'{gpu}' is not known."
        raise PlanError([Problem("--gpu", message, nearest(gpu, tuple(ACCELERATORS)))])
    if not 0 < efficiency <= 1:
        message = f"is {efficiency}: the part of its peak that an accelerator reaches."
        raise PlanError([Problem("--efficiency", message, "Use a number above 0 and up to 1, such as 0.5.")])
    return Machine(accelerator=ACCELERATORS[gpu], precision=precision, efficiency=efficiency)
