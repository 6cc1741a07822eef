"""A `ProcessGroupCollection` for each module of a job: the groups of the job, and those that only Megatron uses."""

import contextlib
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from mimogrid.core.topology.groups import Ranks, groups_of, in_slots
from mimogrid.core.topology.roles import RankRole
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.device.device import Device
from mimogrid.shell.megatron.names import ProcessGroupCollection
from mimogrid.shell.world.groups import ProcessGroups, destroy
from mimogrid.shell.world.world import World


_ALONG = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"),
    "dp_cp": ("cp", "dp"),
    "intra_dp_cp": ("cp", "dp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}
"""The axes of the groups in a collection, by their names there."""
_ALONG_EXPERTS = {
    "ep": ("ep",),
    "expt_tp": ("expert_tp",),
    "expt_dp": ("expert_dp",),
    "intra_expt_dp": ("expert_dp",),
    "tp_ep": ("expert_tp", "ep"),
    "tp_ep_pp": ("expert_tp", "ep", "pp"),
}
_DENSE = {"expt_tp": "tp", "expt_dp": "dp_cp", "intra_expt_dp": "dp_cp", "tp_ep": "tp", "tp_ep_pp": "mp"}
"""Groups that take the places of expert groups in a module without experts; Megatron reads them there, too."""


@contextlib.contextmanager
def open_collections(
    topology: Topology, groups: ProcessGroups, world: World, device: Device
) -> Iterator[Mapping[str, ProcessGroupCollection]]:
    """Return a collection for each module that this rank hosts; all ranks of the world call it.

    Groups of the job are used if they have the same ranks. The others (pp, mp, dp beside cp) are created here and
    destroyed on exit. `embd` has the first and the last rank of a pipeline, `pos_embd` the first; other ranks have
    None.
    """
    planned = {ranks for slot in groups_of(topology) for ranks in slot}
    lacking = [ranks for ranks in _wanted(topology) if len(ranks) > 1 and ranks not in planned]
    by_ranks = dict(groups.by_ranks)
    opened: list[dist.ProcessGroup] = []
    try:
        for slot in in_slots(lacking):
            made = world.make_groups(slot, backend=device.backend, purpose="megatron")
            opened.extend(made.values())
            by_ranks |= {ranks: group for ranks, group in made.items() if ranks not in by_ranks}
        role = topology.role(world.rank)
        yield {module: _collection(role, module, by_ranks) for module in role.modules}
    finally:
        destroy(opened)


def _wanted(topology: Topology) -> Iterator[Ranks]:
    for module in topology.modules.values():
        for axes in _ALONG.values():
            yield from module.grid.ranks_along(axes)
        for axes in _ALONG_EXPERTS.values() if module.experts else ():
            yield from module.experts.ranks_along(axes)  # type: ignore[union-attr]
        yield from map(_ends, module.grid.ranks_along("pp"))


def _ends(pipeline: Ranks) -> Ranks:
    return tuple(dict.fromkeys((pipeline[0], pipeline[-1])))


def _collection(
    role: RankRole, module: str, by_ranks: Mapping[Ranks, dist.ProcessGroup]
) -> ProcessGroupCollection:
    rank, has_experts = role.rank, "ep" in role.modules[module].position
    along = _ALONG | (_ALONG_EXPERTS if has_experts else {})
    found = {name: by_ranks[role.group(module, axes)] for name, axes in along.items()}
    if not has_experts:
        found |= {"ep": by_ranks[rank,]} | {name: found[dense] for name, dense in _DENSE.items()}
    pipeline = role.group(module, "pp")
    collection = ProcessGroupCollection(**found)
    collection.embd = by_ranks[_ends(pipeline)] if rank in _ends(pipeline) else None
    collection.pos_embd = by_ranks[rank,] if rank == pipeline[0] else None
    return collection
