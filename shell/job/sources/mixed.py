"""Mixed: several sources as one, each with its share of every stretch of the samples.

[[data.mix]]
source = "conversations"
options = { index = "captions.index" }
weight = 3

[[data.mix]]
source = "conversations"
options = { index = "questions.index" }
weight = 1
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.data.mixture import Mixture
from mimogrid.core.job.spec import SourceFacts
from mimogrid.shell.job.sources.source import Source


if TYPE_CHECKING:
    import torch


@attrs.frozen(eq=False)
class Mixed:
    """Sources in a mixture. Each gives its samples in its own order, from its first."""

    parts: tuple[Source, ...]
    mixture: Mixture

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample, as its source describes it."""
        part, number = self.mixture.at(sample_id)
        return attrs.evolve(self.parts[part].describe(number), id=sample_id)

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Return what a module reads of a sample."""
        part, number = self.mixture.at(sample_id)
        return self.parts[part].load(number, module)


def facts_of(parts: Sequence[SourceFacts]) -> SourceFacts:
    """Return what holds of all samples: the largest of what each source says, unknown where one says nothing."""

    def most(values: Iterable[int | None]) -> int | None:
        known = list(values)
        return None if None in known else max(value or 0 for value in known)

    def in_all(tables: Sequence[Mapping[str, int]]) -> dict[str, int]:
        return {name: max(t[name] for t in tables) for name in tables[0] if all(name in t for t in tables)}

    return SourceFacts(
        sequence=most(part.sequence for part in parts),
        vocab=most(part.vocab for part in parts),
        features=in_all([part.features for part in parts]),
        rows=in_all([part.rows for part in parts]),
        length=most(part.length for part in parts),
        targets=all(part.targets for part in parts),
    )
