"""Stages: the parts of a module along the pipeline, and the links between them.

A module has ``pp * chunks`` stages. Stage i is chunk ``i // pp`` of the ranks at position ``i % pp`` along pp. A rank
with several chunks of a module runs several virtual stages.
"""

import functools

import attrs

from mimogrid.core.job.models import HEAD, PROJECTOR, Parameter
from mimogrid.core.job.projectors import Projector


UNKNOWN = "*"
"""Among trainable names: the parameters of a custom module, which are known only when it is built."""


@attrs.frozen(order=True, cache_hash=True)
class Stage:
    """One stage of a module: its position along pp, and its chunk. Prints ``name.pp`` or ``name.pp.chunk``.

    >>> print(Stage("language", 1), Stage("language", 1, chunk=2))
    language.1 language.1.2
    """

    module: str
    pp: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.module}.{self.pp}" + (f".{self.chunk}" if self.chunk else "")


@functools.lru_cache(maxsize=1 << 14)
def stage_at(module: str, pp: int, chunk: int) -> Stage:
    """Return the stage at a place: one object for all topologies, so that a look-up need not compare its fields."""
    return Stage(module, pp, chunk)


@attrs.frozen(cache_hash=True)
class Edge:
    """Rows of `width` values flow from the last stage of `source` to the first stage of `target`.

    The `projector` gives them that width; None: they have it. `parts` rows lie side by side in each: that of the last
    layer, and those of `deepstack_layers`.
    """

    source: str
    target: str
    width: int
    projector: Projector | None
    parts: int = 1

    @property
    def projected(self) -> bool:
        """Whether a projector of the source module gives the rows their width."""
        return self.projector is not None

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@attrs.frozen(cache_hash=True)
class Link:
    """Data flows from one stage to another: inside a module (pipeline link) or along an edge (bridge)."""

    source: Stage
    target: Stage
    edge: Edge | None

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@attrs.frozen
class StageInfo:
    """A stage with its layers, its parameters and its place in the pipeline.

    Attributes:
        stage: the stage.
        layers: the numbers of its layers in the module.
        first, last: whether it is the first or the last stage of its module.
        depth: the number of stages from this one to the loss along the longest path, this one included.
        parameters: the parameters that it holds, at full size.
        trainable: the names of those that are trained.
        trains_upstream: whether anything before it is trained, so that it computes gradients of its inputs.
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
        """Whether the stage has a backward: something in it or upstream is trained."""
        return self.trains_upstream or bool(self.trainable)

    def trains_up_to(self, link: Link) -> bool:
        """Whether anything is trained that the data of a link passes through; heads and other projectors are not."""
        mine = f"{PROJECTOR}{link.target.module}."
        return self.trains_upstream or any(
            link.edge is None or name.startswith(mine) or not name.startswith((PROJECTOR, HEAD))
            for name in self.trainable
        )
