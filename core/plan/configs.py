"""Options: one way to lay one module out, with a price that no schedule can beat.

A *shape* is how the ranks of one dp rank and one stage share a module: tp, cp, ep. With a number of stages, chunks,
dp ranks and microbatches it is a *way*, and a way with a price is an *option*. Alone on its ranks it takes at
least, for each of these,

    head + microbatches * (forward + backward) + the longer of tail and reduction, + the slowest update

where head is the way of the first microbatch to the rank and tail the way of the last gradient from it.
"""

import math

import attrs

from mimogrid.core.job.spec import GridSpec


@attrs.frozen
class ParallelShape:
    """How the ranks of one dp rank and one stage share a module."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False

    @property
    def ranks(self) -> int:
        """How many ranks share one dp rank of one stage."""
        return self.tp * self.cp

    @property
    def dp_size(self) -> int:
        """The fewest dp ranks on which its experts have room."""
        return self.ep // math.gcd(self.ep, self.ranks)

    def grid(self, *, dp: int, pp: int) -> GridSpec:
        """Return a grid of so many dp ranks and stages of this shape, without an offset."""
        return GridSpec(
            tp=self.tp, cp=self.cp, ep=self.ep, dp=dp, pp=pp, sequence_parallel=self.sequence_parallel
        )

    def __str__(self) -> str:
        named = {"tp": self.tp, "cp": self.cp, "ep": self.ep}
        return " ".join(f"{axis}={size}" for axis, size in named.items() if size > 1) or "tp=1"


@attrs.frozen
class ParallelConfig:
    """A shape with a number of stages, chunks of each rank, dp ranks and microbatches."""

    shape: ParallelShape
    pp: int
    chunks: int
    dp: int
    microbatches: int

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        return self.shape.ranks * self.dp * self.pp

    @property
    def grid(self) -> GridSpec:
        """The grid, without an offset."""
        return self.shape.grid(dp=self.dp, pp=self.pp)

    def __str__(self) -> str:
        shape = self.shape
        named = {"tp": shape.tp, "cp": shape.cp, "ep": shape.ep, "pp": self.pp, "dp": self.dp}
        sizes = " ".join(f"{axis}={size}" for axis, size in named.items() if size > 1) or "1 rank"
        return sizes + (f" chunks={self.chunks}" if self.chunks > 1 else "")


@attrs.frozen
class RankTime:
    """What a pipeline rank of a module adds to a bound: seconds, of which `work` per microbatch."""

    head: float
    work: float
    tail: float
    reduce: float
    update: float


@attrs.frozen
class RankBytes:
    """What a pipeline rank keeps: always, and for each microbatch in flight; `depth` of them are with 1F1B."""

    kept: float
    flying: float
    depth: int


@attrs.frozen(eq=False)
class PricedConfig:
    """One way to lay a module out; `forward` and `backward` are seconds of the way through all of its stages."""

    module: str
    config: ParallelConfig
    split: tuple[int, ...]
    forward: float
    backward: float
    times: tuple[RankTime, ...]
    bytes: tuple[RankBytes, ...]

    @property
    def ranks(self) -> int:
        """How many ranks the module takes."""
        return self.config.ranks

    @property
    def depth(self) -> int:
        """Microbatches that are in flight above the module for it to be busy."""
        return max(rank.depth for rank in self.bytes)

    def bound(self, head: float = 0.0, tail: float = 0.0) -> float:
        """Return a time that no order beats, if the first microbatch arrives after `head`."""
        return max(
            head + rank.head + self.config.microbatches * rank.work + max(rank.tail + tail, rank.reduce)
            for rank in self.times
        ) + max(rank.update for rank in self.times)

    def bytes_at_most(self, below: int) -> tuple[float, ...]:
        """Return what each pipeline rank holds with 1F1B, where `below` microbatches fly behind the module."""
        return tuple(
            rank.kept
            + rank.flying
            * min(rank.depth + below * self.config.chunks, self.config.microbatches * self.config.chunks)
            for rank in self.bytes
        )

    def __str__(self) -> str:
        return f"{self.module} {self.config}"
