"""Hosting: builds the stages of a rank, with networks in the precision of the job and buffers for their gradients."""

from collections.abc import Mapping

import attrs
from torch import nn

from mimogrid.core.topology.roles import RankRole
from mimogrid.core.topology.topology import Stage, StageInfo
from mimogrid.shell.device.device import DTYPES, Device
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.modules.construction import build_stage, round_weights
from mimogrid.shell.modules.interface import named_weights
from mimogrid.shell.runtime.gradients import StageBuffer
from mimogrid.shell.runtime.stage import StageRunner
from mimogrid.shell.world.groups import ProcessGroups


@attrs.frozen
class Hosted:
    """A stage of a rank, and the buffers of its gradients and weights."""

    runner: StageRunner
    buffer: StageBuffer


def host_stages(
    job: Job, role: RankRole, groups: ProcessGroups, device: Device, user_modules: Mapping[str, nn.Module]
) -> dict[Stage, Hosted]:
    """Build the stages of a rank.

    `user_modules` are networks that are there already, by the names of their modules; with several chunks, an
    `nn.ModuleList` of one for each.
    """
    found = {}
    for info in role.stages:
        network = user_modules.get(info.stage.module)
        if network is not None and job.spec.modules[info.stage.module].chunks > 1:
            assert isinstance(network, nn.ModuleList)
            network = network[info.stage.chunk]
        found[info.stage] = _host(info, job, role, groups, device=device, network=network)
    return found


def _host(
    info: StageInfo,
    job: Job,
    role: RankRole,
    groups: ProcessGroups,
    *,
    device: Device,
    network: nn.Module | None,
) -> Hosted:
    module, dtype = job.topology.modules[info.stage.module], DTYPES[job.spec.precision]
    of_module = groups.of_module(role, module.name)
    built = build_stage(job.topology, info, of_module, device=device.torch, dtype=dtype, user_module=network)
    # Main parameters begin as they were drawn, before half precision rounds them.
    full = {name: weight.detach() for name, weight in named_weights(built).items()}
    round_weights(built, job.topology)
    return Hosted(
        # The network knows which of its parameters train; for a module of the user's own the plan does not.
        runner=StageRunner(
            rank=role.rank,
            module=module,
            info=built.info,
            network=built,
            groups=of_module,
            dtype=dtype,
        ),
        buffer=StageBuffer(
            topology=job.topology,
            position=role.modules[module.name].position,
            info=built.info,
            weights=named_weights(built),
            full=full,
            groups=of_module,
            streams=device.streams,
            shared=job.spec.optimizer.sharded,
        ),
    )
