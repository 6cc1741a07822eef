"""The runtime of a rank: what it has over the steps of a run.

It is state only. What runs with it is beside it: `train_step`, `forward_only`, `agreement`, `tensor_slices`.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import attrs
import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.program.lifetimes import releases
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Action
from mimogrid.core.topology.roles import RankRole
from mimogrid.core.topology.topology import Stage, Topology
from mimogrid.core.update.decision import SkipState
from mimogrid.shell.device.device import DTYPES, Device
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron import engine
from mimogrid.shell.megatron.cache import Cache
from mimogrid.shell.modules.loss import Loss
from mimogrid.shell.runtime import optimizer
from mimogrid.shell.runtime.data import Loader, Loads, TimedSource
from mimogrid.shell.runtime.execute import RankContext, StepEnd, Timed
from mimogrid.shell.runtime.gradients import Shard, StageBuffer
from mimogrid.shell.runtime.hosting import host_stages
from mimogrid.shell.runtime.stage import StageRunner
from mimogrid.shell.runtime.transport import Transport
from mimogrid.shell.world.groups import ProcessGroups
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.phases import READING
from mimogrid.shell.world.preemption import StopRequest


Caches = Mapping[Stage, Cache]
"""What the stages of a language model keep while it generates."""


@attrs.define(eq=False, kw_only=True)
class RankRuntime:
    """What a rank has over the steps of a run.

    Attributes:
        job: the job.
        role: what the rank does in it: its stages, links and groups.
        device: where the rank computes.
        groups: the process groups that the rank is in.
        transport: what carries messages between ranks.
        heartbeat: where the rank notes what it does.
        stop_request: whether the process was asked to stop.
        source: the samples of the job; it counts the seconds that loading takes.
        stages: the stages of the rank.
        buffers: the gradients of each stage, and the main parameters that this rank updates.
        optimizer: updates the main parameters; None where the rank has none, or where a host updates the weights.
        updates_weights: False where a host updates the weights.
        defers_update: whether a step stops at the gradients, for an update later (`train_step.update_weights`).
        stages_by_rank: the names of every rank's stages.
        skip_state: what the decision on the next step depends on; the same on every rank.
        steps_taken: how many updates there were; the same on every rank.
        has_saved: what this rank reports, in the next step, of the save in flight (`shell.checkpoint.saving`).
        last_timeline: what the rank did in the step before.
        last_load_s: the seconds of it that were loading.
    """

    job: Job
    role: RankRole
    device: Device
    groups: ProcessGroups
    transport: Transport
    heartbeat: Heartbeat
    stop_request: StopRequest
    source: TimedSource
    stages: Mapping[Stage, StageRunner]
    buffers: Mapping[Stage, StageBuffer]
    optimizer: torch.optim.Optimizer | None
    updates_weights: bool
    stages_by_rank: Mapping[int, str]
    skip_state: SkipState
    defers_update: bool = False
    steps_taken: int = 0
    has_saved: bool = True
    last_timeline: tuple[Timed, ...] = ()
    last_load_s: float = 0.0

    @property
    def rank(self) -> int:
        """The rank in the job."""
        return self.role.rank

    @property
    def topology(self) -> Topology:
        """The topology of the job."""
        return self.job.topology

    def complete_weights(self) -> None:
        """Gather what a sharded update left stale, for a reader of weights between two steps; all ranks call it."""
        for buffer in self.buffers.values():
            buffer.complete()

    @property
    def group(self) -> dist.ProcessGroup:
        """The group of all ranks that host a module."""
        return self.groups.by_ranks[self.topology.ranks]


def build_runtime(
    job: Job,
    rank: int,
    groups: ProcessGroups,
    device: Device,
    *,
    heartbeat: Heartbeat,
    stop_request: StopRequest,
    user_modules: Mapping[str, nn.Module] | None = None,
    updates_weights: bool = True,
) -> RankRuntime:
    """Build the stages of a rank and what they need; all ranks of the job call it.

    `user_modules` are networks that are there already, by the names of their modules.
    """
    assert job.source is not None
    topology, role, networks = job.topology, job.topology.role(rank), user_modules or {}
    built = role.modules.keys() - networks.keys()
    engine.agree(built, topology, groups.by_ranks[topology.ranks], device.torch)
    hosted = host_stages(job, role, groups, device, networks)
    buffers = {stage: each.buffer for stage, each in hosted.items()}
    return RankRuntime(
        job=job,
        role=role,
        device=device,
        groups=groups,
        transport=Transport(topology, groups, device),
        heartbeat=heartbeat,
        stop_request=stop_request,
        source=TimedSource(job.source, lambda: heartbeat.observe(READING)),
        stages={stage: each.runner for stage, each in hosted.items()},
        buffers=buffers,
        optimizer=optimizer.build(job.spec.optimizer, shards_of(buffers)) if updates_weights else None,
        updates_weights=updates_weights,
        stages_by_rank={
            r: " ".join(str(info.stage) for info in topology.role(r).stages) for r in topology.ranks
        },
        skip_state=SkipState.first(job.spec.optimizer, job.spec.precision),
    )


def shards_of(buffers: Mapping[Stage, StageBuffer]) -> Iterator[tuple[str, Shard]]:
    """Yield what this rank updates, each with the name of its module."""
    for stage, of_stage in buffers.items():
        for buffer in of_stage.buffers:
            for shard in buffer.shards:
                yield stage.module, shard


def begin_program(
    runtime: RankRuntime,
    program: Program,
    actions: tuple[Action, ...],
    *,
    source: Loads | None = None,
    index: int = 0,
    loss_scale: float = 1.0,
    loss: Loss | None = None,
    generates: bool = False,
    caches: Caches = MappingProxyType({}),
    end: StepEnd | None = None,
) -> RankContext:
    """Return what the actions of this rank act on in one step; samples are from `source`, or else from the job.

    Every loss is multiplied by `loss_scale` before its backward. Without a `loss` last stages keep their logits, and
    modules of the user's that have a loss rest, or return what they generate. Stages of a language model go on from
    their `caches`.
    """
    dtype = DTYPES[runtime.job.spec.precision]
    loader = Loader(source or runtime.source, device=runtime.device.torch, dtype=dtype)
    return RankContext(
        stages={
            stage: runner.begin(
                program,
                loader,
                index,
                loss_scale=loss_scale,
                loss=loss,
                generates=generates,
                cache=caches.get(stage),
            )
            for stage, runner in runtime.stages.items()
        },
        buffers=runtime.buffers,
        transport=runtime.transport,
        heartbeat=runtime.heartbeat,
        releases=releases(program, runtime.rank, actions),
        end=end,
    )
