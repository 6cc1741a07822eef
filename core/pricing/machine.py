"""Machine: accelerators of a kind, how much of their peak they reach, and the links between them.

Nodes are filled in order of ranks. The efficiency is an assumption, so it is one number that the user may set.
"""

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.pricing.accelerators import ACCELERATORS, Accelerator


EFFICIENCY = 0.5
"""The part of its peak that an accelerator reaches in the products of a large model, without communication."""
GB = 1e9
LINK_EFFICIENCY = 0.8
"""The part of its bandwidth that a link reaches with large messages."""


@attrs.frozen(kw_only=True)
class Machine:
    """Accelerators of one kind with so much memory each, and the part of their peaks that they reach.

    `measured` has, by module, how many times as long as this it takes; other modules take as long as this.
    """

    accelerator: Accelerator
    precision: str
    efficiency: float = EFFICIENCY
    link_efficiency: float = LINK_EFFICIENCY
    memory_gb: float | None = None
    measured: tuple[tuple[str, float], ...] = ()

    @property
    def memory_bytes(self) -> float:
        """The memory of each."""
        return self.accelerator.memory_bytes if self.memory_gb is None else self.memory_gb * GB

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
        return EdgeCosts(latency=latency, bytes_per_s=bandwidth * self.link_efficiency)

    def __str__(self) -> str:
        gpu = self.accelerator
        tera = gpu.flops[self.precision] / 1e12
        return (
            f"FLOPs at {self.efficiency:.0%} of the {tera:,.5g} TFLOP/s of {gpu.name} in {self.precision}, "
            f"less for small matrices and short sequences, messages at {self.link_efficiency:.0%} of "
            f"{gpu.link_bytes_per_s / 1e9:,.4g} GB/s within a node of {gpu.per_node} and of "
            f"{gpu.network_bytes_per_s / 1e9:,.4g} GB/s between nodes "
            f"(peaks: {gpu.source.flops}; network: {gpu.source.network})"
        )


def machine_of(gpu: str, precision: str, efficiency: float = EFFICIENCY) -> Machine:
    """Return the machine of a kind of GPU. Raises PlanError for an unknown kind, or a precision that it lacks."""
    if gpu not in ACCELERATORS:
        message = f"'{gpu}' is not known."
        raise PlanError([Problem("gpu.name", message, nearest(gpu, tuple(ACCELERATORS)))])
    accelerator = ACCELERATORS[gpu]
    if precision not in accelerator.flops:
        remedy = nearest(precision, tuple(accelerator.flops))
        raise PlanError([Problem("precision", f"'{precision}' is no precision of {gpu}.", remedy)])
    return Machine(accelerator=accelerator, precision=precision, efficiency=efficiency)


def machine_for(spec: JobSpec) -> Machine | None:
    """Return the machine that a job assumes (`[gpu]`); None if it names none. Raises PlanError as `machine_of`."""
    gpu = spec.gpu
    if gpu.name is None:
        return None
    machine = machine_of(gpu.name, spec.precision, EFFICIENCY if gpu.efficiency is None else gpu.efficiency)
    return attrs.evolve(
        machine,
        memory_gb=gpu.memory_gb,
        link_efficiency=LINK_EFFICIENCY if gpu.link_efficiency is None else gpu.link_efficiency,
        measured=tuple(gpu.times.items()),
    )
