"""Megatron: its grids, roles, groups, models and training loop, for programs written for megatron-core.

Each piece of megatron-core (0.16 and 0.19) has a counterpart:

| megatron-core | mimogrid | here |
|---|---|---|
| `HyperCommGrid` and its views | `core.base.grid.Grid` | `from_hyper_comm_grid`, `to_hyper_comm_grid` |
| `RankRole` of pull request 3211, from process groups | `RankRole` of any rank, from grids | `role_of_grids` |
| `ProcessGroupCollection` of a module | the groups of a job, and those that it lacks | `open_collections` |
| `MimoModelConfig` with its grids | a job, or a job file | `open_job_of`, `job_of`, `job_file_of` |
| `MimoModel` | its parts on this rank | `from_specs` |
| such a model | networks that a job's program calls, stage by stage | `networks_of` |
| its state dict | weights of such a job on any grids | `ForwardBackward.load_state_dict` |
| `forward_backward_func` | one step of a job's program | `forward_backward_func` |
| `DistributedDataParallel` around the parts of a model | the model that a training loop holds | `LoopModel` |
| `MimoOptimizer` | the update of a job, called by the loop | `get_mimo_optimizer` |
"""

from mimogrid.adapters.megatron.grids import (
    EXPERT_VIEW,
    LANGUAGE,
    from_hyper_comm_grid,
    role_of_grids,
    roles_by_chunk,
    to_hyper_comm_grid,
)
from mimogrid.adapters.megatron.groups import open_collections
from mimogrid.adapters.megatron.jobs import job_file_of, job_of, open_job_of
from mimogrid.adapters.megatron.loop import LoopModel
from mimogrid.adapters.megatron.modality import Blocks, ModalityNetwork, SequenceFirst, block_of
from mimogrid.adapters.megatron.networks import networks_of
from mimogrid.adapters.megatron.optimizer import MimoOptimizer, get_mimo_optimizer, optimizer_spec_of
from mimogrid.adapters.megatron.schedule import ForwardBackward, forward_backward_func
from mimogrid.adapters.megatron.stages import MimoStages, from_specs, layer_spec
from mimogrid.shell.megatron.cpu import checkpoints_on


__all__ = [
    "EXPERT_VIEW",
    "LANGUAGE",
    "Blocks",
    "ForwardBackward",
    "LoopModel",
    "MimoOptimizer",
    "MimoStages",
    "ModalityNetwork",
    "SequenceFirst",
    "block_of",
    "checkpoints_on",
    "forward_backward_func",
    "from_hyper_comm_grid",
    "from_specs",
    "get_mimo_optimizer",
    "job_file_of",
    "job_of",
    "layer_spec",
    "networks_of",
    "open_collections",
    "open_job_of",
    "optimizer_spec_of",
    "role_of_grids",
    "roles_by_chunk",
    "to_hyper_comm_grid",
]
