"""The topology: a job parsed into modules on grids, edges, stages and links.

It comes from `parse`, which has checked the job, so nothing that uses a topology checks it again.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import attrs

from mimogrid.core.base.experts import block_of, ep_dp_ranks_of
from mimogrid.core.base.grid import Grid
from mimogrid.core.base.row import row_length
from mimogrid.core.base.samples import dp_ranks_over, dp_samples
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.lora import Lora
from mimogrid.core.job.models import BuiltIn, Gpt, Own, Parameter
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.job.tokens import tokens_per_cell
from mimogrid.core.topology.roles import RankRole, role_on
from mimogrid.core.topology.stages import UNKNOWN, Edge, Link, Stage, StageInfo


__all__ = ["UNKNOWN", "Edge", "Link", "Module", "Stage", "StageInfo", "Topology"]

COUNTS_KEPT = 32
"""For how many numbers of microbatches of a step what follows from them is kept, where the number varies."""


@attrs.frozen
class Module:
    """A module on its grid.

    `experts` is the view of the grid under the axes of the experts; None: there are none. `inputs` and `outputs` are
    the edges from and to other modules. The row of a rank is a multiple of `multiple` long. A module is `padded` if a
    host program's network computes it as blocks of samples that are padded to one length. `lora` says what is
    beside its linear layers.
    """

    name: str
    model: BuiltIn | Own
    grid: Grid
    experts: Grid | None
    sequence_parallel: bool
    microbatches: int
    loss_weight: float
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    stages: tuple[StageInfo, ...]
    multiple: int = 1
    padded: bool = False
    lora: Lora | None = None
    _tp_cp_ranks: dict[tuple[int, int], tuple[int, ...]] = attrs.field(
        factory=dict[tuple[int, int], tuple[int, ...]], init=False, repr=False, eq=False
    )

    @property
    def dp_size(self) -> int:
        """The number of dp ranks, each of which works on its own samples of a microbatch."""
        return self.grid.extent("dp")

    @property
    def chunks(self) -> int:
        """How many stages of the module each of its ranks has."""
        return len(self.stages) // self.grid.extent("pp")

    @property
    def cp(self) -> int:
        """The number of ranks over which the positions of a sample are split."""
        return self.grid.extent("cp")

    def row_shape(self, positions: int) -> tuple[int, int]:
        """Return (positions, 1), the shape of a row of so many positions over all cp ranks, rounded up."""
        return self.cp * row_length(positions, parts=self.cp, multiple=self.multiple), 1

    def padded_shape(self, lengths: Sequence[int], sequence: int) -> tuple[int, int]:
        """Return (positions, samples) of the block that a padded module computes for samples of these lengths.

        A language model pads every sample to the job's `sequence`. Other modules pad to the longest sample, and
        leave out samples without rows. Under cp the positions are a multiple of two chunks for each rank, and with
        sequence parallelism each chunk is a multiple of tp.
        """
        if isinstance(self.model, Gpt):
            return sequence, len(lengths)
        present = [length for length in lengths if length]
        tp = self.grid.extent("tp") if self.sequence_parallel else 1
        parts = 2 * self.cp * tp if self.cp > 1 else 1
        return -(-max(present, default=0) // parts) * parts, len(present)

    def ep_dp_ranks(self, dp_rank: int) -> tuple[int, ...]:
        """Return the dp ranks over which the experts of a dp rank are spread, and which compute together with it."""
        return (dp_rank,) if self.experts is None else ep_dp_ranks_of(self.grid, self.experts)[dp_rank]

    def is_partial(self, parameter: Parameter) -> bool:
        """Whether the gradient of a parameter on one tp rank is a partial sum."""
        always = parameter.routes or parameter.over_heads
        return always or (parameter.partial and self.sequence_parallel)

    @property
    def aux_loss(self) -> float:
        """The weight of the auxiliary loss, which spreads tokens over experts; 0 for a frozen module."""
        trains = any(info.trainable for info in self.stages)
        return 0.0 if isinstance(self.model, Own) or not self.experts or not trains else self.model.aux_loss

    def position(self, rank: int) -> dict[str, int]:
        """Return the position of a rank on every axis, those of the experts included."""
        return self.grid.position(rank) | (self.experts.position(rank) if self.experts else {})

    def ep_rank_of(self, rank: int) -> int:
        """Return the position of a rank along ep; 0 without experts. Raises ValueError for a rank outside the grid."""
        return (self.experts or self.grid).position_along("ep", rank)

    def experts_at(self, ep: int) -> range:
        """Return the experts of each layer that a position along ep holds."""
        if self.experts is None or isinstance(self.model, Own):
            return range(0)
        return block_of(self.model.experts, self.experts.extent("ep"), ep)

    def held(self, info: StageInfo, ep: int) -> tuple[Parameter, ...]:
        """Return the parameters of a stage that a position along ep holds, in whole or in part."""
        experts = self.experts_at(ep)
        return tuple(p for p in info.parameters if p.expert is None or p.expert in experts)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter, projectors included."""
        return tuple(p for info in self.stages for p in info.parameters)

    def tp_cp_ranks(self, stage: Stage, dp_rank: int) -> tuple[int, ...]:
        """Return the ranks along tp and cp of one dp rank of a stage, ascending."""
        key = stage.pp, dp_rank
        if key not in self._tp_cp_ranks:
            self._tp_cp_ranks[key] = tuple(
                sorted(
                    self.grid.rank_at(tp=tp, cp=cp, dp=dp_rank, pp=stage.pp)
                    for cp in range(self.grid.extent("cp"))
                    for tp in range(self.grid.extent("tp"))
                )
            )
        return self._tp_cp_ranks[key]

    def dp_rank_of(self, rank: int) -> int:
        """Return the dp rank of a rank. Raises ValueError for a rank outside the module's grid."""
        return self.grid.position_along("dp", rank)

    def samples(self, dp_rank: int, microbatch: int, total: int) -> range:
        """Return which of the `total` samples of a step a dp rank has in a microbatch of this module."""
        return dp_samples(
            dp_rank=dp_rank,
            dp_size=self.dp_size,
            microbatch=microbatch,
            microbatches=self.microbatches,
            total=total,
        )

    def dp_ranks_over(self, samples: range, microbatch: int, total: int) -> range:
        """Return the dp ranks that have any of these samples in a microbatch of this module."""
        return dp_ranks_over(
            samples,
            dp_size=self.dp_size,
            microbatch=microbatch,
            microbatches=self.microbatches,
            total=total,
        )


@attrs.frozen(eq=False)
class Topology:
    """A parsed job. A topology equals only itself.

    Where microbatches have a limit of tokens, that of the job has as many microbatches as a step may have at most. Each
    step lies over one with as many as it has, which knows that `of_job`.
    """

    spec: JobSpec
    source: SourceFacts
    graph: ModuleGraph
    modules: Mapping[str, Module]
    world_size: int
    of_job: "Topology | None" = attrs.field(default=None, repr=False)

    @property
    def sequence(self) -> int:
        """The most positions of a language sequence, rows and text; 0 in a job without text."""
        return self.source.sequence or 0

    def with_padded(self, names: Collection[str]) -> "Topology":
        """Return a topology in which these modules are padded."""
        modules = {n: attrs.evolve(m, padded=n in names) for n, m in self.modules.items()}
        return Topology(self.spec, self.source, self.graph, modules, self.world_size)

    def with_microbatches(self, count: int) -> "Topology":
        """Return the topology of a step with so many microbatches of every module."""
        return (self.of_job or self)._counted(count)

    @functools.cached_property
    def _counted(self) -> "Callable[[int], Topology]":
        return functools.lru_cache(COUNTS_KEPT)(self._with_count)

    def _with_count(self, count: int) -> "Topology":
        spec = attrs.evolve(self.spec, batch=attrs.evolve(self.spec.batch, microbatches=count))
        modules = {n: attrs.evolve(m, microbatches=count) for n, m in self.modules.items()}
        return Topology(spec, self.source, self.graph, modules, self.world_size, of_job=self)

    @property
    def most_microbatches(self) -> int:
        """The number of microbatches of the module with most."""
        return max(module.microbatches for module in self.modules.values())

    @functools.cached_property
    def tokens_per_cell(self) -> int:
        """The most tokens of a cell (`job.tokens`); 0: the number of microbatches is given."""
        return tokens_per_cell(self.spec)

    @functools.cached_property
    def samples_per_microbatch(self) -> Mapping[str, int]:
        """The number of samples in a microbatch of each module: the mean, and at least 1."""
        total = self.spec.batch.global_size
        return {name: max(total // module.microbatches, 1) for name, module in self.modules.items()}

    @property
    def balances(self) -> bool:
        """Whether the samples of a step are assigned by cost. A padded network computes as much for every sample."""
        padded = any(module.padded for module in self.modules.values())
        return self.spec.batch.balance == "cost" and not padded

    @functools.cached_property
    def cell_grid(self) -> tuple[int, int]:
        """The microbatches and the lanes into which a balanced step is cut, microbatch by microbatch (`step.cells`)."""
        modules = self.modules.values()
        return math.lcm(*(m.microbatches for m in modules)), math.lcm(*(m.dp_size for m in modules))

    @property
    def cut_into(self) -> tuple[int, ...]:
        """Into how many equal parts the steps of the job may be cut: samples, or cells.

        Held-out samples, and those of a host program, stay in their order, also where those of training are assigned.
        """
        samples, cells = self.spec.batch.global_size, math.prod(self.cell_grid)
        if self.tokens_per_cell:
            return (cells,)
        return (samples, cells) if self.balances else (samples,)

    @functools.cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in file order of the source modules."""
        return tuple(edge for module in self.modules.values() for edge in module.outputs)

    @functools.cached_property
    def stages(self) -> Mapping[Stage, StageInfo]:
        """Every stage, by module in file order."""
        return {info.stage: info for module in self.modules.values() for info in module.stages}

    @functools.cached_property
    def links(self) -> tuple[Link, ...]:
        """Every link: the pipeline links of each module, then the bridges."""
        pipeline_links = (
            Link(a.stage, b.stage, None)
            for module in self.modules.values()
            for a, b in zip(module.stages, module.stages[1:], strict=False)
        )
        bridges = (
            Link(self.modules[e.source].stages[-1].stage, self.modules[e.target].stages[0].stage, e)
            for e in self.edges
        )
        return (*pipeline_links, *bridges)

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that host a module, ascending; other ranks idle."""
        return tuple(sorted({r for m in self.modules.values() for r in m.grid.ranks}))

    @functools.cached_property
    def ranks_by_stages(self) -> Mapping[tuple[Stage, ...], tuple[int, ...]]:
        """The ranks that host the same stages, ascending, by these stages; in order of their first ranks."""
        hosting: dict[int, list[tuple[str, int]]] = {}
        for name, module in self.modules.items():
            for rank in module.grid.ranks:
                hosting.setdefault(rank, []).append((name, module.grid.position_along("pp", rank)))
        ranks: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for rank in self.ranks:
            ranks.setdefault(tuple(hosting[rank]), []).append(rank)
        chunks: dict[tuple[str, int], list[Stage]] = {}
        for stage in self.stages:
            chunks.setdefault((stage.module, stage.pp), []).append(stage)
        return {
            tuple(stage for place in places for stage in chunks[place]): tuple(found)
            for places, found in ranks.items()
        }

    def links_from(self, stage: Stage) -> tuple[Link, ...]:
        """Return the links on which a stage sends activations."""
        return self._links_by_source.get(stage, ())

    def links_into(self, stage: Stage) -> tuple[Link, ...]:
        """Return the links on which a stage receives activations."""
        return self._links_by_target.get(stage, ())

    @functools.cached_property
    def link_between(self) -> Mapping[tuple[Stage, Stage], Link]:
        """Every link by its (source, target)."""
        return {(link.source, link.target): link for link in self.links}

    @functools.cached_property
    def _links_by_source(self) -> Mapping[Stage, tuple[Link, ...]]:
        return {s: tuple(link for link in self.links if link.source == s) for s in self.stages}

    @functools.cached_property
    def _links_by_target(self) -> Mapping[Stage, tuple[Link, ...]]:
        return {s: tuple(link for link in self.links if link.target == s) for s in self.stages}

    @functools.cached_property
    def language_modules(self) -> tuple[str, ...]:
        """The language models: built-in ones, and custom modules with a loss on text.

        The plan does not know what a custom module reads. It counts one that has a loss, unless the source says that
        its samples have no text.
        """
        has_text = self.source.length != 0
        return tuple(
            name
            for name, module in self.modules.items()
            if module.model.reads_text
            or (isinstance(module.model, Own) and module.model.has_loss and has_text)
        )

    def role(self, rank: int) -> RankRole:
        """Return a rank's role; a rank outside the world idles."""
        if rank not in self._roles:
            self._roles[rank] = self._role(rank)
        return self._roles[rank]

    @functools.cached_property
    def _roles(self) -> dict[int, RankRole]:
        """The roles that were asked for. A world may have 10,000 ranks."""
        return {}

    def _role(self, rank: int) -> RankRole:
        role = self._role_on_grids(rank)
        stages = [stage for info in role.modules.values() for stage in info.stages]
        return attrs.evolve(
            role,
            stages=tuple(self.stages[stage] for stage in stages),
            links_in=tuple(link for stage in stages for link in self.links_into(stage)),
            links_out=tuple(link for stage in stages for link in self.links_from(stage)),
        )

    @functools.cached_property
    def _role_on_grids(self) -> functools.partial[RankRole]:
        return functools.partial(
            role_on,
            {name: module.grid for name, module in self.modules.items()},
            chunks={name: module.chunks for name, module in self.modules.items()},
            experts={name: module.experts for name, module in self.modules.items() if module.experts},
            language_modules=self.language_modules,
        )
