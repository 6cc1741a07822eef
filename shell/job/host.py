"""What a host hands over: stand-ins in the job file for a network and for samples that no name leads to.

    [modules.ears]
    model = "mimogrid.shell.job.host:module"
    width = 48

    [data]
    source = "mimogrid.shell.job.host:samples"
    options = { sequence = 32, features = { vision = 16 } }

A job with them can be checked, drawn and planned like any other; only its host can run it (`adapters`). This
file needs no torch.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import SourceFacts


def module(**options: Any) -> NoReturn:
    """Stand for a network that the host hands over; raises PlanError where it has not."""
    message = "a module whose model is 'mimogrid.shell.job.host:module' has not been handed over."
    remedy = "Run the job from its host, and name the module there on every rank that hosts it."
    raise PlanError([Problem("modules", message, remedy)])


@attrs.frozen
class Handed:
    """A source without samples of its own; of those to come it knows only what the plan must know."""

    known: SourceFacts

    def facts(self) -> SourceFacts:
        """What the plan must know."""
        return self.known

    def describe(self, sample_id: int) -> Sample:
        """Return an empty sample: what the host will hand over is not known yet."""
        return Sample(id=sample_id, length=0, rows={})

    def load(self, sample_id: int, module: str) -> NoReturn:
        """Raise PlanError: the host has them."""
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
) -> Handed:
    """Stand for samples that the host hands over; the options are `core.job.spec.SourceFacts`."""
    facts = SourceFacts(
        sequence=sequence,
        vocab=vocab,
        features=features or {},
        rows=rows or {},
        length=length,
        targets=targets,
    )
    return Handed(facts)
