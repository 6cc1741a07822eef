"""Megatron: its grids, roles, groups, models and training loop, in terms of ours and back.

For programs written for megatron-core (0.16 and 0.19), piece by piece:

| theirs | ours | here |
|---|---|---|
| `HyperCommGrid` and its views | `core.base.grid.Grid` | `from_hyper_comm_grid`, `to_hyper_comm_grid` |
| `RankRole` of pull request 3211, asked of process groups | the same answers for any rank, anywhere | `role_of_grids` |
| `ProcessGroupCollection` of a module | the groups of a job, and what these lack | `open_collections` |
| `MimoModelConfig` with its grids | a job, or its file | `open_job_of`, `job_of`, `job_file_of` |
| `MimoModel` | the same parts, those of this rank's stages | `from_specs` |
| such a model | networks that a job's program calls, stage by stage | `networks_of` |
| its state dict | weights of such a job, whatever its grids | `ForwardBackward.load_state_dict` |
| `forward_backward_func` | one step of a job's program | `forward_backward_func` |
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
from mimogrid.adapters.megatron.modality import ModalityNetwork, block_of
from mimogrid.adapters.megatron.networks import networks_of
from mimogrid.adapters.megatron.schedule import ForwardBackward, forward_backward_func
from mimogrid.adapters.megatron.stages import MimoStages, from_specs, layer_spec


__all__ = [
    "EXPERT_VIEW",
    "LANGUAGE",
    "ForwardBackward",
    "MimoStages",
    "ModalityNetwork",
    "block_of",
    "forward_backward_func",
    "from_hyper_comm_grid",
    "from_specs",
    "job_file_of",
    "job_of",
    "layer_spec",
    "networks_of",
    "open_collections",
    "open_job_of",
    "role_of_grids",
    "roles_by_chunk",
    "to_hyper_comm_grid",
]
