"""Prices: what the layers of a module cost in a shape, layer by layer, in seconds and in bytes.

They come from the same table as the costs of a job (`pricing.units`), and from what `memory` says of a layer that
is a stage of its own. As sums from the first layer on, they price any stage by two of them.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import StageCosts
from mimogrid.core.job.models import Gpt, Own
from mimogrid.core.job.placement import balanced
from mimogrid.core.job.spec import BatchSpec, GridSpec, JobSpec, SourceFacts
from mimogrid.core.plan.configs import ParallelConfig, ParallelShape
from mimogrid.core.pricing.flops import Flops, Load, module_units, padded_load, real_load
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.pricing.machine import Machine
from mimogrid.core.pricing.units import Values, joined, unit_costs, values_of_units
from mimogrid.core.simulate.memory import saved_bytes
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Module, Topology


Sums = tuple[float, ...]
"""Sums from the first layer on: entry i is of the layers before i. The ends of a module count to its end layers."""


@attrs.frozen(eq=False)
class Seconds:
    """What the ranks of a shape take for a microbatch: forward, backward, and to update their weights."""

    forward: Sums
    backward: Sums
    update: Sums

    @classmethod
    def of(cls, layers: Sequence[StageCosts]) -> "Seconds":
        """Sum the costs of layers up."""
        return cls(
            _sums(layer.forward for layer in layers),
            _sums(layer.whole_backward for layer in layers),
            _sums(layer.update for layer in layers),
        )


@attrs.frozen(eq=False)
class Held:
    """What the ranks of a shape hold, by layers.

    Attributes:
        topology: of the job with the module in this shape, every layer a stage of its own.
        module: in that topology.
        load: of one sample.
        values: of weights, in parts that no stage cuts.
        kept: bytes that are there all the time, without those of the optimizer.
        optimizer: bytes of the optimizer, before dp ranks share them.
        flying: bytes for a sample in flight.
        trained: values that train.
    """

    topology: Topology
    module: Module
    load: Load
    values: tuple[Values, ...]
    kept: Sums
    optimizer: Sums
    flying: Sums
    trained: Sums


@attrs.frozen(eq=False)
class Prices:
    """What the layers of one module of a job cost, whose samples have these `lengths` in it; kept once found."""

    spec: JobSpec
    facts: SourceFacts
    lengths: tuple[int, ...]
    longest: Sample
    machine: Machine
    name: str
    _held: dict[ParallelShape, Held] = attrs.field(factory=dict[ParallelShape, Held], init=False, repr=False)
    _seconds: dict[object, Seconds] = attrs.field(factory=dict[object, Seconds], init=False, repr=False)
    _flops: dict[Load, tuple[Flops, ...]] = attrs.field(
        factory=dict[Load, tuple[Flops, ...]], init=False, repr=False
    )
    _splits: dict[object, tuple[int, ...]] = attrs.field(
        factory=dict[object, tuple[int, ...]], init=False, repr=False
    )

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return len(self.lengths)

    def samples_at_most(self, config: ParallelConfig) -> int:
        """Return how many samples of a microbatch the fullest dp rank has."""
        return -(-(self.samples // config.microbatches) // config.dp)

    def seconds(self, config: ParallelConfig) -> Seconds:
        """Return what each layer takes in a microbatch on the fullest dp rank."""
        return self._seconds_of(config.shape, self.samples_at_most(config))

    @property
    def layers(self) -> int:
        """Layers of the module; one of the user's own has one."""
        options = self.spec.modules[self.name].options
        return 1 if isinstance(options, Mapping) else options.layers

    def held(self, shape: ParallelShape) -> Held:
        """Return what the ranks of a shape hold, layer by layer."""
        if shape not in self._held:
            self._held[shape] = _held_of(self, shape)
        return self._held[shape]

    def _seconds_of(self, shape: ParallelShape, samples: int) -> Seconds:
        """Return what each layer takes for so many samples; loads that several shapes have in common count once."""
        held = self.held(shape)
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
            self._seconds[shape, samples] = Seconds.of(_by_layer(parts))
        return self._seconds[shape, samples]

    def split(self, shape: ParallelShape, stages: int) -> tuple[int, ...]:
        """Deal the layers so that the slowest stage is fastest, for one sample in each microbatch of a dp rank."""
        if (shape, stages) not in self._splits:
            seconds = self._seconds_of(shape, 1)
            both = [f + b for f, b in zip(seconds.forward, seconds.backward, strict=True)]
            self._splits[shape, stages] = balanced([b - a for a, b in itertools.pairwise(both)], stages)
        return self._splits[shape, stages]


def alone(spec: JobSpec, name: str, shape: ParallelShape, *, pp: int) -> JobSpec:
    """Return the job with one module in a shape at rank 0, with the smallest dp that its experts allow."""
    grid = attrs.evolve(shape.grid(dp=shape.dp_size, pp=pp), offset=0)
    far = GridSpec(offset=shape.ranks * shape.dp_size * pp)
    modules = {
        other: attrs.evolve(
            module, grid=grid if other == name else far, microbatches=None, chunks=1, split=None
        )
        for other, module in spec.modules.items()
    }
    batch = BatchSpec(global_size=shape.dp_size, microbatches=1)
    return attrs.evolve(spec, modules=modules, batch=batch, world_size=None)


def _held_of(prices: Prices, shape: ParallelShape) -> Held:
    """Ask what each layer keeps, every layer being a stage of its own."""
    spec = alone(prices.spec, prices.name, shape, pp=prices.layers)
    topology = assemble(spec, prices.facts)
    module = topology.modules[prices.name]
    step = step_of(topology, (prices.longest,) * spec.batch.global_size)
    values = values_of_units(module)
    always = [kept(topology, module.grid.rank_at(pp=pp)) for pp in range(prices.layers)]
    trained = _by_layer([StageCosts(forward=each.trained) for each in values])
    return Held(
        topology=topology,
        module=module,
        load=_load_of(module, prices.lengths, topology.sequence),
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
    """Sum values up, from nothing on."""
    return tuple(itertools.accumulate(values, initial=0.0))


def over(sums: Sums, spans: Iterable[tuple[int, int]]) -> float:
    """Return the sum over ranges of layers."""
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
