"""Menu: every way to lay one module out that makes a difference, each priced when it is asked for.

    shapes    which are legal is asked of `legality`, whose reasons are kept
    stages    of L layers no stage needs more than L/p rounded up, so p is the least that allows it. Layers are dealt so
              that the slowest stage is as fast as it can be, forward and backward together; frozen layers are light,
              the head is heavy, and the deal says so
    dp ranks     likewise: of k samples in a microbatch no dp rank needs more than k/dp rounded up

So of ways that differ in nothing but idle ranks one is looked at.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.job.validation import problems_of
from mimogrid.core.plan.configs import ParallelConfig, ParallelShape, PricedConfig, RankBytes, RankTime
from mimogrid.core.plan.prices import Prices, alone, over
from mimogrid.core.pricing.flops import lengths_of
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.step.step import Step


CHUNKS = (1, 2, 4)
"""Chunks per rank that are tried."""


@attrs.frozen
class Illegal:
    """A shape that a module cannot have, and why."""

    module: str
    shape: ParallelShape
    problem: Problem


@attrs.frozen(eq=False)
class SearchSpace:
    """The options of one module of a job: shapes that are legal, with what their layers cost."""

    prices: Prices
    shapes: tuple[ParallelShape, ...]
    illegal: tuple[Illegal, ...]

    def configs(
        self, microbatches: int, ranks: int, chunks: Sequence[int] = (1,)
    ) -> Iterator[ParallelConfig]:
        """Yield every way to lay the module out on up to so many ranks, for so many microbatches."""
        layers, samples = self.prices.layers, self.prices.samples // microbatches
        for shape in self.shapes:
            for pp, chunk in itertools.product(enough(layers, layers), chunks):
                each = shape.ranks * pp
                if chunk > 1 and (pp == 1 or pp * chunk > layers or microbatches % pp):
                    continue
                for dp in enough(samples, ranks // each):
                    if dp % shape.dp_size == 0:
                        yield ParallelConfig(shape, pp, chunk, dp, microbatches)

    def least_s(self, config: ParallelConfig) -> float:
        """Return what a way takes at least, from its work alone."""
        seconds = self.prices.seconds(config)
        return (seconds.forward[-1] + seconds.backward[-1]) * config.microbatches / config.pp

    def least_bytes(self, config: ParallelConfig) -> float:
        """Return what its fullest rank keeps at least, from the whole alone."""
        held = self.prices.held(config.shape)
        return (held.kept[-1] + (0 if self.prices.spec.optimizer.sharded else held.optimizer[-1])) / config.pp

    def priced(self, config: ParallelConfig) -> PricedConfig:
        """Return a way, priced."""
        pp, chunks = config.pp, config.chunks
        seconds = self.prices.seconds(config)
        split = self.prices.split(config.shape, pp * chunks)
        starts = tuple(itertools.accumulate(split, initial=0))
        mine = [[(starts[i], starts[i + 1]) for i in range(rank, pp * chunks, pp)] for rank in range(pp)]
        return PricedConfig(
            module=self.prices.name,
            config=config,
            split=split,
            forward=seconds.forward[-1],
            backward=seconds.backward[-1],
            times=tuple(self._time(config, parts) for parts in mine),
            bytes=tuple(self._bytes(config, rank, parts) for rank, parts in enumerate(mine)),
        )

    def _time(self, config: ParallelConfig, parts: Sequence[tuple[int, int]]) -> RankTime:
        """Return the seconds of a rank with these ranges of layers, its first one first."""
        shape, first, copies = config.shape, parts[0][0], config.shape.cp * config.dp
        seconds = self.prices.seconds(config)
        sums = over(self.prices.held(shape).trained, parts) * self.prices.machine.state_bytes
        within = shape.tp * copies <= self.prices.machine.accelerator.per_node
        return RankTime(
            head=seconds.forward[first],
            work=over(seconds.forward, parts) + over(seconds.backward, parts),
            tail=seconds.backward[first],
            reduce=self.prices.machine.link(within=within).carry_s(2 * sums * (copies - 1) / copies),
            update=over(seconds.update, parts),
        )

    def _bytes(self, config: ParallelConfig, rank: int, parts: Sequence[tuple[int, int]]) -> RankBytes:
        """Return the bytes of the rank at a position along pp, with these ranges of layers."""
        held, pp, chunks = self.prices.held(config.shape), config.pp, config.chunks
        samples = self.prices.samples_at_most(config)
        owners = config.shape.cp * config.dp if self.prices.spec.optimizer.sharded else 1
        return RankBytes(
            kept=over(held.kept, parts) + over(held.optimizer, parts) / owners,
            flying=over(held.flying, parts) * samples / chunks,
            depth=pp - rank if chunks == 1 else 2 * (pp - rank - 1) + (chunks - 1) * pp + 1,
        )


def search_space_of(
    name: str, *, step: Step, machine: Machine, ranks: int, spec: JobSpec, facts: SourceFacts
) -> SearchSpace:
    """Return the search space of a module on up to so many ranks, for the samples of a step.

    `spec` is the job whose legality is asked; the topology of the step says in which precision bytes count.
    """
    shapes: list[ParallelShape] = []
    illegal: list[Illegal] = []
    for shape in _shapes(spec, name, min(machine.accelerator.per_node, ranks)):
        problem = _problem(spec, facts, name, shape)
        if problem is None:
            shapes.append(shape)
        else:
            illegal.append(Illegal(name, shape, problem))
    lengths = lengths_of(step, name)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    prices = Prices(
        spec=step.topology.spec,
        facts=step.topology.source,
        lengths=lengths,
        longest=step.samples[longest],
        machine=machine,
        name=name,
    )
    return SearchSpace(prices, tuple(shapes), tuple(illegal))


def enough(things: int, most: int) -> tuple[int, ...]:
    """Return into how many parts, up to `most`, it makes sense to deal things: fewer would make none larger.

    >>> enough(8, 6)
    (1, 2, 3, 4)
    >>> enough(8, 8)
    (1, 2, 3, 4, 8)
    """
    counts = {-(-things // each) for each in range(1, things + 1)}
    return tuple(sorted(count for count in counts if count <= most))


def _shapes(spec: JobSpec, name: str, ranks: int) -> Iterator[ParallelShape]:
    """Yield the shapes that one might wish for: tp and cp within a node, experts over what they divide by."""
    options = spec.modules[name].options
    if isinstance(options, Mapping):
        yield ParallelShape()
        return
    parts = [ep for ep in range(1, options.experts + 1) if options.experts % ep == 0] or [1]
    for tp, power, ep in itertools.product(range(1, ranks + 1), range(ranks.bit_length()), parts):
        if tp * 2**power <= ranks:
            yield ParallelShape(tp, 2**power, ep, sequence_parallel=tp > 1)


def _problem(spec: JobSpec, facts: SourceFacts, name: str, shape: ParallelShape) -> Problem | None:
    """Return why a module cannot have a shape, if it cannot, whatever else is chosen."""
    probe = alone(spec, name, shape, pp=1)
    mine = (f"modules.{name}.grid", f"modules.{name}.options", "data.options.sequence")
    return next((p for p in problems_of(probe, facts) if p.where.startswith(mine)), None)
