"""Roles: what each rank does, for any rank, on any machine.

A role follows from grids alone. It needs no process group, so a laptop can compute the role of any rank of a large job.
Here an encoder is on two dp ranks, ranks 0 and 1, and feeds a language model on two pipeline ranks, 2 and 3, with two
chunks each:

>>> from mimogrid.core.base.grid import Axis
>>> grids = {"vision": Grid((Axis("dp", 2),)), "language": Grid((Axis("tp", 1), Axis("pp", 2)), offset=2)}
>>> def role(rank):
...     return role_on(grids, rank, chunks={"language": 2}, language_modules=["language"])
>>> role(1).layout.value, list(role(1).modules), role(1).modules["vision"].position
('non_colocated', ['vision'], {'dp': 1})
>>> role(1).has_modality_modules, role(1).modality_module_names, role(1).has_language_module
(True, ['vision'], False)
>>> [str(stage) for stage in role(3).modules["language"].stages]
['language.1', 'language.1.1']
>>> role(3).group("language", "pp")
(2, 3)

A rank has the first or the last stage of a module, or it does not. It has no stage of a module that it does not host:

>>> [role(rank).is_first_stage("language") for rank in range(4)]
[False, False, True, False]
>>> [role(rank).is_last_stage("language") for rank in range(4)]
[False, False, False, True]

Grids may share all or some ranks. A rank in no grid also has a role: it idles.

>>> grids = {"vision": Grid((Axis("dp", 2),)), "language": Grid((Axis("pp", 2),), offset=1)}
>>> role(1).layout.value, {name: info.pp for name, info in role(1).modules.items()}
('colocated', {'vision': 0, 'language': 0})
>>> role(9).is_idle, list(role(9).modules), role(9).is_first_stage("vision")
(True, [], False)

A role in a job (`role_of`) also has the stages with their layers and parameters, and their links. Names (layout, stage
information, rank role and its predicates) are those of Megatron-LM's pull request 3211. There a rank asks its process
groups, hosts one module, and cannot idle.
"""

import enum
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import attrs

from mimogrid.core.base.grid import Grid
from mimogrid.core.topology.stages import Link, Stage, StageInfo, stage_at


class ModuleLayout(enum.Enum):
    """How the modules of a job share the ranks.

    UNIFIED: all modules are on all ranks under one grid. NON_COLOCATED: every module has ranks of its own.
    COLOCATED: some ranks host stages of several modules, under grids that differ.
    """

    UNIFIED = "unified"
    NON_COLOCATED = "non_colocated"
    COLOCATED = "colocated"


@attrs.frozen
class ModuleStageInfo:
    """A rank's place in one module.

    Attributes:
        module: the name of the module.
        pp: the rank's position along pp.
        is_first_stage, is_last_stage: whether the first or the last stage of the module is among the rank's stages.
        position: the rank's position on every axis: tp, cp, dp and pp, and for experts expert_tp, ep and expert_dp.
        stages: the rank's stages of the module, one for each of its chunks.
    """

    module: str
    pp: int
    is_first_stage: bool
    is_last_stage: bool
    position: Mapping[str, int]
    stages: tuple[Stage, ...] = ()


@attrs.frozen
class RankRole:
    """What a rank does: the modules that it hosts, its stages, its process groups and its pipeline neighbours.

    Attributes:
        rank: the rank.
        layout: how the modules share the ranks.
        modules: the rank's place in each module that it hosts, in file order; an idle rank hosts none.
        language_modules: the language models of the job, on whichever ranks.
        grids: for every module its grid, and then the view of its experts if it has any.
        stages: the stages of the rank, all chunks of all modules; only a job knows them (`role_of`).
        links_in: the links on which these stages receive activations.
        links_out: the links on which these stages send activations.
    """

    rank: int
    layout: ModuleLayout
    modules: Mapping[str, ModuleStageInfo]
    language_modules: tuple[str, ...]
    grids: Mapping[str, tuple[Grid, ...]] = attrs.field(factory=dict[str, tuple[Grid, ...]], repr=False)
    stages: tuple[StageInfo, ...] = attrs.field(default=(), repr=False)
    links_in: tuple[Link, ...] = ()
    links_out: tuple[Link, ...] = ()

    @property
    def mode(self) -> ModuleLayout:
        """The layout, under its name in Megatron-LM."""
        return self.layout

    def is_first_stage(self, module: str) -> bool:
        """Whether the rank has the first stage of the module; False where it does not host it."""
        return module in self.modules and self.modules[module].is_first_stage

    def is_last_stage(self, module: str) -> bool:
        """Whether the rank has the last stage of the module; False where it does not host it."""
        return module in self.modules and self.modules[module].is_last_stage

    @property
    def is_idle(self) -> bool:
        """Whether the rank is in no module's grid."""
        return not self.modules

    @property
    def has_language_module(self) -> bool:
        """Whether the rank hosts a language model."""
        return any(name in self.language_modules for name in self.modules)

    @property
    def has_modality_modules(self) -> bool:
        """Whether the rank hosts a module that is not a language model."""
        return bool(self.modality_module_names)

    @property
    def modality_module_names(self) -> list[str]:
        """The modules of this rank that are not language models, a list as in Megatron-LM."""
        return [name for name in self.modules if name not in self.language_modules]

    def group(self, module: str, axes: str | Iterable[str]) -> tuple[int, ...]:
        """Return the ranks of this rank's process group along axes of a module or of its experts.

        Raises KeyError for a module that the rank does not host, ValueError for an axis that its grids lack.
        """
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        grids = self.grids[module]
        has_all = (grid for grid in grids if {axis.name for axis in grid.axes}.issuperset(names))
        return next(has_all, grids[0]).group_of(self.rank, names)

    def of_chunk(self, chunk: int) -> "RankRole":
        """Return the role in one chunk: `is_first_stage` and `is_last_stage` are then about the stage of that chunk."""
        mine = {info.stage: info for info in self.stages if info.stage.chunk == chunk}
        return attrs.evolve(
            self,
            modules={
                stage.module: attrs.evolve(
                    self.modules[stage.module],
                    is_first_stage=info.first,
                    is_last_stage=info.last,
                    stages=(stage,),
                )
                for stage, info in mine.items()
            },
            stages=tuple(mine.values()),
            links_in=tuple(link for link in self.links_in if link.target in mine),
            links_out=tuple(link for link in self.links_out if link.source in mine),
        )


def layout_of(grids: Iterable[Grid]) -> ModuleLayout:
    """Return how the modules on these grids share ranks."""
    by_offset = sorted(grids, key=lambda grid: grid.offset)
    if all(grid == by_offset[0] for grid in by_offset):
        return ModuleLayout.UNIFIED
    overlap = any(b.offset < a.offset + a.size for a, b in itertools.pairwise(by_offset))
    return ModuleLayout.COLOCATED if overlap else ModuleLayout.NON_COLOCATED


def role_on(
    grids: Mapping[str, Grid],
    rank: int,
    *,
    chunks: Mapping[str, int] | None = None,
    experts: Mapping[str, Grid] | None = None,
    language_modules: Collection[str] = (),
) -> RankRole:
    """Return a rank's role on the grids of some modules.

    `chunks` is the number of chunks of each module, 1 if it is not named. `experts` has the view of a module's experts.
    The role has the names of its stages; the role in a job (`role_of`) also has their layers and links.
    """
    chunks, experts = chunks or {}, experts or {}
    views = {name: (grid, experts[name]) if name in experts else (grid,) for name, grid in grids.items()}
    return RankRole(
        rank=rank,
        layout=layout_of(grids.values()),
        modules={
            name: _place(name, of_module, rank, chunks.get(name, 1))
            for name, of_module in views.items()
            if rank in of_module[0]
        },
        language_modules=tuple(language_modules),
        grids=views,
    )


def _place(module: str, grids: tuple[Grid, ...], rank: int, chunks: int) -> ModuleStageInfo:
    position = {axis: i for grid in grids for axis, i in grid.position(rank).items()}
    pp = position.get("pp", 0)
    return ModuleStageInfo(
        module=module,
        pp=pp,
        is_first_stage=pp == 0,
        is_last_stage=pp == grids[0].extent("pp") - 1,
        position=position,
        stages=tuple(stage_at(module, pp, chunk) for chunk in range(chunks)),
    )


class HasRoles(Protocol):
    """What `role_of` needs of a topology."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        ...

    def role(self, rank: int) -> RankRole:
        """Return the role of a rank."""
        ...


def role_of(topology: HasRoles, rank: int) -> RankRole:
    """Return a rank's role in a job (`Topology.role`). Raises ValueError for a rank outside the world."""
    if not 0 <= rank < topology.world_size:
        raise ValueError(f"rank {rank} is not in the world 0..{topology.world_size - 1}")
    return topology.role(rank)
