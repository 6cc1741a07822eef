"""Roles: what a rank is, for any rank, asked on any machine.

A role names the modules that a rank hosts and where it stands in each. Nobody passes roles around: they
follow from the topology, so a rank of a thousand can be asked about on a laptop, without a process group.

    roles = role_of(topology, rank=1)
    roles.is_first_stage("vision")          # True on a rank of vision's first stage, False elsewhere

The vocabulary (layout, stage information, rank role and its predicates) is that of Megatron-LM's pull
request 3211; there a rank asks its process groups, serves one module, and cannot be idle.
"""

import enum
import itertools
from collections.abc import Mapping

import attrs

from mimogrid.core.topology import Topology


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
                is_first_stage=info.first,
                is_last_stage=info.last,
                position=topology.modules[info.stage.module].position(rank),
            )
            for info in topology.stages_of(rank)
        },
        language_modules=topology.graph.texts,
    )
