"""Refinement: which neighbours of a layout may be faster, best first.

The walk over candidates leaves some choices out: chunks and microbatches of modules beside the main one, places on
parts of another module's ranks, `expert_tp`. So the best layout that it finds is improved by single choices
(`neighbours`). Prices of whole neighbours would cost too much: most are ruled out by a lower bound of their time and of
their memory, which takes a few look-ups.

    time      as for a candidate: the slowest module with what feeds it, and the rank with most work of all its modules
    memory    what ranks keep all the time, and one microbatch in flight in each of their modules
"""

import collections
import itertools
import math
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.placement import place
from mimogrid.core.job.spec import JobSpec, ModuleSpec
from mimogrid.core.plan.candidates import chain_bound_s
from mimogrid.core.plan.configs import ParallelConfig, ParallelShape, PricedConfig
from mimogrid.core.plan.neighbours import neighbours
from mimogrid.core.plan.pins import FREE, Pins
from mimogrid.core.plan.search_space import SearchSpace


@attrs.frozen(eq=False, kw_only=True)
class Refinement:
    """Neighbours of layouts on so many ranks of `memory_bytes` each, by the search spaces of the modules of a graph.

    They have what is pinned.
    """

    spaces: Mapping[str, SearchSpace]
    graph: ModuleGraph
    ranks: int
    memory_bytes: float
    pins: Pins = FREE

    def promising(self, spec: JobSpec, enough_s: float) -> list[JobSpec]:
        """Return the neighbours that may take less than so many seconds, those with the least bound first.

        Of equal bounds the one is first whose modules take the least time for a microbatch: it fills its pipelines
        faster.
        """
        rated: list[tuple[float, float, int, JobSpec]] = []
        for i, each in enumerate(neighbours(spec)):
            priced = None if self.pins.broken_by(each) else self._priced(each)
            if priced is None:
                continue
            bound = self._bound_s(each, priced)
            if bound < enough_s and self._least_bytes(each, priced) <= self.memory_bytes:
                through = math.fsum(one.forward + one.backward for one in priced.values())
                rated.append((bound, through, i, _split(each, priced)))
        return [spec for *_, spec in sorted(rated, key=lambda each: each[:3])]

    def _priced(self, spec: JobSpec) -> dict[str, PricedConfig] | None:
        """Return the price of every module; None where a grid cannot be."""
        found: dict[str, PricedConfig] = {}
        for name, module in spec.modules.items():
            space = self.spaces[name]
            count = space.limit.microbatches_of(spec) if space.limit else spec.batch.microbatches
            config = _config_of(module, count)
            fits = config.pp * config.chunks <= space.costs.layers and space.has_samples(config)
            if not (fits and config.dp % config.shape.dp_size == 0 and space.allows(config.shape)):
                return None
            found[name] = space.priced(config)
        ends = (grid.offset + grid.size for grid in place(spec).values())
        return found if max(ends) <= self.ranks else None

    def _bound_s(self, spec: JobSpec, priced: Mapping[str, PricedConfig]) -> float:
        """Return seconds that no order of a layout beats."""
        work = {
            name: [each.config.microbatches * time.work + time.update for time in each.times]
            for name, each in priced.items()
        }
        return max(chain_bound_s(self.graph, priced), *_by_rank(spec, work))

    @staticmethod
    def _least_bytes(spec: JobSpec, priced: Mapping[str, PricedConfig]) -> float:
        """Return the bytes that the fullest rank needs at least."""
        held = {name: [rank.kept + rank.in_flight for rank in each.bytes] for name, each in priced.items()}
        return max(_by_rank(spec, held))


def _config_of(module: ModuleSpec, count: int) -> ParallelConfig:
    """Return the configuration of a module in a job of `count` microbatches."""
    grid = module.grid
    shape = ParallelShape(
        tp=grid.tp,
        cp=grid.cp,
        ep=grid.ep,
        expert_tp=grid.expert_tp,
        sequence_parallel=grid.sequence_parallel,
        recompute=module.recompute,
    )
    return ParallelConfig(shape, grid.pp, module.chunks, grid.dp, module.microbatches or count)


def _by_rank(spec: JobSpec, of_stages: Mapping[str, list[float]]) -> Iterator[float]:
    """Yield what the stages of a rank have together, for each run of ranks with the same stages."""
    changes: dict[int, float] = collections.defaultdict(float)
    for name, grid in place(spec).items():
        each = grid.size // grid.extent("pp")
        for stage, value in enumerate(of_stages[name]):
            changes[grid.offset + stage * each] += value
            changes[grid.offset + (stage + 1) * each] -= value
    yield from itertools.accumulate(changes[rank] for rank in sorted(changes))


def _split(spec: JobSpec, priced: Mapping[str, PricedConfig]) -> JobSpec:
    """Return a layout with the layers of all modules split as they are priced."""
    modules = {
        name: attrs.evolve(module, split=None if len(set(priced[name].split)) == 1 else priced[name].split)
        for name, module in spec.modules.items()
    }
    return attrs.evolve(spec, modules=modules)
