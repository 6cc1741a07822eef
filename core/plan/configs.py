"""Configurations: one way to lay one module out, with a time that no schedule beats.

A `ParallelShape` is how the ranks of one dp rank and one stage compute a module: tp, cp, ep, recomputation. With a
number of stages, chunks, dp ranks and microbatches it is a `ParallelConfig`, and with its seconds and bytes a
`PricedConfig`. Alone on its ranks a module takes, by the bound of `bounds`, at least the maximum over its pipeline
ranks of

    max(head, gather) + microbatches * (forward + backward) + max(tail, all-reduce)

plus the slowest update. The head is how long the first microbatch needs to the rank, the tail how long the last
gradient needs from it. With a sharded update the weights are gathered beside the first microbatch. Of the all-reduce
only that counts which takes longer than the last backward, if that is cut.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import attrs

from mimogrid.core.job.spec import GridSpec


Rates = tuple[float, float, float, float]
"""Numbers that are better if they are less."""
IN_FLIGHT = 4
"""Microbatches in flight for which the bytes of a rank are rated."""


@attrs.frozen(cache_hash=True)
class ParallelShape:
    """How the ranks of one dp rank and one stage compute a module."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"

    @property
    def ranks(self) -> int:
        """How many ranks share one dp rank of one stage."""
        return self.tp * self.cp

    @property
    def dp_size(self) -> int:
        """The fewest dp ranks on which its experts have room."""
        parts = self.ep * self.expert_tp
        return parts // math.gcd(parts, self.ranks)

    def grid(self, *, dp: int, pp: int) -> GridSpec:
        """Return a grid of so many dp ranks and stages of this shape, without an offset."""
        return GridSpec(
            tp=self.tp,
            cp=self.cp,
            ep=self.ep,
            expert_tp=self.expert_tp,
            dp=dp,
            pp=pp,
            sequence_parallel=self.sequence_parallel,
        )

    def __str__(self) -> str:
        named = {"tp": self.tp, "cp": self.cp, "ep": self.ep}
        return " ".join(f"{axis}={size}" for axis, size in named.items() if size > 1) or "tp=1"


@attrs.frozen(cache_hash=True)
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
        more = f" chunks={self.chunks}" if self.chunks > 1 else ""
        return sizes + more + (f" recompute={shape.recompute}" if shape.recompute != "none" else "")


class RankTime(NamedTuple):
    """Seconds of one pipeline rank of a module.

    `work` is per microbatch, `gather` is for the weights of its first stage, `reduce` is of sums behind all work.
    """

    head: float
    gather: float
    work: float
    tail: float
    reduce: float
    update: float


class RankBytes(NamedTuple):
    """Bytes of one pipeline rank: always, and for each microbatch in flight; with 1F1B there are `depth` of these."""

    kept: float
    in_flight: float
    depth: int


@attrs.frozen(eq=False)
class PricedConfig:
    """A configuration of a module with its price.

    Attributes:
        module: the name of the module.
        config: how it is laid out.
        split: the layers of each stage.
        forward, backward: seconds of one microbatch through all stages.
        times, bytes: seconds and bytes of each pipeline rank.
    """

    module: str
    config: ParallelConfig
    split: tuple[int, ...]
    forward: float
    backward: float
    times: tuple[RankTime, ...]
    bytes: tuple[RankBytes, ...]
    _bytes: dict[int, tuple[float, ...]] = attrs.field(
        factory=dict[int, tuple[float, ...]], init=False, repr=False
    )

    @property
    def ranks(self) -> int:
        """How many ranks the module takes."""
        return self.config.ranks

    @functools.cached_property
    def depth(self) -> int:
        """How many microbatches the modules before it need in flight to keep it busy."""
        return max(rank.depth for rank in self.bytes)

    @functools.cached_property
    def rates(self) -> Rates:
        """What is better if it is less: ranks, bound, seconds of a microbatch through all stages, bytes."""
        held = max(rank.kept + rank.in_flight * IN_FLIGHT for rank in self.bytes)
        return self.ranks, self.bound_s(), self.forward + self.backward, held

    def bound_s(self, head: float = 0.0, tail: float = 0.0) -> float:
        """Return seconds that no order beats, if `head` pass before the first microbatch and `tail` after the last."""
        heads, gathers, update = self._ends
        return max(head + max(heads[0] + tail, heads[1]), gathers[0] + tail, gathers[1]) + update

    @functools.cached_property
    def _ends(self) -> tuple[tuple[float, float], tuple[float, float], float]:
        """When the last gradient has gone back at the earliest, and the last all-reduce is done; then the update.

        Both once as the first microbatch comes from the stages before, once as the weights are there.
        """
        return (
            self._done([rank.head for rank in self.times]),
            self._done([rank.gather for rank in self.times]),
            max(rank.update for rank in self.times),
        )

    def _done(self, begins: Sequence[float]) -> tuple[float, float]:
        both = zip(begins, self.times, strict=True)
        ends = [begin + self.config.microbatches * rank.work for begin, rank in both]
        return (
            max(end + rank.tail for end, rank in zip(ends, self.times, strict=True)),
            max(end + rank.reduce for end, rank in zip(ends, self.times, strict=True)),
        )

    def bytes_at_most(self, below: int) -> tuple[float, ...]:
        """Return what each pipeline rank holds with 1F1B, if the modules behind have `below` microbatches in flight."""
        if below not in self._bytes:
            chunks, most = self.config.chunks, self.config.microbatches * self.config.chunks
            self._bytes[below] = tuple(
                rank.kept + rank.in_flight * min(rank.depth + below * chunks, most) for rank in self.bytes
            )
        return self._bytes[below]

    def __str__(self) -> str:
        return f"{self.module} {self.config}"
