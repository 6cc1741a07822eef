"""Collecting: full tensors from their shards, by layout-independent names, on one rank.

Each tensor is put together along tp (an expert's along expert_tp) and handed over by one rank alone, so names
come once.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from mimogrid.core.job.models import Parameter
from mimogrid.core.topology.topology import Stage
from mimogrid.core.update.reductions import is_written_by
from mimogrid.shell.modules.weights import cut_over, unshard
from mimogrid.shell.runtime.stage import StageRunner
from mimogrid.shell.world.groups import ModuleGroups


Tensors = Mapping[str, torch.Tensor]


def collect(
    runners: Mapping[Stage, StageRunner], tensors: Mapping[Stage, Tensors], group: dist.ProcessGroup
) -> Tensors:
    """Gather each stage's tensors, named as its parameters, into full ones under ``module.parameter``.

    All ranks of `group` call it; its first rank gets everything, the others nothing.
    """
    mine: dict[str, torch.Tensor] = {}
    for stage, of_stage in tensors.items():
        runner = runners[stage]
        table = {parameter.name: parameter for parameter in runner.info.parameters}
        for name, tensor in of_stage.items():
            parameter = table.get(name)
            full = _whole(tensor.detach(), parameter, runner.groups)
            if is_written_by(runner.module.position(runner.rank), runner.info, parameter):
                mine[f"{stage.module}.{name}"] = full.cpu()
    gathered: list[Tensors | None] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(mine, gathered, group=group, group_dst=0)
    return {name: full for part in gathered or () for name, full in (part or {}).items()}


def _whole(tensor: torch.Tensor, parameter: Parameter | None, groups: ModuleGroups) -> torch.Tensor:
    if parameter is None or parameter.tp_dim is None:
        return tensor
    group = cut_over(parameter, groups)
    if group.size() == 1:
        return tensor
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return unshard(shards, parameter)
