"""Stages: what a module is cut into, and how data flows between them.

A module has ``pp * chunks`` stages. Stage i of it is chunk ``i // pp`` of the ranks at position ``i % pp`` along pp; a
rank with several chunks of a module has several *virtual stages*, as Megatron calls them.
"""

import attrs

from mimogrid.core.job.models import HEAD, PROJECTOR, Parameter


UNKNOWN = "*"
"""Stands among the trainable names for the parameters of an own module, known once it is built."""


@attrs.frozen(order=True, cache_hash=True)
class Stage:
    """One stage of a module: its position along pp, and which of the rank's chunks. Prints ``name.pp``.

    >>> print(Stage("language", 1), Stage("language", 1, chunk=2))
    language.1 language.1.2
    """

    module: str
    pp: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.module}.{self.pp}" + (f".{self.chunk}" if self.chunk else "")


@attrs.frozen(cache_hash=True)
class Edge:
    """Rows flow from the last stage of `source` to the first of `target`, `width` values each."""

    source: str
    target: str
    width: int
    projected: bool

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@attrs.frozen(cache_hash=True)
class Link:
    """Data flows from one stage to another: inside a module (a pipeline link) or along an edge (a bridge)."""

    source: Stage
    target: Stage
    edge: Edge | None

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@attrs.frozen
class StageInfo:
    """A stage with its layers, its parameters and its place in the whole.

    `depth` counts the stages from here to the loss along the longest path, this one included;
    `trains_upstream` says that something before it trains, so that gradients of its inputs are wanted.
    """

    stage: Stage
    layers: range
    first: bool
    last: bool
    depth: int
    parameters: tuple[Parameter, ...]
    trainable: frozenset[str]
    trains_upstream: bool

    @property
    def backward(self) -> bool:
        """Whether the stage has a backward at all: something here or upstream trains."""
        return self.trains_upstream or bool(self.trainable)

    def trains_up_to(self, link: Link) -> bool:
        """Whether anything that a link's data comes through trains; a head and other projectors do not count."""
        mine = f"{PROJECTOR}{link.target.module}."
        return self.trains_upstream or any(
            link.edge is None or name.startswith(mine) or not name.startswith((PROJECTOR, HEAD))
            for name in self.trainable
        )
