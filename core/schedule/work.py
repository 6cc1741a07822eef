"""Work: the compute actions of a step, numbered, with the actions that each of them needs.

The scheduler uses numbers, because it touches each of many actions several times. The actions of a stage have
consecutive numbers, kind by kind, microbatch by microbatch.

    forward        needs the forwards of the stages that feed it
    backward       needs its forward, and the backwards of the stages that it feeds
    I and W        are the halves of a split backward: I, the gradients of the inputs, needs what a backward needs,
                   and the stages upstream need it; W, the gradients of the weights, needs I

A *pipeline rank* is one pp position of a module, with all ranks there and the virtual stages that they run.

A stage is split only if it trains linear layers of a built-in model: their weight gradients can be put off. A user's
own module, and a frozen stage that only passes gradients on, have one backward.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.base.samples import overlapping
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.models import Own
from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.topology.topology import Link, Stage, Topology


VirtualStages = tuple[Stage, ...]
"""The stages of one module on the same ranks, first to last: one, or one for each chunk."""


@attrs.frozen(eq=False)
class Sequences:
    """The numbers of a pipeline rank's forwards, backwards (complete ones or I) and weight gradients, each in order."""

    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    weights: tuple[int, ...]


@attrs.frozen(eq=False)
class Work:
    """The compute actions of a step.

    Attributes:
        topology: The job's.
        backward: The stages that run a backward: something in them or upstream trains.
        gradients: The links on which gradients flow back.
        split: The stages of `backward` that run it in two halves.
    """

    topology: Topology
    backward: frozenset[Stage]
    gradients: frozenset[Link]
    split: frozenset[Stage]

    @functools.cached_property
    def actions(self) -> tuple[Compute, ...]:
        """Every action, by its number."""
        return tuple(
            Compute(kind, stage, k)
            for stage in self.topology.stages
            for kind in self.kinds_of(stage)
            for k in range(self.count(stage))
        )

    @functools.cached_property
    def first(self) -> Mapping[tuple[Stage, Kind], int]:
        """The number of a stage's action of a kind for microbatch 0; microbatch k has k more."""
        return {(a.stage, a.kind): i for i, a in enumerate(self.actions) if a.microbatch == 0}

    @functools.cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """For every action, the actions whose results it needs."""
        return tuple(tuple(self._needs(action)) for action in self.actions)

    @functools.cached_property
    def pp_ranks(self) -> tuple[VirtualStages, ...]:
        """The pipeline ranks by their virtual stages, modules in file order."""
        found: dict[tuple[str, int], list[Stage]] = {}
        for stage in self.topology.stages:
            found.setdefault((stage.module, stage.pp), []).append(stage)
        return tuple(map(tuple, found.values()))

    @functools.cached_property
    def sequences(self) -> tuple[Sequences, ...]:
        """The actions of each of `pp_ranks`."""
        return tuple(map(self._sequences, self.pp_ranks))

    @functools.cached_property
    def conflicts(self) -> tuple[tuple[int, ...], ...]:
        """For each of `pp_ranks`, those that share a rank with it, itself included. They run one at a time."""
        modules = self.topology.modules
        ranks = [
            frozenset(
                rank
                for dp_rank in range(modules[stages[0].module].dp_size)
                for rank in modules[stages[0].module].tp_cp_ranks(stages[0], dp_rank)
            )
            for stages in self.pp_ranks
        ]
        return tuple(
            tuple(i for i, there in enumerate(ranks) if not here.isdisjoint(there)) for here in ranks
        )

    @functools.cached_property
    def priority(self) -> tuple[int, ...]:
        """The priority of every action among those that can start: the lowest number starts first."""
        actions, topology = self.actions, self.topology
        counts = {name: module.microbatches for name, module in topology.modules.items()}
        common = math.lcm(*counts.values())
        depth = {stage: info.depth for stage, info in topology.stages.items()}
        keys = [
            (
                action.kind is Kind.WEIGHT_GRADIENT,
                action.microbatch * (common // counts[action.stage.module]),
                depth[action.stage],
                action.stage.module,
                action.stage.pp,
            )
            for action in actions
        ]
        places = [0] * len(actions)
        for place, i in enumerate(sorted(range(len(actions)), key=keys.__getitem__)):
            places[i] = place
        return tuple(places)

    @functools.cached_property
    def pp_rank_of(self) -> tuple[int, ...]:
        """The index of every action's pipeline rank in `pp_ranks`."""
        pp_rank = {stage: i for i, stages in enumerate(self.pp_ranks) for stage in stages}
        return tuple(pp_rank[action.stage] for action in self.actions)

    def kinds_of(self, stage: Stage) -> tuple[Kind, ...]:
        """Return the kinds of actions that a stage runs for each microbatch, in order."""
        if stage in self.split:
            return (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
        return (Kind.FORWARD, Kind.BACKWARD) if stage in self.backward else (Kind.FORWARD,)

    def count(self, stage: Stage) -> int:
        """Return the number of microbatches of a stage in a step."""
        return self.topology.modules[stage.module].microbatches

    def number(self, kind: Kind, stage: Stage, microbatch: int) -> int:
        """Return the number of an action."""
        return self.first[stage, kind] + microbatch

    def goes_back(self, stage: Stage) -> Kind:
        """Return the kind of action that gives a stage's gradients of inputs."""
        return Kind.INPUT_GRADIENT if stage in self.split else Kind.BACKWARD

    @functools.cached_property
    def holds(self) -> tuple[int, ...]:
        """For each action, its change of the number of microbatches that the stage has in flight: 1, 0 or -1."""
        changes: dict[tuple[Stage, Kind], int] = {}
        for stage in self.backward:
            kinds = self.kinds_of(stage)
            changes |= {(stage, kinds[0]): 1, (stage, kinds[-1]): -1}
        return tuple(changes.get((action.stage, action.kind), 0) for action in self.actions)

    def in_flight(self, order: Iterable[int]) -> dict[Stage, int]:
        """Return the most microbatches that each stage with a backward has in flight in some order of actions."""
        holds, stage_of, stages = self.holds, self._stage_of, tuple(self.topology.stages)
        held, most = [0] * len(stages), [-1] * len(stages)
        for action in order:
            change = holds[action]
            if change:
                stage = stage_of[action]
                held[stage] += change
                most[stage] = max(most[stage], held[stage])
        return {stage: count for stage, count in zip(stages, most, strict=True) if count >= 0}

    @functools.cached_property
    def _stage_of(self) -> tuple[int, ...]:
        """For every action, the place of its stage among those of the topology."""
        stages = enumerate(self.topology.stages)
        return tuple(i for i, stage in stages for _ in self.kinds_of(stage) for _ in range(self.count(stage)))

    def read_by(self, stage: Stage, microbatch: int) -> Iterator[int]:
        """Yield the forwards that read the output of a stage's forward."""
        for link in self.topology.links_from(stage):
            for k in self._overlapping(stage, microbatch, link.target):
                yield self.number(Kind.FORWARD, link.target, k)

    def _sequences(self, stages: VirtualStages) -> Sequences:
        trained = [stage for stage in reversed(stages) if stage in self.backward]
        split = [stage for stage in trained if stage in self.split]
        return Sequences(
            forwards=tuple(self._in_groups([(stage, Kind.FORWARD) for stage in stages])),
            backwards=tuple(self._in_groups([(stage, self.goes_back(stage)) for stage in trained])),
            weights=tuple(self._in_groups([(stage, Kind.WEIGHT_GRADIENT) for stage in split])),
        )

    def _in_groups(self, chunks: list[tuple[Stage, Kind]]) -> Iterator[int]:
        """Yield one action per chunk and microbatch: a group of microbatches through all chunks, then the next group.

        With several chunks a group has as many microbatches as the pipeline has ranks, else all of them.
        """
        if not chunks:
            return
        module = self.topology.modules[chunks[0][0].module]
        count, pipeline = module.microbatches, module.grid.extent("pp")
        group = pipeline if len(module.stages) > pipeline else count
        for first in range(0, count, group):
            for stage, kind in chunks:
                for k in range(first, min(first + group, count)):
                    yield self.number(kind, stage, k)

    def _needs(self, action: Compute) -> Iterator[int]:
        stage, k = action.stage, action.microbatch
        match action.kind:
            case Kind.FORWARD:
                for link in self.topology.links_into(stage):
                    for j in self._overlapping(stage, k, link.source):
                        yield self.number(Kind.FORWARD, link.source, j)
            case Kind.WEIGHT_GRADIENT:
                yield self.number(Kind.INPUT_GRADIENT, stage, k)
            case _:
                yield self.number(Kind.FORWARD, stage, k)
                for link in self.topology.links_from(stage):
                    if link in self.gradients:
                        for j in self._overlapping(stage, k, link.target):
                            yield self.number(self.goes_back(link.target), link.target, j)

    def _overlapping(self, stage: Stage, microbatch: int, other: Stage) -> range:
        return overlapping(microbatch, self.count(stage), self.count(other))


def work_of(topology: Topology, *, training: bool, splits: bool) -> Work:
    """Return the work of a step; with `splits`, backwards are split where stages and costs allow it."""
    stages = topology.stages
    backward = frozenset(s for s, info in stages.items() if training and info.backward)
    gradients = frozenset(
        link for link in topology.links if training and stages[link.source].trains_up_to(link)
    )
    split = frozenset(s for s in backward if splits and may_split(topology, s))
    return Work(topology, backward, gradients, split)


def may_split(topology: Topology, stage: Stage) -> bool:
    """Whether a backward may be split: the stage trains linear layers, and the job's costs know its two halves."""
    costs = topology.spec.schedule.costs
    unknown = costs is not None and str(stage) in costs.stages and not costs.of(stage).splits
    own = isinstance(topology.modules[stage.module].model, Own)
    return bool(topology.stages[stage].trainable) and not own and not unknown


def unit_seconds(work: Work) -> tuple[float, ...]:
    """Return unit times for each action: one per sample for a forward and for each half of a backward."""
    size = work.topology.samples_per_microbatch
    return tuple(size[a.stage.module] * (2.0 if a.kind is Kind.BACKWARD else 1.0) for a in work.actions)


def seconds_of(action: Compute, costs: Costs) -> float:
    """Return the seconds of a compute action, of a part of a backward those of all of it.

    If costs do not know the halves of a backward, I takes all of it.
    """
    of_stage = costs.of(action.stage)
    match action.kind:
        case Kind.FORWARD:
            return of_stage.forward
        case Kind.BACKWARD | Kind.BACKWARD_PART:
            return of_stage.whole_backward
        case Kind.INPUT_GRADIENT:
            return (of_stage.input_gradient or 0.0) if of_stage.splits else of_stage.whole_backward
        case Kind.WEIGHT_GRADIENT:
            return of_stage.weight_gradient or 0.0
