"""Question and answer: what a search is asked, and what it says of a layout."""

from collections.abc import Mapping

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


BEST, SLOWER, TOO_LARGE, ILLEGAL = "best", "slower", "too large", "illegal"


@attrs.frozen(kw_only=True)
class Layout:
    """A layout of a job and what it comes to; all numbers are 0 where it cannot run.

    Attributes:
        spec: the job with this layout.
        kind: the best, slower than that, too large for the memory, or illegal.
        reason: why it is not the best, or that it is, in words.
        step_s: seconds of a step.
        tokens_per_s_per_gpu: over all GPUs that are allocated.
        active: GPUs in a grid; the other ones idle.
        bubble: part of the time of all allocated GPUs in which nothing is computed.
        encoder_share: part of all computing that is not the main module's.
        peak_bytes: per module, what the rank that needs most of those with it needs in all.
        lower_bound_s: a time that no order of these grids beats.
    """

    spec: JobSpec
    kind: str
    reason: str
    step_s: float = 0.0
    tokens_per_s_per_gpu: float = 0.0
    active: int = 0
    bubble: float = 0.0
    encoder_share: float = 0.0
    peak_bytes: Mapping[str, float] = attrs.field(factory=dict[str, float])
    lower_bound_s: float = 0.0


@attrs.frozen(kw_only=True, eq=False)
class Question:
    """What is asked: a legal job with the samples of one step, on so many GPUs with so much memory each.

    The precision of the machine decides on seconds and bytes, whatever the job says.
    """

    spec: JobSpec
    facts: SourceFacts
    samples: tuple[Sample, ...]
    machine: Machine
    gpus: int
    memory_bytes: float

    def topology(self, spec: JobSpec) -> Topology:
        """Return the topology of a layout of the job, in the precision of the machine."""
        return assemble(attrs.evolve(spec, precision=self.machine.precision), self.facts)

    @property
    def largest(self) -> tuple[Sample, ...]:
        """As many samples, each with the most rows and the longest text of any: what memory must be there for."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.rows)
        rows = {name: max(sample.rows.get(name, 0) for sample in self.samples) for name in names}
        length = max(sample.length for sample in self.samples)
        room = self.facts.sequence - sum(rows.values()) if self.facts.sequence else length
        return (Sample(id=0, length=min(length, max(room, 1)), rows=rows),) * len(self.samples)
