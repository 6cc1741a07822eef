"""Roles: what a rank is, for any rank, asked on any machine.

A role names the modules that a rank hosts and where it stands in each. Nobody passes roles around: they
follow from the topology, so a rank of a thousand can be asked about on a laptop, without a process group.

A vision encoder on two dp ranks, ranks 0 and 1, in front of a language model of two stages, ranks 2 and 3:

>>> from mimogrid.core.job.models import Gpt, Vit
>>> from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
>>> from mimogrid.core.topology.parse import parse
>>> def planned(vision, language, **job):
...     vit, gpt = Vit(layers=2, hidden=8, heads=2), Gpt(layers=2, hidden=8, heads=2, vocab=16)
...     modules = {
...         "vision": ModuleSpec(model="vit", options=vit, feeds=("language",), grid=vision),
...         "language": ModuleSpec(model="gpt", options=gpt, grid=language),
...     }
...     data, batch = DataSpec(source="none"), BatchSpec(global_size=4)
...     spec = JobSpec(modules=modules, data=data, batch=batch, **job)
...     return parse(spec, SourceFacts(sequence=16, features={"vision": 4}))
>>> topology = planned(GridSpec(dp=2), GridSpec(pp=2))
>>> role = role_of(topology, rank=1)
>>> role.layout.value, list(role.modules), role.modules["vision"].position
('non_colocated', ['vision'], {'tp': 0, 'cp': 0, 'dp': 1, 'pp': 0})
>>> role.has_modality_modules, role.modality_module_names, role.has_language_module
(True, ('vision',), False)

Both ends of the language model are asked about from anywhere, and a rank is in no stage of what it has not:

>>> [role_of(topology, rank).is_first_stage("language") for rank in range(4)]
[False, False, True, False]
>>> [role_of(topology, rank).is_last_stage("language") for rank in range(4)]
[False, False, False, True]

Grids may share ranks, all or some. Here rank 1 has an encoder dp rank and the language model's first stage:

>>> topology = planned(GridSpec(dp=2), GridSpec(pp=2, offset=1))
>>> role = role_of(topology, rank=1)
>>> role.layout.value, {name: info.pp for name, info in role.modules.items()}
('colocated', {'vision': 0, 'language': 0})
>>> role_of(planned(GridSpec(tp=2), GridSpec(tp=2, offset=0)), rank=1).layout.value
'unified'

And a rank in no grid has a role, too: it idles.

>>> topology = planned(GridSpec(), GridSpec(), world_size=3)
>>> role = role_of(topology, rank=2)
>>> role.is_idle, list(role.modules), role.is_first_stage("vision")
(True, [], False)

The vocabulary (layout, stage information, rank role and its predicates) is that of Megatron-LM's pull
request 3211; there a rank asks its process groups, serves one module, and cannot be idle.
"""

import enum
import itertools
from collections.abc import Mapping

import attrs

from mimogrid.core.topology.topology import Topology


class ModuleLayout(enum.Enum):
    """How the modules of a job share the ranks.

    UNIFIED: all modules on all ranks under one grid. NON_COLOCATED: every module has ranks of its own.
    COLOCATED: some ranks host stages of several modules, under grids that differ.
    """

    UNIFIED = "unified"
    NON_COLOCATED = "non_colocated"
    COLOCATED = "colocated"


@attrs.frozen
class ModuleStageInfo:
    """A rank's place in one module: its stage along pp, and its position on every axis.

    Axes are tp, cp, dp and pp, and for the module's experts expert_tp, ep and expert_dp.
    """

    module: str
    pp: int
    is_first_stage: bool
    is_last_stage: bool
    position: Mapping[str, int]


@attrs.frozen
class RankRole:
    """What a rank does: the modules that it hosts, in file order. A rank in no grid hosts none: it idles."""

    rank: int
    layout: ModuleLayout
    modules: Mapping[str, ModuleStageInfo]
    language_modules: tuple[str, ...]

    def is_first_stage(self, module: str) -> bool:
        """Whether the rank is in the first stage of the module; False where it does not host it."""
        return module in self.modules and self.modules[module].is_first_stage

    def is_last_stage(self, module: str) -> bool:
        """Whether the rank is in the last stage of the module; False where it does not host it."""
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
        """Whether the rank hosts a module that is no language model."""
        return bool(self.modality_module_names)

    @property
    def modality_module_names(self) -> tuple[str, ...]:
        """The modules of this rank that are no language model."""
        return tuple(name for name in self.modules if name not in self.language_modules)


def layout_of(topology: Topology) -> ModuleLayout:
    """Return how the modules share the ranks."""
    grids = [module.grid for module in topology.modules.values()]
    if all(grid == grids[0] for grid in grids):
        return ModuleLayout.UNIFIED
    overlap = any(
        a.offset < b.offset + b.size and b.offset < a.offset + a.size
        for a, b in itertools.combinations(grids, 2)
    )
    return ModuleLayout.COLOCATED if overlap else ModuleLayout.NON_COLOCATED


def role_of(topology: Topology, rank: int) -> RankRole:
    """Return a rank's role. Raises ValueError for a rank outside the world."""
    if not 0 <= rank < topology.world_size:
        raise ValueError(f"rank {rank} is not in the world 0..{topology.world_size - 1}")
    return RankRole(
        rank=rank,
        layout=layout_of(topology),
        modules={
            info.stage.module: ModuleStageInfo(
                module=info.stage.module,
                pp=info.stage.pp,
                is_first_stage=info.stage.pp == 0,
                is_last_stage=info.stage.pp == topology.modules[info.stage.module].grid.extent("pp") - 1,
                position=topology.modules[info.stage.module].position(rank),
            )
            for info in topology.stages_of(rank)
        },
        language_modules=topology.graph.texts,
    )
