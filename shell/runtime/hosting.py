"""Hosting: the stages of a rank, built: networks in the precision of the job, and buffers for their gradients."""

from collections.abc import Mapping

import attrs
from torch import nn

from mimogrid.core.topology.topology import Stage, StageInfo
from mimogrid.shell.device.device import DTYPES, Device
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.modules import build_stage, named_weights
from mimogrid.shell.runtime.gradients import StageBuffer
from mimogrid.shell.runtime.stage import StageRunner
from mimogrid.shell.world.groups import Groups


@attrs.frozen
class Hosted:
    """A stage of a rank: what runs it, and where its gradients and weights lie."""

    runner: StageRunner
    buffer: StageBuffer


def host_stages(
    job: Job, rank: int, groups: Groups, device: Device, given: Mapping[str, nn.Module]
) -> dict[Stage, Hosted]:
    """Build the stages of a rank; `given` are networks that are there already, in a list where there are chunks."""
    found = {}
    for info in job.topology.role(rank).stages:
        network = given.get(info.stage.module)
        if network is not None and job.spec.modules[info.stage.module].chunks > 1:
            assert isinstance(network, nn.ModuleList)
            network = network[info.stage.chunk]
        found[info.stage] = _host(info, job, rank, groups, device=device, given=network)
    return found


def _host(
    info: StageInfo, job: Job, rank: int, groups: Groups, *, device: Device, given: nn.Module | None
) -> Hosted:
    module, dtype = job.topology.modules[info.stage.module], DTYPES[job.spec.precision]
    of_module = groups.of_module(job.topology.role(rank), module.name)
    network = build_stage(job.topology, info, of_module, device=device.torch, dtype=dtype, user_module=given)
    # Main weights begin as they were drawn, not as half precision rounds them.
    full = {name: weight.detach() for name, weight in named_weights(network).items()}
    network.to(dtype)
    return Hosted(
        # The network knows which of its parameters train; of a module of the user's own the plan does not.
        runner=StageRunner(
            rank=rank,
            module=module,
            info=network.info,
            network=network,
            groups=of_module,
            dtype=dtype,
        ),
        buffer=StageBuffer(
            topology=job.topology,
            position=module.position(rank),
            info=network.info,
            weights=named_weights(network),
            full=full,
            groups=of_module,
            streams=device.streams,
            shared=job.spec.optimizer.sharded,
        ),
    )
