"""Source: where samples come from.

A source has two methods. Every rank calls ``describe(sample_id)`` for every sample of a step, so it is pure, cheap and
free of torch. A rank calls ``load(sample_id, module)`` for its own share only.

A source of your own is a function ``package.module:function``. It is called with the ``[data] options`` by name, and
with those of these arguments that its signature has:

    graph     the module graph (`core.job.graph.ModuleGraph`): what feeds what, which modules read rows or text
    models    for each module, the options of its built-in model, or the options of an own one as written
    seed      the job's seed, from which all random numbers of a source must come

It returns a `Source`. If the source has a method ``facts()`` that returns `core.job.spec.SourceFacts`, the plan is
checked against these. Import torch inside ``load`` only, and `mimogrid check` can count rows without torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from mimogrid.core.base.samples import Sample


if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Samples by id, from 0 without end. An id has the same sample on every rank and in every run.

    A source may also have ``held_out(...)``, which returns a source of samples that training never uses.
    """

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample. Pure, cheap, without torch."""
        ...

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Return what a module reads of a sample, besides the rows that other modules feed it.

        - a module that nothing feeds: ``rows`` [rows, features], float;
        - a `gpt`: ``tokens``, ``labels`` and ``loss_weights``, flat, with one entry for each position in use
          (placeholders and text tokens). Tokens are -1 at the placeholders. A label is what its position must
          predict; only positions with a weight count;
        - a `regressor`: ``targets`` [rows that it reads, outputs], float;
        - a module of your own: what its builder expects.
        """
        ...
