"""State: what a run must keep to go on as if it had never stopped, as the pieces that a checkpoint holds.

Weights are under ``module.parameter`` (trained ones as the main weights), what the optimizer keeps for each under
``optimizer.STATE.module.parameter``: of the parameter's shape, or one value. The rest is in the manifest: how many
steps were taken, and what decisions hang on (`core.update.decision.SkipState`). Random draws have no state: each is a
hash of the seed and of what it is for.

A host that writes checkpoints of its own gets all of it from `gather`, as full tensors on one rank, and gives
it back to `scatter`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.errors import WorldError
from mimogrid.core.topology.topology import Stage
from mimogrid.core.update.buckets import Part, Span
from mimogrid.core.update.decision import SkipState
from mimogrid.shell.checkpoint.manifest import OPTIMIZER
from mimogrid.shell.checkpoint.versions import versions
from mimogrid.shell.job import jobfile
from mimogrid.shell.runtime.gradients import Buffer, Shard
from mimogrid.shell.runtime.optimizer import begin_states, states_of
from mimogrid.shell.runtime.pieces import (
    StagePieces,
    TensorPiece,
    TensorPieces,
    compact,
    gather_pieces,
    weights_of,
)
from mimogrid.shell.runtime.rank import RankRuntime


SHOWN = 5
"""How many of the names that do not fit an error lists."""


def facts_of(runtime: RankRuntime) -> dict[str, Any]:
    """Return what the manifest keeps of a run's state."""
    return {"steps_taken": runtime.steps_taken, "watch": attrs.asdict(runtime.skip_state)}


def manifest_of(runtime: RankRuntime, step: int) -> dict[str, Any]:
    """Return what the manifest of a checkpoint says of a run: its state, and what made it. Step `step` is the next."""
    spec = runtime.job.spec
    return {
        "step": step,
        **facts_of(runtime),
        "job": jobfile.dump(spec),
        "layout": {
            name: {
                **{axis.name: axis.size for axis in module.grid.axes},
                "ep": spec.modules[name].grid.ep,
                "chunks": spec.modules[name].chunks,
                "offset": module.grid.offset,
            }
            for name, module in runtime.topology.modules.items()
        },
        "schedule": spec.schedule.name,
        "precision": spec.precision,
        "data": {"source": spec.data.source, "next_sample": step * spec.batch.global_size},
        "random": {"seed": spec.seed, "next_step": step},
        "versions": versions(),
    }


def pieces_to_save(runtime: RankRuntime) -> TensorPieces:
    """Return what this rank writes; all ranks of the job call it together.

    Of several ranks that hold the same values one writes them. A parameter that dp ranks share is put together on
    the dp rank where it begins, so that files hold blocks of the full tensors and nothing else.
    """
    return {
        **{name: pieces for name, pieces, writes in _frozen(runtime) if writes},
        **{name: pieces for stage in runtime.stages for name, pieces in _joined(runtime, stage)},
    }


def pieces_to_load(runtime: RankRuntime, facts: Mapping[str, Any]) -> TensorPieces:
    """Return what this rank reads: its frozen weights, its main weights, and what the optimizer keeps."""
    if runtime.optimizer is not None and facts["steps_taken"]:
        begin_states(runtime.optimizer)
    found: dict[str, tuple[TensorPiece, ...]] = {name: pieces for name, pieces, _ in _frozen(runtime)}
    for stage, buffer in ((s, b) for s, of_stage in runtime.buffers.items() for b in of_stage.buffers):
        places = StagePieces(runtime.stages[stage])
        for shard in buffer.shards:
            for name, tensor in _tensors(runtime, stage, shard):
                found[name] = tuple(places.pieces(shard.part, tensor))
    return found


def restore(runtime: RankRuntime, facts: Mapping[str, Any]) -> None:
    """Take up the rest of a run's state, once its pieces are loaded."""
    runtime.steps_taken = facts["steps_taken"]
    runtime.skip_state = SkipState.of(facts["watch"])
    for buffer in runtime.buffers.values():
        buffer.copy_main_to_model()


def gather(runtime: RankRuntime) -> dict[str, torch.Tensor]:
    """Put the state of all ranks together on the first rank of the job, on the CPU; the others get nothing."""
    return gather_pieces(runtime, pieces_to_save(runtime))


@torch.no_grad()
def scatter(runtime: RankRuntime, full: Mapping[str, torch.Tensor], facts: Mapping[str, Any] | None) -> None:
    """Fill the pieces of all ranks from full tensors that the first rank of the job has.

    Without facts there are only weights, and what the optimizer keeps stays. One tensor after the other travels
    to all ranks, so none but the first holds more than one. Raises WorldError on every rank where names or
    shapes are not those of the job; where they are those of a weight, before anything is changed.
    """
    first = runtime.group.rank() == 0
    has: Any = [{name: (tuple(whole.shape), whole.dtype) for name, whole in full.items()} if first else None]
    dist.broadcast_object_list(has, group=runtime.group, group_src=0)
    shapes: dict[str, tuple[int, ...]] = {name: shape for name, (shape, _) in has[0].items()}
    _check(
        runtime,
        pieces_to_load(runtime, {"steps_taken": 0}),
        shapes,
        lambda name: not name.startswith(OPTIMIZER),
    )
    pieces = pieces_to_load(runtime, facts or {"steps_taken": 0})
    if facts is not None:
        _check(runtime, pieces, shapes, lambda name: name.startswith(OPTIMIZER))
    for name, (shape, dtype) in has[0].items():
        whole = torch.empty(shape, dtype=dtype, device=runtime.device.torch)
        if first:
            whole.copy_(full[name])
        dist.broadcast(whole, group=runtime.group, group_src=0)
        for piece in pieces.get(name, ()):
            piece.tensor.copy_(piece.within(whole))
    for buffer in runtime.buffers.values():
        buffer.copy_main_to_model()


def _check(
    runtime: RankRuntime,
    pieces: TensorPieces,
    has: Mapping[str, tuple[int, ...]],
    concerns: Callable[[str], bool],
) -> None:
    """Compare names and shapes with what all ranks want; each computes the same from all of it."""
    mine = {name: piece.full_shape for name, of_name in pieces.items() if concerns(name) for piece in of_name}
    every: list[Any] = [None] * runtime.group.size()
    dist.all_gather_object(every, mine, group=runtime.group)
    wanted = {name: shape for wants in every for name, shape in wants.items()}
    has = {name: shape for name, shape in has.items() if concerns(name)}
    apart = sorted(name for name in wanted.keys() & has.keys() if wanted[name] != has[name])
    facts = [f"'{name}' is missing" for name in sorted(wanted.keys() - has.keys())]
    facts += [f"'{name}' is of no module here" for name in sorted(has.keys() - wanted.keys())]
    facts += [f"'{name}' has shape {has[name]}, not {wanted[name]}" for name in apart]
    if facts:
        shown = "; ".join(facts[:SHOWN]) + (f"; and {len(facts) - SHOWN} more" if len(facts) > SHOWN else "")
        raise WorldError(f"this state is of another job: {shown}.")


def _tensors(runtime: RankRuntime, stage: Stage, shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is kept of a shard, flat: as many values as it has, or one without a dim."""
    full = f"{stage.module}.{shard.part.name}"
    yield full, shard.main.detach()
    for state, tensor in states_of(runtime.optimizer, shard).items():
        yield f"{OPTIMIZER}{state}.{full}", tensor


def _frozen(runtime: RankRuntime) -> Iterator[tuple[str, tuple[TensorPiece, ...], bool]]:
    """Yield the weights that do not train, and whether this rank writes them."""
    for stage, weights in weights_of(runtime).items():
        places = StagePieces(runtime.stages[stage])
        for name, weight in weights.items():
            if name not in runtime.buffers[stage].weights:
                yield f"{stage.module}.{name}", places.whole(name, weight), places.gives(name)


def _joined(runtime: RankRuntime, stage: Stage) -> Iterator[tuple[str, tuple[TensorPiece, ...]]]:
    """Yield the whole parameters that this rank writes of a stage."""
    places, of_stage = StagePieces(runtime.stages[stage]), runtime.buffers[stage]
    for buffer in of_stage.buffers:
        shards = {shard.part.name: shard for shard in buffer.shards}
        for span in buffer.bucket.spans:
            shard = shards.get(span.name)
            kept = dict(_tensors(runtime, stage, shard)) if shard else {}
            if buffer.shared and _is_cut(buffer, span):
                kept = _gathered(buffer, span, kept)
            if shard and shard.part.start == 0 and span.name in of_stage.counted:
                for name, tensor in kept.items():
                    if tensor.dim() or span.name in of_stage.written:
                        yield name, tuple(places.pieces(Part(span.name, 0, span.size), tensor))


def _is_cut(buffer: Buffer, span: Span) -> bool:
    each = buffer.bucket.size // buffer.bucket.shards
    return span.start // each != (span.start + span.size - 1) // each


def _gathered(buffer: Buffer, span: Span, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put together what dp ranks have of a parameter; those that have none of it come along with nothing."""
    every: list[Any] = [None] * buffer.shard_group.size()
    dist.all_gather_object(
        every, {name: compact(tensor) for name, tensor in kept.items()}, group=buffer.shard_group
    )
    holders = [parts for parts in every if parts]
    return {
        name: torch.cat([parts[name] for parts in holders]) if tensor.dim() else tensor
        for name, tensor in kept.items()
    }
