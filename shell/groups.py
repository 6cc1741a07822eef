"""Process groups: exactly those of the plan, created in its order, destroyed at the end."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch.distributed as dist

from mimogrid.core.experts import TOGETHER
from mimogrid.core.groups import PARTIAL_AXES, Ranks, Slot, channels_of, groups_of, in_slots
from mimogrid.core.topology import Module, Topology
from mimogrid.shell.device import Device
from mimogrid.shell.world import World


@attrs.frozen
class ModuleGroups:
    """The groups of one module that a rank is in; along an axis of size 1, the rank alone.

    `holders` share a lane (tp and cp), `dp` is everyone with the same shard of the weights (cp and dp), and
    `partial` everyone who has a part of a gradient that is partial along tp; None where none is. `tie` joins the ends
    of the pipeline. Of the ranks that share experts `together` are those among whom tokens cross, `expert_tp` hold
    the shards of the same experts, and `expert_dp` the same shards. Networks are built one stage at a time, so their
    `pp` is the rank.
    """

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    partial: dist.ProcessGroup | None
    pp: dist.ProcessGroup
    holders: dist.ProcessGroup
    together: dist.ProcessGroup
    expert_tp: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    tie: dist.ProcessGroup | None


@attrs.frozen(eq=False)
class Groups:
    """Every group of this rank by its ranks, and the groups that carry messages.

    `outside` says which rank of torch's default process group a rank of the job is; torch asks for it where a
    message goes to a peer.

    With gloo one group carries all messages, kept apart by tags. NCCL has no tags and runs what shares a
    communicator one after the other, so there each ordered pair of ranks has a group of its own.
    """

    rank: int
    by_ranks: Mapping[Ranks, dist.ProcessGroup]
    channels: Mapping[Ranks, dist.ProcessGroup]
    outside: Sequence[int]

    def of_module(self, module: Module) -> ModuleGroups:
        """Return a module's groups. The rank must host the module."""

        def along(*axes: str) -> dist.ProcessGroup:
            return self.by_ranks[module.grid.group_of(self.rank, axes)]

        def among(*axes: str) -> dist.ProcessGroup:
            ranks = module.experts.group_of(self.rank, axes) if module.experts else (self.rank,)
            return self.by_ranks[ranks]

        pipeline = module.grid.group_of(self.rank, "pp")
        return ModuleGroups(
            tp=along("tp"),
            cp=along("cp"),
            dp=along("cp", "dp"),
            partial=self.by_ranks.get(module.grid.group_of(self.rank, PARTIAL_AXES)),
            pp=self.by_ranks[self.rank,],
            holders=along("tp", "cp"),
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
            holders=me,
            together=me,
            expert_tp=me,
            expert_dp=me,
            tie=None,
        )

    def channel(self, source: int, target: int) -> dist.ProcessGroup:
        """Return the group that carries messages from one rank to another."""
        return self.channels[source, target]


@contextlib.contextmanager
def open_groups(topology: Topology, world: World, device: Device) -> Iterator[Groups]:
    """Create this rank's groups in the order of the plan; destroy them on exit."""
    opened: list[dist.ProcessGroup] = []

    def create(slot: Slot, purpose: str) -> Mapping[Ranks, dist.ProcessGroup]:
        made = world.make_groups(slot, backend=device.backend, purpose=purpose)
        opened.extend(made.values())
        return made

    try:
        if world.rank not in topology.ranks and not world.is_visited:
            yield Groups(world.rank, {}, {}, world.outside)
            return
        by_ranks: dict[Ranks, dist.ProcessGroup] = {}
        for slot in reversed(groups_of(topology)):
            by_ranks |= create(slot, "collective")
        yield Groups(world.rank, by_ranks, _channels(topology, device, create), world.outside)
    finally:
        for group in reversed(opened):
            dist.destroy_process_group(group)


def _channels(
    topology: Topology, device: Device, create: Callable[[Slot, str], Mapping[Ranks, dist.ProcessGroup]]
) -> Mapping[Ranks, dist.ProcessGroup]:
    pairs = channels_of(topology)
    if device.backend == "gloo":
        carriers = create((topology.ranks,), "messages")
        return dict.fromkeys(pairs, carriers[topology.ranks]) if carriers else {}
    channels: dict[Ranks, dist.ProcessGroup] = {}
    for slot in in_slots((a, b) for a, b in pairs if a != b):
        channels |= create(slot, "channel")
    return channels
