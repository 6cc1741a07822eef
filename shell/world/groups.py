"""Process groups: the groups of the plan, created in its order, destroyed at the end.

Some backends connect a group when it is first used. With them each group is used once as soon as it is made, in the
order of `core.topology.groups`: a collective group by an all-reduce of one number, a channel by a message of one
number. Both are posted like those of a step, because NCCL makes other communicators for other ways of posting.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.experts import TOGETHER
from mimogrid.core.topology.groups import PARTIAL_AXES, Opening, Purpose, Ranks, channels_of, openings_of
from mimogrid.core.topology.roles import RankRole
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.device.device import Device
from mimogrid.shell.world.world import World


@attrs.frozen
class ModuleGroups:
    """The groups of one module that a rank is in; along an axis of size 1, the rank alone.

    Attributes:
        tp, cp: the ranks along one axis.
        dp: the ranks with the same shard of the weights, along cp and dp.
        partial: the ranks that each have a part of a gradient that is partial along tp; None where no gradient is.
        pp: this rank alone, because networks are built one stage at a time.
        tp_cp_ranks: the ranks that share a dp rank.
        together: the ranks that exchange tokens for their experts.
        expert_tp: the ranks that hold the shards of the same experts.
        expert_dp: the ranks that hold the same shards of experts.
        tie: the two ends of the pipeline, where both hold a weight.
    """

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    partial: dist.ProcessGroup | None
    pp: dist.ProcessGroup
    tp_cp_ranks: dist.ProcessGroup
    together: dist.ProcessGroup
    expert_tp: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    tie: dist.ProcessGroup | None


@attrs.frozen(eq=False)
class ProcessGroups:
    """The groups that a rank is in.

    Attributes:
        rank: the rank.
        by_ranks: the groups of collectives, by their ranks.
        channels: by source and target of a message the group that carries it (`core.topology.groups.openings_of`).
        outside: for each rank of the job its rank in torch's default process group, by which torch names peers.
    """

    rank: int
    by_ranks: Mapping[Ranks, dist.ProcessGroup]
    channels: Mapping[Ranks, dist.ProcessGroup]
    outside: Sequence[int]

    def of_module(self, role: RankRole, module: str) -> ModuleGroups:
        """Return the groups of a module that the rank hosts."""

        def along(*axes: str) -> dist.ProcessGroup:
            return self.by_ranks[role.group(module, axes)]

        def among(*axes: str) -> dist.ProcessGroup:
            return along(*axes) if "ep" in role.modules[module].position else self.by_ranks[self.rank,]

        pipeline = role.group(module, "pp")
        return ModuleGroups(
            tp=along("tp"),
            cp=along("cp"),
            dp=along("cp", "dp"),
            partial=self.by_ranks.get(role.group(module, PARTIAL_AXES)),
            pp=self.by_ranks[self.rank,],
            tp_cp_ranks=along("tp", "cp"),
            together=among(*TOGETHER),
            expert_tp=among("expert_tp"),
            expert_dp=among("expert_dp"),
            tie=self.by_ranks.get((pipeline[0], pipeline[-1])),
        )

    def alone(self) -> ModuleGroups:
        """Return groups that hold this rank only."""
        me = self.by_ranks[self.rank,]
        return ModuleGroups(
            tp=me,
            cp=me,
            dp=me,
            partial=me,
            pp=me,
            tp_cp_ranks=me,
            together=me,
            expert_tp=me,
            expert_dp=me,
            tie=None,
        )

    def channel(self, source: int, target: int) -> dist.ProcessGroup:
        """Return the group that carries messages from one rank to another."""
        return self.channels[source, target]


@contextlib.contextmanager
def open_groups(topology: Topology, world: World, device: Device) -> Iterator[ProcessGroups]:
    """Create this rank's groups in the order of the plan; destroy them on exit."""
    made: dict[Purpose, dict[Ranks, dist.ProcessGroup]] = {purpose: {} for purpose in Purpose}
    opened: list[dist.ProcessGroup] = []
    try:
        if world.rank in topology.ranks or world.is_visited:
            for opening in openings_of(topology, has_tags=device.has_tags):
                groups = world.make_groups(
                    opening.slot, backend=device.backend, purpose=opening.purpose.value
                )
                opened.extend(groups.values())
                made[opening.purpose] |= groups
                if device.connects_lazily:
                    _connect(opening, groups, world, device)
        yield ProcessGroups(world.rank, made[Purpose.COLLECTIVE], _channels(topology, made), world.outside)
    finally:
        destroy(opened)


def destroy(groups: Sequence[dist.ProcessGroup]) -> None:
    """Destroy groups, the last one first."""
    for group in reversed(groups):
        # A host program that failed has destroyed its default process group, and these groups with it.
        with contextlib.suppress(ValueError):
            dist.destroy_process_group(group)


def _channels(
    topology: Topology, made: Mapping[Purpose, Mapping[Ranks, dist.ProcessGroup]]
) -> Mapping[Ranks, dist.ProcessGroup]:
    carriers = made[Purpose.MESSAGES]
    if carriers:
        return dict.fromkeys(channels_of(topology), carriers[topology.ranks])
    return made[Purpose.CHANNEL]


def _connect(
    opening: Opening, groups: Mapping[Ranks, dist.ProcessGroup], world: World, device: Device
) -> None:
    """Use this rank's groups of an opening once. Raises WorldError where that takes longer than the world's timeout."""
    for ranks, group in groups.items():
        if len(ranks) == 1:
            continue
        number = torch.zeros(1, device=device.torch)
        work: dist.Work | None
        if opening.purpose is not Purpose.CHANNEL:
            work = dist.all_reduce(number, group=group, async_op=True)
        elif world.rank == ranks[0]:
            work = dist.isend(number, dst=world.outside[ranks[1]], group=group)
        else:
            work = dist.irecv(number, src=world.outside[ranks[0]], group=group)
        assert work is not None
        what = f"rank {world.rank}: connecting ranks {list(ranks)} ({opening.purpose.value})"
        device.streams.complete(work, world.timeout, what)
