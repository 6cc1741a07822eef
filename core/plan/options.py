"""Options: every way to lay one module out, with a price that no schedule can beat.

A *shape* is how the ranks of one lane and one stage share a module: tp, cp, ep. Which shapes are legal is asked
of `legality`, whose reasons are kept. A shape with a number of stages, chunks, lanes and microbatches is an *option*:

    stages    as many as make a difference: of L layers no stage needs more than L/p rounded up, so p is the least
              that allows it. Layers are dealt so that the slowest stage is as fast as it can be, forward and backward
              together; frozen layers are light, the head is heavy, and the deal says so
    lanes     likewise: of k samples in a microbatch no lane needs more than k/dp rounded up

The price of an option comes from the same table as the costs of a job (`pricing.unit_costs`), summed over the layers
of each stage. Alone on its ranks it takes at least, for each of these,

    head + microbatches * (forward + backward) + the longer of tail and reduction, + the slowest update

where head is the way of the first microbatch to the rank and tail the way of the last gradient from it. What a rank
keeps is priced likewise, from what `memory` says of a layer that is a stage of its own.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.costs import StageCosts
from mimogrid.core.errors import Problem
from mimogrid.core.flops import Flops, Load, lengths_of, module_units, padded_load, real_load
from mimogrid.core.footprint import kept
from mimogrid.core.layout import balanced
from mimogrid.core.legality import problems_of
from mimogrid.core.memory import saved_bytes
from mimogrid.core.models import Gpt, Own
from mimogrid.core.pricing import Machine, Values, joined, unit_costs, values_of_units
from mimogrid.core.samples import Sample
from mimogrid.core.spec import BatchSpec, GridSpec, JobSpec, SourceFacts
from mimogrid.core.steps import Step, step_of
from mimogrid.core.topology import Module, Topology, assemble


CHUNKS = (1, 2, 4)
"""Chunks per rank that are tried."""


@attrs.frozen
class Shape:
    """How the ranks of one lane and one stage share a module."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False

    def __str__(self) -> str:
        named = {"tp": self.tp, "cp": self.cp, "ep": self.ep}
        return " ".join(f"{axis}={size}" for axis, size in named.items() if size > 1) or "tp=1"


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
class Option:
    """One way to lay a module out; `ranks` and `forward`, `backward` (the way through all stages) price it."""

    module: str
    shape: Shape
    pp: int
    chunks: int
    dp: int
    microbatches: int
    split: tuple[int, ...]
    forward: float
    backward: float
    times: tuple[RankTime, ...]
    bytes: tuple[RankBytes, ...]

    @property
    def ranks(self) -> int:
        """How many ranks the module takes."""
        return self.shape.tp * self.shape.cp * self.dp * self.pp

    @property
    def depth(self) -> int:
        """Microbatches that are in flight above the module for it to be busy."""
        return max(rank.depth for rank in self.bytes)

    def bound(self, head: float = 0.0, tail: float = 0.0) -> float:
        """Return a time that no order beats, if the first microbatch arrives after `head`."""
        return max(
            head + rank.head + self.microbatches * rank.work + max(rank.tail + tail, rank.reduce)
            for rank in self.times
        ) + max(rank.update for rank in self.times)

    def bytes_at_most(self, below: int) -> tuple[float, ...]:
        """Return what each pipeline rank holds with 1F1B, where `below` microbatches fly behind the module."""
        return tuple(
            rank.kept + rank.flying * min(rank.depth + below * self.chunks, self.microbatches * self.chunks)
            for rank in self.bytes
        )

    @property
    def grid(self) -> GridSpec:
        """The grid, without an offset."""
        shape = self.shape
        return GridSpec(
            tp=shape.tp,
            cp=shape.cp,
            ep=shape.ep,
            dp=self.dp,
            pp=self.pp,
            sequence_parallel=shape.sequence_parallel,
        )

    def __str__(self) -> str:
        named = {"tp": self.shape.tp, "cp": self.shape.cp, "ep": self.shape.ep, "pp": self.pp, "dp": self.dp}
        sizes = " ".join(f"{axis}={size}" for axis, size in named.items() if size > 1) or "1 rank"
        return f"{self.module} {sizes}" + (f" chunks={self.chunks}" if self.chunks > 1 else "")


# -- the options of a module -------------------------------------------------------------------------------


@attrs.frozen
class Illegal:
    """A shape that a module cannot have, and why."""

    module: str
    shape: Shape
    problem: Problem


@attrs.frozen
class Way:
    """What distinguishes an option of a module from others."""

    shape: Shape
    pp: int
    chunks: int
    dp: int
    microbatches: int


@attrs.frozen(eq=False)
class Menu:
    """The options of one module of a job, whose samples have these `lengths` in it."""

    spec: JobSpec
    facts: SourceFacts
    lengths: tuple[int, ...]
    longest: Sample
    machine: Machine
    name: str
    shapes: tuple[Shape, ...]
    illegal: tuple[Illegal, ...]
    _held: dict[Shape, "_Held"] = attrs.field(factory=dict[Shape, "_Held"], init=False, repr=False)
    _seconds: dict[object, "_Seconds"] = attrs.field(factory=dict[object, "_Seconds"], init=False, repr=False)
    _flops: dict[Load, tuple[Flops, ...]] = attrs.field(
        factory=dict[Load, tuple[Flops, ...]], init=False, repr=False
    )
    _splits: dict[object, tuple[int, ...]] = attrs.field(
        factory=dict[object, tuple[int, ...]], init=False, repr=False
    )

    def ways(self, microbatches: int, ranks: int, chunks: Sequence[int] = (1,)) -> Iterator[Way]:
        """Yield every way to lay the module out on up to so many ranks, for so many microbatches."""
        samples = len(self.lengths) // microbatches
        for shape in self.shapes:
            for pp, chunk in itertools.product(enough(self.layers, self.layers), chunks):
                each = shape.tp * shape.cp * pp
                if chunk > 1 and (pp == 1 or pp * chunk > self.layers or microbatches % pp):
                    continue
                for dp in enough(samples, ranks // each):
                    if (shape.tp * shape.cp * dp) % shape.ep == 0:
                        yield Way(shape, pp, chunk, dp, microbatches)

    def least_s(self, way: Way) -> float:
        """Return what a way takes at least, from its work alone."""
        seconds = self._seconds_of(way.shape, way.dp, way.microbatches)
        return (seconds.forward[-1] + seconds.backward[-1]) * way.microbatches / way.pp

    def least_bytes(self, way: Way) -> float:
        """Return what its fullest rank keeps at least, from the whole alone."""
        held = self.held(way.shape)
        return (held.kept[-1] + (0 if self.spec.optimizer.sharded else held.optimizer[-1])) / way.pp

    def option(self, way: Way) -> Option:
        """Return a way, priced."""
        shape, pp, chunks = way.shape, way.pp, way.chunks
        seconds = self._seconds_of(shape, way.dp, way.microbatches)
        split = self._split(shape, pp * chunks)
        starts = tuple(itertools.accumulate(split, initial=0))
        mine = [[(starts[i], starts[i + 1]) for i in range(rank, pp * chunks, pp)] for rank in range(pp)]
        return Option(
            module=self.name,
            shape=shape,
            pp=pp,
            chunks=chunks,
            dp=way.dp,
            microbatches=way.microbatches,
            split=split,
            forward=seconds.forward[-1],
            backward=seconds.backward[-1],
            times=tuple(self._time(way, parts) for parts in mine),
            bytes=tuple(self._bytes(way, rank, parts) for rank, parts in enumerate(mine)),
        )

    def _time(self, way: Way, parts: Sequence[tuple[int, int]]) -> RankTime:
        """Return the seconds of a rank with these ranges of layers, its first one first."""
        shape, first, copies = way.shape, parts[0][0], way.shape.cp * way.dp
        seconds = self._seconds_of(shape, way.dp, way.microbatches)
        sums = _over(self.held(shape).trained, parts) * self.machine.state_bytes
        within = shape.tp * copies <= self.machine.accelerator.per_node
        return RankTime(
            head=seconds.forward[first],
            work=_over(seconds.forward, parts) + _over(seconds.backward, parts),
            tail=seconds.backward[first],
            reduce=self.machine.link(within=within).carry_s(2 * sums * (copies - 1) / copies),
            update=_over(seconds.update, parts),
        )

    def _bytes(self, way: Way, rank: int, parts: Sequence[tuple[int, int]]) -> RankBytes:
        """Return the bytes of the rank at a position along pp, with these ranges of layers."""
        held, pp, chunks = self.held(way.shape), way.pp, way.chunks
        samples = -(-(len(self.lengths) // way.microbatches) // way.dp)
        owners = way.shape.cp * way.dp if self.spec.optimizer.sharded else 1
        return RankBytes(
            kept=_over(held.kept, parts) + _over(held.optimizer, parts) / owners,
            flying=_over(held.flying, parts) * samples / chunks,
            depth=pp - rank if chunks == 1 else 2 * (pp - rank - 1) + (chunks - 1) * pp + 1,
        )

    @property
    def layers(self) -> int:
        """Layers of the module; one of the user's own has one."""
        options = self.spec.modules[self.name].options
        return 1 if isinstance(options, Mapping) else options.layers

    def held(self, shape: Shape) -> "_Held":
        """Return what the ranks of a shape hold, layer by layer."""
        if shape not in self._held:
            self._held[shape] = _held(self, shape)
        return self._held[shape]

    def _seconds_of(self, shape: Shape, dp: int, microbatches: int) -> "_Seconds":
        held = self.held(shape)
        samples = -(-(len(self.lengths) // microbatches) // dp)
        if (shape, samples) not in self._seconds:
            load = held.load * samples
            if load not in self._flops:
                self._flops[load] = module_units(held.topology, held.module, load)
            parts = unit_costs(
                held.module,
                load,
                self.machine,
                flops=self._flops[load],
                values=held.values,
                repeats=self.spec.modules[self.name].recompute == "full",
            )
            self._seconds[shape, samples] = _Seconds.of(_by_layer(parts))
        return self._seconds[shape, samples]

    def _split(self, shape: Shape, stages: int) -> tuple[int, ...]:
        """Deal the layers so that the slowest stage is fastest, for one sample in each microbatch of a lane."""
        if (shape, stages) not in self._splits:
            seconds = self._seconds_of(shape, len(self.lengths), 1)
            both = [f + b for f, b in zip(seconds.forward, seconds.backward, strict=True)]
            self._splits[shape, stages] = balanced([b - a for a, b in itertools.pairwise(both)], stages)
        return self._splits[shape, stages]


def menu_of(
    name: str, *, step: Step, machine: Machine, ranks: int, spec: JobSpec, facts: SourceFacts
) -> Menu:
    """Return the menu of a module on up to so many ranks, for the samples of a step.

    `spec` is the job whose legality is asked; the topology of the step says in which precision bytes count.
    """
    shapes: list[Shape] = []
    illegal: list[Illegal] = []
    for shape in _shapes(spec, name, min(machine.accelerator.per_node, ranks)):
        problem = _problem(spec, facts, name, shape)
        if problem is None:
            shapes.append(shape)
        else:
            illegal.append(Illegal(name, shape, problem))
    lengths = lengths_of(step, name)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return Menu(
        spec=step.topology.spec,
        facts=step.topology.source,
        lengths=lengths,
        longest=step.samples[longest],
        machine=machine,
        name=name,
        shapes=tuple(shapes),
        illegal=tuple(illegal),
    )


def enough(things: int, most: int) -> tuple[int, ...]:
    """Return into how many parts, up to `most`, it makes sense to deal things: fewer would make none larger.

    >>> enough(8, 6)
    (1, 2, 3, 4)
    >>> enough(8, 8)
    (1, 2, 3, 4, 8)
    """
    counts = {-(-things // each) for each in range(1, things + 1)}
    return tuple(sorted(count for count in counts if count <= most))


# -- shapes ------------------------------------------------------------------------------------------------


def _shapes(spec: JobSpec, name: str, ranks: int) -> Iterator[Shape]:
    """Yield the shapes that one might wish for: tp and cp within a node, experts over what they divide by."""
    options = spec.modules[name].options
    if isinstance(options, Mapping):
        yield Shape()
        return
    parts = [ep for ep in range(1, options.experts + 1) if options.experts % ep == 0] or [1]
    for tp, power, ep in itertools.product(range(1, ranks + 1), range(ranks.bit_length()), parts):
        if tp * 2**power <= ranks:
            yield Shape(tp, 2**power, ep, sequence_parallel=tp > 1)


def _problem(spec: JobSpec, facts: SourceFacts, name: str, shape: Shape) -> Problem | None:
    """Return why a module cannot have a shape, if it cannot, whatever else is chosen."""
    probe = _alone(spec, name, shape, pp=1)
    mine = (f"modules.{name}.grid", f"modules.{name}.options", "data.options.sequence")
    return next((p for p in problems_of(probe, facts) if p.where.startswith(mine)), None)


def _alone(spec: JobSpec, name: str, shape: Shape, *, pp: int) -> JobSpec:
    """Return the job with a module in a shape at rank 0, on as few lanes as its experts need, and the rest far off."""
    dp = shape.ep // math.gcd(shape.ep, shape.tp * shape.cp)
    grid = GridSpec(
        tp=shape.tp,
        cp=shape.cp,
        ep=shape.ep,
        dp=dp,
        pp=pp,
        offset=0,
        sequence_parallel=shape.sequence_parallel,
    )
    far = GridSpec(offset=shape.tp * shape.cp * dp * pp)
    modules = {
        other: attrs.evolve(
            module, grid=grid if other == name else far, microbatches=None, chunks=1, split=None
        )
        for other, module in spec.modules.items()
    }
    batch = BatchSpec(global_size=dp, microbatches=1)
    return attrs.evolve(spec, modules=modules, batch=batch, world_size=None)


# -- prices ------------------------------------------------------------------------------------------------


Sums = tuple[float, ...]
"""Sums from the first layer on: entry i is of the layers before i. The ends of a module count to its end layers."""


@attrs.frozen(eq=False)
class _Seconds:
    forward: Sums
    backward: Sums
    update: Sums

    @classmethod
    def of(cls, layers: Sequence[StageCosts]) -> "_Seconds":
        """Sum the costs of layers up."""
        return cls(
            _sums(layer.forward for layer in layers),
            _sums(layer.whole_backward for layer in layers),
            _sums(layer.update for layer in layers),
        )


@attrs.frozen(eq=False)
class _Held:
    """What the ranks of a shape hold: bytes, bytes for a sample in flight, and values that train."""

    topology: Topology
    module: Module
    load: Load
    values: tuple[Values, ...]
    kept: Sums
    optimizer: Sums
    flying: Sums
    trained: Sums


def _held(menu: Menu, shape: Shape) -> _Held:
    """Ask what each layer keeps, every layer being a stage of its own."""
    spec = _alone(menu.spec, menu.name, shape, pp=menu.layers)
    topology = assemble(spec, menu.facts)
    module = topology.modules[menu.name]
    step = step_of(topology, (menu.longest,) * spec.batch.global_size)
    values = values_of_units(module)
    always = [kept(topology, module.grid.rank_at(pp=pp)) for pp in range(menu.layers)]
    trained = _by_layer([StageCosts(forward=each.trained) for each in values])
    return _Held(
        topology=topology,
        module=module,
        load=_load_of(module, menu.lengths, topology.sequence),
        values=values,
        kept=_sums(each.bytes - each.optimizer for each in always),
        optimizer=_sums(each.optimizer for each in always),
        flying=_sums(saved_bytes(step, info.stage, 0, 0) for info in module.stages),
        trained=_sums(layer.forward for layer in trained),
    )


def _by_layer(parts: Sequence[StageCosts]) -> tuple[StageCosts, ...]:
    """Join what comes before the first layer and after the last with these."""
    if not parts:
        return (StageCosts(),)
    entry, *layers, leave = parts
    layers[0] = joined((entry, layers[0]))
    layers[-1] = joined((layers[-1], leave))
    return tuple(layers)


def _sums(values: Iterable[float]) -> Sums:
    return tuple(itertools.accumulate(values, initial=0.0))


def _over(sums: Sums, spans: Iterable[tuple[int, int]]) -> float:
    return sum(sums[stop] - sums[start] for start, stop in spans)


def _load_of(module: Module, lengths: tuple[int, ...], sequence: int) -> Load:
    """Return the load of one sample: their mean, not padded but in a language model, which pads to `sequence`.

    With ragged samples it is no more than what is priced in the end, where others wait for the longest.
    """
    if isinstance(module.model, Own):
        return Load()
    if isinstance(module.model, Gpt):
        return attrs.evolve(padded_load(module, (1,), sequence), rows=sum(lengths) / len(lengths))
    return real_load(module.model, lengths) * (1 / len(lengths))
