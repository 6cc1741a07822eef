"""Stand-ins in a job file for a network and for samples that a host program supplies.

    [modules.ears]
    model = "mimogrid.shell.job.host:module"
    width = 48

    [data]
    source = "mimogrid.shell.job.host:samples"
    options = { sequence = 32, features = { vision = 16 } }

A job with them can be checked, drawn and planned like any other. Only its host program can run it (`adapters`). This
file needs no torch.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import SourceFacts


def module(**options: Any) -> NoReturn:
    """Stand for a network of the host program. Raises PlanError, because it is called only if there is none."""
    message = "a module whose model is 'mimogrid.shell.job.host:module' has not been handed over."
    remedy = "Run the job from its host, and name the module there on every rank that hosts it."
    raise PlanError([Problem("modules", message, remedy)])


@attrs.frozen
class HostSource:
    """A source without samples of its own. It knows what the plan must know of the host program's samples."""

    known: SourceFacts

    def facts(self) -> SourceFacts:
        """Return what the plan must know."""
        return self.known

    def describe(self, sample_id: int) -> Sample:
        """Return an empty sample, because the host program's samples are not known yet."""
        return Sample(id=sample_id, length=0, rows={})

    def load(self, sample_id: int, module: str) -> NoReturn:
        """Raise PlanError: the host program has the samples."""
        message = "the samples of this job are the host's, and it has handed over none for this step."
        remedy = "Run the job from its host, and give each step its batch."
        raise PlanError([Problem("data.source", message, remedy)])


def samples(
    *,
    sequence: int | None = None,
    vocab: int | None = None,
    features: Mapping[str, int] | None = None,
    rows: Mapping[str, int] | None = None,
    length: int | None = None,
    targets: bool = True,
) -> HostSource:
    """Stand for samples of the host program; the options are those of `core.job.spec.SourceFacts`."""
    facts = SourceFacts(
        sequence=sequence,
        vocab=vocab,
        features=features or {},
        rows=rows or {},
        length=length,
        targets=targets,
    )
    return HostSource(facts)
