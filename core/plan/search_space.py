"""Search space: every way to lay one module out that makes a difference, each priced when it is asked for.

    shapes    `validation` says which are legal; its reasons are kept
    stages    of L layers a stage needs at most L/p rounded up, so p is the smallest number that allows it. Layers are
              split so that the slowest stage is as fast as possible, forward and backward together: frozen layers are
              light, the head is heavy
    dp ranks  likewise: of k samples in a microbatch a dp rank needs at most k/dp rounded up

So of configurations that differ only in idle ranks one is looked at. Where microbatches have a limit of tokens, the
number of microbatches follows from the dp ranks (`token_limit`), and a dp rank has any part of the samples.

What the layers of a module cost in a shape comes from the same functions as the costs and the memory of a whole job
(`pricing.units`, `memory`), for a job in which every layer is a stage of its own. Prefix sums over the layers then
price any stage with two look-ups.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import StageCosts
from mimogrid.core.job.models import Own
from mimogrid.core.job.placement import balanced
from mimogrid.core.job.spec import BatchSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan.configs import (
    IN_FLIGHT,
    ParallelConfig,
    ParallelShape,
    PricedConfig,
    RankBytes,
    RankTime,
    Rates,
)
from mimogrid.core.plan.pins import FREE, Pins
from mimogrid.core.plan.token_limit import TokenLimit, token_limit_of
from mimogrid.core.pricing.flops import Load, Loads, Terms, alike_layers, module_terms, trainable_of
from mimogrid.core.pricing.footprint import fullest_cell, kept
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.pricing.units import Values, joined, unit_costs, values_of_units
from mimogrid.core.simulate.memory import saved_bytes
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Module, Topology


CHUNKS = (1, 2, 4)
"""Chunks per rank that are tried."""


SHARED_MOST = 16
"""Ranks that share a dp rank at most, also where more are in one node."""
STEP = 1.1
"""Numbers of dp ranks that are tried differ by this factor, or divide the samples."""


@attrs.frozen
class Illegal:
    """A shape that a module cannot have, and why."""

    module: str
    shape: ParallelShape
    problem: Problem


@attrs.frozen(eq=False)
class SearchSpace:
    """The configurations of one module of a job: legal shapes, with what its layers cost. They have what is pinned.

    `limit` is the limit of tokens of the job, and `reads_text` says whether the module is a language model.
    """

    costs: "LayerCosts"
    shapes: tuple[ParallelShape, ...]
    illegal: tuple[Illegal, ...]
    pins: Pins = FREE
    limit: TokenLimit | None = None
    reads_text: bool = True
    _priced: dict[ParallelConfig, PricedConfig] = attrs.field(
        factory=dict[ParallelConfig, PricedConfig], init=False, repr=False
    )
    _allowed: dict[ParallelShape, bool] = attrs.field(
        factory=dict[ParallelShape, bool], init=False, repr=False
    )

    def allows(self, shape: ParallelShape) -> bool:
        """Whether the module can have a shape, which need not be one of those that are walked."""
        if shape not in self._allowed:
            costs = self.costs
            self._allowed[shape] = (
                shape in self.shapes or shape_problem(costs.spec, costs.facts, costs.name, shape) is None
            )
        return self._allowed[shape]

    @property
    def counts(self) -> Sequence[int]:
        """The numbers of microbatches that the module may have: the divisors of the samples, or as a limit says."""
        if self.limit is None:
            return divisors(self.costs.samples)
        return counts_within(self.limit, self.pins, self.costs.layers if self.reads_text else 1)

    def has_samples(self, config: ParallelConfig) -> bool:
        """Whether every dp rank may have samples in a microbatch."""
        return config.dp <= self.sizes(config.microbatches, config.ranks).most_dp

    @property
    def balances(self) -> bool:
        """Whether microbatches are counted, and samples are assigned to them and to dp ranks by cost."""
        return self.limit is None and self.costs.spec.batch.balance == "cost"

    @property
    def cuts_cells(self) -> bool:
        """Whether a step is cut into cells: by tokens, or to assign samples by cost (`step.cells`)."""
        return self.limit is not None or self.balances

    def _timed_share(self, microbatches: int, dp: int) -> float:
        """Return how many samples of a microbatch count for the time of a dp rank.

        Those of the fullest one. Where tokens cut a step, or costs assign its samples, all have about the mean.
        """
        if self.balances:
            return self.costs.samples / (microbatches * dp)
        return self._held_share(microbatches, dp)

    def _held_share(self, microbatches: int, dp: int) -> float:
        """Return how many samples of a microbatch the fullest dp rank holds; under a limit of tokens, the mean one."""
        samples = self.costs.samples
        return samples / (microbatches * dp) if self.limit else -(-(samples // microbatches) // dp)

    def rated(
        self, microbatches: int, ranks: int, chunks: Sequence[int] = (1,), *, beside: Sequence[int] = ()
    ) -> Iterator[tuple[Rates, ParallelConfig]]:
        """Yield every configuration on up to so many ranks, for so many microbatches, with what no price is below.

        `beside` is as `sizes` takes it.
        """
        sizes = self.sizes(microbatches, ranks, chunks, beside=beside)
        for shape in self.shapes:
            kept, in_flight = self._least_kept(shape), self.costs.held(shape).in_flight[-1]
            known: dict[int, tuple[float, float]] = {}
            for pp, chunk, dp in sizes.of(shape):
                if dp not in known:
                    seconds = self.costs.seconds(shape, self._timed_share(microbatches, dp))
                    held = IN_FLIGHT * self._held_share(microbatches, dp) * in_flight
                    known[dp] = seconds.forward[-1] + seconds.backward[-1], held
                through, held = known[dp]
                share = _pipelined(microbatches, pp) if chunk == 1 else microbatches / pp
                rates = shape.ranks * pp * dp, through * share, through, (kept + held / chunk) / pp
                yield rates, ParallelConfig(shape, pp, chunk, dp, microbatches)

    def sizes(
        self, microbatches: int, ranks: int, chunks: Sequence[int] = (1,), *, beside: Sequence[int] = ()
    ) -> "Sizes":
        """Return the sizes that shapes are tried with on up to so many ranks, for so many microbatches.

        `beside` has the dp size of the main module, if this is another one.
        """
        return Sizes(
            module=self.costs.name,
            layers=self.costs.layers,
            samples=self.costs.samples,
            microbatches=microbatches,
            ranks=ranks,
            chunks=chunks,
            pins=self.pins,
            limit=self.limit,
            reads_text=self.reads_text,
            beside=(*beside, *self.pins.dp_beside(self.costs.name)),
        )

    def least_bytes(self, config: ParallelConfig) -> float:
        """Return the bytes that its fullest rank keeps at least: an equal part of all."""
        return self._least_kept(config.shape) / config.pp

    def _least_kept(self, shape: ParallelShape) -> float:
        """Return the bytes of a whole module that are there all the time, as far as dp ranks do not share them."""
        held = self.costs.held(shape)
        return held.kept[-1] + (0 if self.costs.spec.optimizer.sharded else held.optimizer[-1])

    def priced(self, config: ParallelConfig) -> PricedConfig:
        """Return a configuration with its price, which is kept."""
        if config not in self._priced:
            self._priced[config] = self._price(config)
        return self._priced[config]

    def _price(self, config: ParallelConfig) -> PricedConfig:
        pp, chunks = config.pp, config.chunks
        seconds = self.costs.seconds(config.shape, self._timed_share(config.microbatches, config.dp))
        held = self.costs.held(config.shape)
        split = self.costs.split(config.shape, pp * chunks)
        starts = tuple(itertools.accumulate(split, initial=0))
        mine = [[(starts[i], starts[i + 1]) for i in range(rank, pp * chunks, pp)] for rank in range(pp)]
        gather_s, reduce_s = self._collectives(config)
        cuts = self.costs.spec.optimizer.cut_mb > 0
        return PricedConfig(
            module=self.costs.name,
            config=config,
            split=split,
            forward=seconds.forward[-1],
            backward=seconds.backward[-1],
            times=tuple(
                RankTime(
                    head=seconds.forward[spans[0][0]],
                    gather=gather_s(over(held.trained, spans[:1])),
                    work=over(seconds.forward, spans) + over(seconds.backward, spans),
                    tail=seconds.backward[spans[0][0]],
                    # Sums run beside a last backward that is cut.
                    reduce=max(
                        reduce_s(over(held.trained, spans)) - cuts * over(seconds.backward, spans[:1]), 0.0
                    ),
                    update=over(seconds.update, spans),
                )
                for spans in mine
            ),
            bytes=tuple(self._bytes(config, held, rank, spans) for rank, spans in enumerate(mine)),
        )

    def _collectives(
        self, config: ParallelConfig
    ) -> tuple[Callable[[float], float], Callable[[float], float]]:
        """Return what gives the seconds in which so many weights are gathered, and their gradients reduced."""
        copies, machine = config.shape.cp * config.dp, self.costs.machine
        link = machine.link(within=config.shape.tp * copies <= machine.accelerator.per_node)
        sharded = self.costs.spec.optimizer.sharded
        weights, gradients = sharded * machine.value_bytes, (1 if sharded else 2) * machine.state_bytes
        return (
            lambda trained: link.carry_s(trained * weights * (copies - 1) / copies),
            lambda trained: link.carry_s(trained * gradients * (copies - 1) / copies),
        )

    def _bytes(
        self, config: ParallelConfig, held: "LayerBytes", rank: int, spans: Sequence["Span"]
    ) -> RankBytes:
        """Return the bytes of the rank at a position along pp, with these layers."""
        pp, chunks = config.pp, config.chunks
        owners = config.shape.cp * config.dp if self.costs.spec.optimizer.sharded else 1
        return RankBytes(
            kept=over(held.kept, spans) + over(held.optimizer, spans) / owners,
            in_flight=over(held.in_flight, spans) * self._held_share(config.microbatches, config.dp) / chunks,
            depth=pp - rank if chunks == 1 else 2 * (pp - rank - 1) + (chunks - 1) * pp + 1,
        )


@attrs.frozen(kw_only=True)
class Sizes:
    """The stages, chunks and dp ranks that the shapes of a module may have.

    `layers` are those of the module, `samples` those of a step. It has `microbatches` in a step, on up to so many
    `ranks`, and `chunks` are tried. `limit` and `reads_text` are those of `SearchSpace`. `beside` has the dp sizes of
    other modules that are known.
    """

    module: str
    layers: int
    samples: int
    microbatches: int
    ranks: int
    chunks: Sequence[int]
    pins: Pins
    limit: TokenLimit | None = None
    reads_text: bool = True
    beside: Sequence[int] = ()

    @property
    def most_dp(self) -> int:
        """The most dp ranks that may have samples in a microbatch."""
        return self.samples // self.microbatches if self.limit is None else self.limit.samples

    def of(self, shape: ParallelShape) -> Iterator[tuple[int, int, int]]:
        """Yield pp, chunks and dp of every configuration of a shape."""
        among = functools.partial(self.pins.among, self.module)
        stages, chunks = among("pp", enough(self.layers, self.layers)), among("chunks", self.chunks)
        for pp, chunk in itertools.product(stages, chunks):
            if not self._is_filled(pp, chunk):
                continue
            most = min(self.ranks // (shape.ranks * pp), self.most_dp)
            for dp in among("dp", self.dp_sizes(shape, pp, chunk, most)):
                if dp <= most and dp % shape.dp_size == 0 and self._keeps_count(pp, chunk, dp):
                    yield pp, chunk, dp

    def dp_sizes(self, shape: ParallelShape, pp: int, chunk: int, most: int) -> Sequence[int]:
        """Return dp sizes up to `most` that are tried with so many stages and chunks, ascending."""
        if self.limit is None:
            return tried(self.most_dp, most)
        if not self.reads_text:
            return self.limit.other_dp_sizes(self.microbatches, most=most, text=next(iter(self.beside), None))
        multiple, of = _multiple(pp, chunk), shape.dp_size
        return self.limit.text_dp_sizes(
            self.microbatches, multiple=multiple, of=of, most=most, beside=self.beside
        )

    def largest_dp(self, shape: ParallelShape, pp: int, chunk: int, most: int) -> int:
        """Return the largest dp size up to `most`; 0 if none goes with this number of microbatches."""
        if self.limit is None:
            return min(most, self.most_dp)
        return next(reversed(self.dp_sizes(shape, pp, chunk, most)), 0)

    def holds(self, shape: ParallelShape, pp: int, chunk: int, dp: int) -> bool:
        """Whether there are ranks, samples, layers and microbatches for a configuration."""
        fits = dp <= self.most_dp and shape.ranks * pp * dp <= self.ranks and dp % shape.dp_size == 0
        return fits and self._is_filled(pp, chunk) and self._keeps_count(pp, chunk, dp)

    def _is_filled(self, pp: int, chunk: int) -> bool:
        """Whether there are layers for all stages, and microbatches for the chunks."""
        return pp * chunk <= self.layers and (chunk == 1 or (pp > 1 and self.microbatches % pp == 0))

    def _keeps_count(self, pp: int, chunk: int, dp: int) -> bool:
        """Whether so many dp ranks have this number of microbatches, if a limit gives the number."""
        if self.limit is None or not self.reads_text:
            return True
        return self.limit.microbatches(dp, _multiple(pp, chunk)) == self.microbatches


def _multiple(pp: int, chunks: int) -> int:
    """Return what the number of microbatches is a multiple of."""
    return 1 if chunks == 1 else pp


def counts_within(limit: TokenLimit, pins: Pins, layers: int) -> Sequence[int]:
    """Return the numbers of microbatches that a limit of tokens gives, for so many layers, and for what is pinned."""
    multiples = {1, *enough(layers, layers), *pins.values("pp")}
    sizes = {*tried(limit.bins, limit.bins), *pins.values("dp")}
    return sorted({limit.microbatches(dp, multiple) for dp in sizes for multiple in multiples})


def search_space_of(
    name: str,
    *,
    step: Step,
    machine: Machine,
    ranks: int,
    spec: JobSpec,
    facts: SourceFacts,
    pins: Pins = FREE,
) -> SearchSpace:
    """Return the search space of a module on up to so many ranks, for the samples of a step.

    `spec` is the job that is validated. The topology of the step has the precision in which bytes count.
    """
    shapes: list[ParallelShape] = []
    illegal: list[Illegal] = []
    for shape in shapes_of(spec, name, min(machine.accelerator.per_node, ranks), pins):
        problem = shape_problem(spec, facts, name, shape)
        if problem is None:
            shapes.append(shape)
        else:
            illegal.append(Illegal(name, shape, problem))
    loads, limit = Loads.of(step, name), token_limit_of(step)
    levels = pins.among(name, "recompute", _recompute_levels(step.topology, name))
    costs = LayerCosts(
        spec=step.topology.spec,
        facts=step.topology.source,
        samples=len(loads),
        load=loads.mean,
        longest=step.samples[loads.largest],
        fullness=_fullness(step, name, loads.largest, limit) if limit else 1.0,
        machine=machine,
        name=name,
    )
    both = itertools.product(shapes, levels)
    shapes = [attrs.evolve(shape, recompute=level) for shape, level in both]
    reads_text = name in step.topology.graph.texts
    return SearchSpace(costs, tuple(shapes), tuple(illegal), pins, limit, reads_text)


def _fullness(step: Step, name: str, longest: int, limit: TokenLimit) -> float:
    """Return how many times as many positions as the longest sample a full bin has, for each sample that it has."""
    topology, alone = step.topology, step.sizes[longest].positions[name]
    full = fullest_cell(step).positions[name] / topology.tokens_per_cell
    bin_positions = full * topology.spec.batch.tokens_per_microbatch
    return bin_positions * limit.bins / (limit.samples * alone) if alone else 1.0


def _pipelined(microbatches: int, pp: int) -> float:
    """Return how many times as long as one microbatch through all stages a step takes at least, however it is split.

    Stage i begins when the stages before it have had the first microbatch. All stages are done at once where each has a
    part 1/m of what is left after those before it, and the last is done when nothing is left.

    >>> _pipelined(1, 4), _pipelined(4, 1), round(_pipelined(16, 16), 2)
    (1.0, 4.0, 1.55)
    """
    return 1 / (1 - (1 - 1 / microbatches) ** pp)


def enough(things: int, most: int) -> tuple[int, ...]:
    """Return the numbers of parts, up to `most`, that things can be split into so that fewer parts make one larger.

    >>> enough(8, 6)
    (1, 2, 3, 4)
    >>> enough(8, 8)
    (1, 2, 3, 4, 8)
    """
    counts = _part_counts(things)
    return counts[: bisect.bisect_right(counts, most)]


@functools.lru_cache(maxsize=1 << 10)
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a number, ascending."""
    return tuple(each for each in range(1, number + 1) if number % each == 0)


@functools.lru_cache(maxsize=1 << 12)
def _part_counts(things: int) -> tuple[int, ...]:
    return tuple(sorted({-(-things // each) for each in range(1, things + 1)}))


def tried(things: int, most: int) -> tuple[int, ...]:
    """Return those of `enough` that are tried: the divisors, and of numbers that differ by less than `STEP` the first.

    >>> len(enough(1000, 1000)), len(tried(1000, 1000)), tried(1000, 30)
    (63, 39, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 20, 22, 25, 28))
    """
    counts = _tried(things)
    return counts[: bisect.bisect_right(counts, most)]


@functools.lru_cache(maxsize=1 << 12)
def _tried(things: int) -> tuple[int, ...]:
    found: list[int] = []
    for count in _part_counts(things):
        if not found or count >= STEP * found[-1] or things % count == 0:
            found.append(count)
    return tuple(found)


def layers_of(module: ModuleSpec) -> int:
    """Return the layers that stages divide; a module of the user's own has one."""
    return 1 if isinstance(module.options, Mapping) else module.options.layers


def shapes_of(spec: JobSpec, name: str, ranks: int, pins: Pins) -> Iterator[ParallelShape]:
    """Yield the shapes to validate: tp and cp within so many ranks, ep by the divisors of the experts; or as pinned."""
    options, among = spec.modules[name].options, functools.partial(pins.among, name)
    most, experts = (1, 0) if isinstance(options, Mapping) else (min(ranks, SHARED_MOST), options.experts)
    parts = [ep for ep in range(1, experts + 1) if experts % ep == 0] or [1]
    tps, cps = among("tp", range(1, most + 1)), among("cp", [2**power for power in range(most.bit_length())])
    # What is pinned may be more than a node has.
    most = max(most, (pins.value(name, "tp") or 1) * (pins.value(name, "cp") or 1))
    both = itertools.product(tps, cps, among("ep", parts), among("expert_tp", (1,)))
    for tp, cp, ep, expert_tp in both:
        if tp * cp <= most:
            yield ParallelShape(tp, cp, ep, expert_tp, sequence_parallel=tp > 1)


def _recompute_levels(topology: Topology, name: str) -> tuple[str, ...]:
    """Return how much a module may recompute: as the job says, nothing, or all.

    The attention alone saves next to nothing: its scores are never kept.
    """
    module, own = topology.modules[name], topology.spec.modules[name].recompute
    if isinstance(module.model, Own) or not any(info.backward for info in module.stages):
        return (own,)
    return tuple(dict.fromkeys(("none", own, "full")))


def shape_problem(spec: JobSpec, facts: SourceFacts, name: str, shape: ParallelShape) -> Problem | None:
    """Return why a module cannot have a shape, whatever else is chosen; None if it can."""
    mine = (f"modules.{name}.grid", f"modules.{name}.options", "data.options.sequence")
    found = problems_of(_alone(spec, name, shape, pp=1), facts)
    return next((problem for problem in found if problem.where.startswith(mine)), None)


def _alone(spec: JobSpec, name: str, shape: ParallelShape, *, pp: int) -> JobSpec:
    """Return the job with one module in a shape at rank 0, with the smallest dp that its experts allow."""
    grid = attrs.evolve(shape.grid(dp=shape.dp_size, pp=pp), offset=0)
    far = GridSpec(offset=shape.ranks * shape.dp_size * pp)
    modules = {
        other: attrs.evolve(module, grid=far, microbatches=None, chunks=1, split=None)
        for other, module in spec.modules.items()
    }
    modules[name] = attrs.evolve(modules[name], grid=grid, recompute=shape.recompute)
    batch = BatchSpec(global_size=shape.dp_size, microbatches=1)
    return attrs.evolve(spec, modules=modules, batch=batch, world_size=None)


# -- what layers cost --------------------------------------------------------------------------------------


PrefixSums = tuple[float, ...]
"""Entry i is the sum over the layers before layer i. The ends of a module count to its first and last layers."""
Span = tuple[int, int]
"""Layers, from one to before another."""


def over(sums: PrefixSums, spans: Sequence[Span]) -> float:
    """Return the sum over spans of layers."""
    if len(spans) == 1:  # most often: the search prices hundreds of thousands of stages
        ((start, stop),) = spans
        return sums[stop] - sums[start]
    return sum(sums[stop] - sums[start] for start, stop in spans)


def _prefix_sums(values: Iterable[float]) -> PrefixSums:
    return tuple(itertools.accumulate(values, initial=0.0))


@attrs.frozen(eq=False)
class LayerSeconds:
    """Seconds of a rank by layers: of a microbatch forward and backward, and of the optimizer step."""

    forward: PrefixSums
    backward: PrefixSums
    update: PrefixSums

    @classmethod
    def of(cls, layers: Sequence[StageCosts]) -> "LayerSeconds":
        """Sum up the costs of layers."""
        return cls(
            _prefix_sums(layer.forward for layer in layers),
            _prefix_sums(layer.whole_backward for layer in layers),
            _prefix_sums(layer.update for layer in layers),
        )


@attrs.frozen(eq=False)
class LayerBytes:
    """What a rank of a shape holds by layers.

    Attributes:
        topology: of the job with the module in this shape, every layer a stage of its own.
        module: in that topology.
        load: of one sample.
        values: values of weights, in parts that no stage cuts.
        kept: bytes that are there all the time, without those of the optimizer.
        optimizer: bytes of the optimizer, before dp ranks share them.
        in_flight: bytes of a sample in flight.
        trained: values that train.
    """

    topology: Topology
    module: Module
    load: Load
    values: tuple[Values, ...]
    kept: PrefixSums
    optimizer: PrefixSums
    in_flight: PrefixSums
    trained: PrefixSums


@attrs.frozen(eq=False)
class LayerCosts:
    """What the layers of one module of a job cost in each shape; answers are kept.

    Of the `samples` of a step, `load` is the mean of one, and `longest` the one with most positions. With ragged
    samples the mean is no more than what is priced in the end, where ranks wait for the largest share. A microbatch in
    flight has `fullness` times the bytes of as many samples as large as the longest.
    """

    spec: JobSpec
    facts: SourceFacts
    samples: int
    load: Load
    longest: Sample
    machine: Machine
    name: str
    fullness: float = 1.0
    _held: dict[ParallelShape, LayerBytes] = attrs.field(
        factory=dict[ParallelShape, LayerBytes], init=False, repr=False
    )
    _seconds: dict[object, LayerSeconds] = attrs.field(
        factory=dict[object, LayerSeconds], init=False, repr=False
    )
    _terms: dict[str, tuple[Terms, ...]] = attrs.field(
        factory=dict[str, tuple[Terms, ...]], init=False, repr=False
    )
    _splits: dict[object, tuple[int, ...]] = attrs.field(
        factory=dict[object, tuple[int, ...]], init=False, repr=False
    )

    @property
    def layers(self) -> int:
        """Layers of the module."""
        return layers_of(self.spec.modules[self.name])

    def seconds(self, shape: ParallelShape, samples: float) -> LayerSeconds:
        """Return what each layer takes for so many samples."""
        if (shape, samples) not in self._seconds:
            held = self.held(shape)
            if shape.recompute not in self._terms:
                self._terms[shape.recompute] = module_terms(held.topology, held.module)
            parts = unit_costs(
                held.module,
                held.load * samples,
                self.machine,
                terms=self._terms[shape.recompute],
                values=held.values,
                recomputes=shape.recompute == "full",
                sharded=self.spec.optimizer.sharded,
            )
            self._seconds[shape, samples] = LayerSeconds.of(_by_layer(parts))
        return self._seconds[shape, samples]

    def split(self, shape: ParallelShape, stages: int) -> tuple[int, ...]:
        """Split the layers so that the slowest stage is fastest, for one sample in each microbatch of a dp rank."""
        if (shape, stages) not in self._splits:
            seconds = self.seconds(shape, 1)
            both = [f + b for f, b in zip(seconds.forward, seconds.backward, strict=True)]
            self._splits[shape, stages] = balanced([b - a for a, b in itertools.pairwise(both)], stages)
        return self._splits[shape, stages]

    def held(self, shape: ParallelShape) -> LayerBytes:
        """Return what a rank of a shape holds, layer by layer."""
        if shape not in self._held:
            self._held[shape] = self._held_in(shape)
        return self._held[shape]

    def _held_in(self, shape: ParallelShape) -> LayerBytes:
        plain = attrs.evolve(shape, recompute="none")
        if shape != plain:
            return self._recomputing(self.held(plain), shape)
        spec = _alone(self.spec, self.name, shape, pp=self.layers)
        topology = assemble(spec, self.facts)
        module = topology.modules[self.name]
        values = values_of_units(module)
        always = [kept(topology, module.grid.rank_at(pp=pp)) for pp in self._alike(topology, module)]
        trained = _by_layer([StageCosts(forward=each.trained) for each in values])
        return LayerBytes(
            topology=topology,
            module=module,
            load=Load() if isinstance(module.model, Own) else self.load,
            values=values,
            kept=_prefix_sums(each.bytes - each.optimizer for each in always),
            optimizer=_prefix_sums(each.optimizer for each in always),
            in_flight=self._in_flight(topology, module),
            trained=_prefix_sums(layer.forward for layer in trained),
        )

    def _recomputing(self, held: LayerBytes, shape: ParallelShape) -> LayerBytes:
        """Return what a rank holds if it recomputes more than `held` says: all else is the same."""
        spec = _alone(self.spec, self.name, shape, pp=self.layers)
        topology = attrs.evolve(held.topology, spec=spec)
        return attrs.evolve(held, topology=topology, in_flight=self._in_flight(topology, held.module))

    def _in_flight(self, topology: Topology, module: Module) -> PrefixSums:
        """Return the bytes of the longest sample in flight, by layers."""
        step = step_of(topology, (self.longest,) * topology.spec.batch.global_size)
        alike = self._alike(topology, module)
        saved = {
            layer: self.fullness * saved_bytes(step, module.stages[layer].stage, 0, 0) for layer in set(alike)
        }
        return _prefix_sums(saved[layer] for layer in alike)

    def _alike(self, topology: Topology, module: Module) -> tuple[int, ...]:
        """Return, for each layer as a stage of its own, the first one that is like it; the ends are like no other."""
        if isinstance(module.model, Own) or module.lora is not None:
            return tuple(range(self.layers))
        first = {0: 0, self.layers - 1: self.layers - 1}
        alike = alike_layers(module.model, trainable_of(topology, module.name))
        inner: dict[int, int] = {}
        return tuple(
            first.get(layer, inner.setdefault(like, layer) if layer not in first else layer)
            for layer, like in enumerate(alike)
        )


def _by_layer(parts: Sequence[StageCosts]) -> tuple[StageCosts, ...]:
    """Join what comes before the first layer and after the last with these."""
    if not parts:
        return (StageCosts(),)
    entry, *layers, leave = parts
    layers[0] = joined((entry, layers[0]))
    layers[-1] = joined((layers[-1], leave))
    return tuple(layers)
