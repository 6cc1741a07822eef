"""Schedule: a step of `MimoModel` on several ranks, by megatron-core's own 1F1B and its own communicators.

`forward_backward_pipelining_without_interleaving` runs the part of the model that a rank's role gives it.
`MultiModulePipelineCommunicator` talks: a `BridgeCommunicator` from module to module, a `P2PCommunicator` from stage
to stage, over groups that the job has (and the pipeline's, which it has not). All settings that say how are
Megatron's defaults, but `variable_seq_lengths`, without which it refuses several modules; so every message
is preceded by one with its shape.

Networks, weights and the buffers that gradients are added up in are the job's. At the end the dp ranks of the
encoder sum their gradients by the job's own sums, and all ranks gather loss and norm, which is what the job does,
too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench import Bench
from carried import carried
from mimo import as_megatron_is_run, batches, clear, language_tp, loss_of, model_of, squared_norm
from mimogrid.adapters.megatron import open_collections, to_hyper_comm_grid
from mimogrid.shell.device.device import DTYPES
from mimogrid.shell.megatron.layers import config_of
from mimogrid.shell.runtime.exchange import gather_values


GRAPH = {"vision": ["language"], "language": []}
AXES = {"s": 0, "b": 1, "h": 2}
"""Where positions, samples and hidden sizes are in a block."""
ROWS = 2
"""An encoder sends rows [R, H], which have two axes."""


@contextlib.contextmanager
def open_schedule(bench: Bench) -> Iterator[Callable[[], tuple[float, float]]]:
    """Make Megatron's model, grids and communicators; yield what runs a step and gives its loss and gradient norm."""
    from megatron.core.pipeline_parallel.multimodule_communicator import (  # noqa: PLC0415 -- may be missing
        MultiModulePipelineCommunicator,
    )
    from megatron.core.process_groups_config import MultiModuleProcessGroupCollection  # noqa: PLC0415

    session, topology = bench.session, bench.step.topology
    with (
        open_collections(topology, session.groups, session.world, session.device) as collections,
        carried(session.device),
        as_megatron_is_run(bench),
    ):
        grids = {name: to_hyper_comm_grid(module.grid) for name, module in topology.modules.items()}
        # As `create_pg` would, which every rank has to call.
        for name, collection in collections.items():
            grids[name]._pgs["pp"] = collection.pp
        config = schedule_config(bench)
        with _bridge_groups(bench, grids):
            communicator = MultiModulePipelineCommunicator(
                grids, GRAPH, config, dim_mapping=AXES, module_output_ndim={"vision": ROWS}
            )
        hosted = MultiModuleProcessGroupCollection(
            dict(collections), "language" if "language" in collections else None
        )
        model = model_of(bench, config, grids)
        yield partial(run, bench, model, p2p_communicator=communicator, pg_collection=hosted)


def schedule_config(bench: Bench) -> Any:
    """Return the configuration that Megatron's schedule and communicators read; no network is built from it."""
    language = bench.step.topology.modules["language"].model
    config = config_of(
        language,
        layers=language.layers,
        tp=1,
        sequence_parallel=False,
        recompute="none",
        dtype=DTYPES[bench.runtime.job.spec.precision],
    )
    config.variable_seq_lengths = True
    # The loss is divided by the count of the step, not of a microbatch.
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = lambda *_, **__: sum_over_lanes(bench)
    return config


@contextlib.contextmanager
def _bridge_groups(bench: Bench, grids: Mapping[str, Any]) -> Iterator[None]:
    """Have bridges find groups of the job where they look for those made before; they would make them with NCCL."""
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator  # noqa: PLC0415

    by_ranks, rank = bench.session.groups.by_ranks, bench.runtime.rank
    ends: dict[str, Any] = {}
    for grid in grids.values():
        for is_source in (True, False):
            # It reads nothing of its instance, which cannot be made without the groups.
            dp_ranks = BridgeCommunicator.get_boundary_pp_stage_ranks(None, grid, is_source)
            mine = next((tuple(dp_rank) for dp_rank in dp_ranks if rank in dp_rank), None)
            ends[str(sorted(map(tuple, dp_ranks)))] = by_ranks[mine] if mine else None
    with (
        patch.object(BridgeCommunicator, "_broadcast_pg_cache", ends),
        patch.object(BridgeCommunicator, "_get_or_create_bridge_pg", lambda *_: bench.runtime.group),
    ):
        yield


def run(bench: Bench, model: nn.Module, **communication: Any) -> tuple[float, float]:
    """Run a step up to its gradients; return loss and gradient norm, the same on every rank."""
    from megatron.core.pipeline_parallel.schedules import (  # noqa: PLC0415 -- warns
        forward_backward_pipelining_without_interleaving,
    )

    clear(bench)
    step = bench.step
    losses = forward_backward_pipelining_without_interleaving(
        forward_step_func=partial(_forward_step, bench),
        data_iterator=batches(bench),
        model=[model],
        num_microbatches=step.topology.spec.batch.microbatches,
        seq_length=step.topology.sequence,
        micro_batch_size=len(step.samples) // step.topology.spec.batch.microbatches,
        **communication,
    )
    # All tp ranks of a last stage have computed the same loss.
    loss = sum(float(said["loss"]) for said in losses) if language_tp(bench).rank() == 0 else 0.0
    mine = torch.tensor([loss, squared_norm(bench)], dtype=torch.float64, device=bench.device.torch)
    total, square = gather_values(bench.runtime, mine).sum(dim=0).tolist()
    return total, square**0.5


def _forward_step(bench: Bench, microbatches: Iterator[dict[str, Any]], model: nn.Module) -> tuple[Any, Any]:
    output, mask_BS = model(**next(microbatches))
    return output, partial(_judge, bench, mask_BS)


def _judge(bench: Bench, mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the loss, the number of its tokens and what is reported, as the schedule takes them."""
    loss = loss_of(bench, losses_BS, mask_BS)
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), {"loss": loss.detach()}


def sum_over_lanes(bench: Bench) -> None:
    """Sum gradients over the dp ranks of each module, as the job's program does."""
    buckets = [bucket for buffer in bench.runtime.buffers.values() for bucket in buffer.buffers]
    for bucket in buckets:
        bucket.reduce()
    for bucket in buckets:
        bucket.wait()
