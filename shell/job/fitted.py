"""Fitted: a source whose samples fit the sequence of a job (`[data] overflow`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimogrid.core.base.samples import Sample
from mimogrid.core.step.overflow import fitted
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.job.sources.source import Source


if TYPE_CHECKING:
    import torch


def fit(sample: Sample, topology: Topology) -> Sample:
    """Return a sample as a job takes it (`core.step.overflow`). Raises PlanError for one that cannot be cut."""
    return fitted(sample, topology.graph, sequence=topology.sequence, overflow=topology.spec.data.overflow)


class Fitted:
    """Describes and loads the samples of a source as a job takes them; all else is the source's."""

    def __init__(self, source: Source, topology: Topology) -> None:
        self._source = source
        self._topology = topology

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample."""
        return fit(self._source.describe(sample_id), self._topology)

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Return what a module reads of a sample: of a sample that was cut, the first positions."""
        whole = self._source.describe(sample_id)
        taken = fit(whole, self._topology)
        if taken is not whole and not taken.length:
            return {}
        loaded = self._source.load(sample_id, module)
        if taken is whole:
            return loaded
        before, after = (self._topology.graph.rows_out(of)[module] for of in (whole, taken))
        return {name: of[:after] if len(of) == before else of for name, of in loaded.items()}
