"""State: what a run must keep to continue as if it had never stopped, as the slices that a checkpoint holds.

Weights have the names ``module.parameter``; trained ones are the main parameters. What the optimizer keeps for each is
under ``optimizer.STATE.module.parameter``, with the parameter's shape or as one value. The rest is in the manifest: the
number of updates, and the state that the decision to skip a step depends on (`core.update.decision.SkipState`). Random
draws have no state: each is a hash of the seed and of its purpose.

A host that writes its own checkpoints gets all of it from `gather`, as full tensors on one rank, and gives it back to
`scatter`.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.errors import WorldError
from mimogrid.core.topology.topology import Stage
from mimogrid.core.update.buckets import ParameterRange, Span
from mimogrid.core.update.contents import OPTIMIZER, parameter_of, untrained, written_as
from mimogrid.core.update.decision import SkipState
from mimogrid.shell.checkpoint.versions import machine, versions
from mimogrid.shell.job import jobfile
from mimogrid.shell.runtime.exchange import compact
from mimogrid.shell.runtime.gradients import Buffer, Shard
from mimogrid.shell.runtime.optimizer import begin_states, states_of
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.tensor_slices import (
    StageSlices,
    TensorSlice,
    TensorSlices,
    gather_slices,
    weights_of,
)


SHOWN = 5
"""How many of the names that do not match an error lists."""


def facts_of(runtime: RankRuntime) -> dict[str, Any]:
    """Return the part of a run's state that is in the manifest."""
    return {"steps_taken": runtime.steps_taken, "watch": attrs.asdict(runtime.skip_state)}


def manifest_of(runtime: RankRuntime, step: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint after which `step` is the next: the state of the run, and what wrote it."""
    return {
        "step": step,
        **facts_of(runtime),
        "job": jobfile.dump(runtime.job.spec),
        **written_as(runtime.topology, step),
        "versions": versions(),
        "machine": machine(runtime.device.torch),
    }


def slices_to_save(runtime: RankRuntime) -> TensorSlices:
    """Return what this rank writes; all ranks of the job call it together.

    If several ranks hold the same values, one of them writes them. A parameter whose update is sharded over dp ranks is
    assembled on the dp rank where it begins, so that files hold only blocks of full tensors.
    """
    return {
        **{name: slices for name, slices, writes in _frozen(runtime) if writes},
        **{name: slices for stage in runtime.stages for name, slices in _joined(runtime, stage)},
    }


def slices_to_load(runtime: RankRuntime, facts: Mapping[str, Any]) -> TensorSlices:
    """Return what this rank reads: its frozen weights, its main weights, and what the optimizer keeps."""
    if runtime.optimizer is not None and facts["steps_taken"]:
        begin_states(runtime.optimizer, ema=runtime.job.spec.optimizer.ema)
    found: dict[str, tuple[TensorSlice, ...]] = {name: slices for name, slices, _ in _frozen(runtime)}
    for stage, buffer in ((s, b) for s, of_stage in runtime.buffers.items() for b in of_stage.buffers):
        places = StageSlices(runtime.stages[stage])
        for shard in buffer.shards:
            for name, tensor in _tensors(runtime, stage, shard):
                found[name] = tuple(places.slices(shard.part, tensor))
    return {name: slices for name, slices in found.items() if slices}  # a shard may be padding only


@contextlib.contextmanager
def beginning(runtime: RankRuntime, has: Collection[str]) -> Iterator[Callable[[str], bool]]:
    """Load within it a checkpoint that `has` tensors of these names; what did not train before begins as in a new run.

    That is a parameter without any state there, as the job of the checkpoint froze it, or had no LoRA beside it. Gives
    a function that says whether a name is to be loaded: the weight, where it is there, but none of its state.
    """
    began = {
        f"{stage.module}.{shard.part.name}": shard.main
        for stage, of_stage in runtime.buffers.items()
        for buffer in of_stage.buffers
        for shard in buffer.shards
    }
    fresh = {name: began[name].detach().clone() for name in untrained(began, has)}

    def is_loaded(name: str) -> bool:
        return parameter_of(name) not in fresh or name in has

    yield is_loaded
    for name, values in fresh.items():
        if name not in has:  # Making the optimizer's states has changed it.
            began[name].detach().copy_(values)
        if runtime.optimizer is not None:
            runtime.optimizer.state.pop(began[name], None)


def restore(runtime: RankRuntime, facts: Mapping[str, Any]) -> None:
    """Restore the rest of a run's state from the manifest, after its slices are loaded."""
    runtime.steps_taken = facts["steps_taken"]
    runtime.skip_state = SkipState.of(facts["watch"])
    for buffer in runtime.buffers.values():
        buffer.copy_main_to_model()
    runtime.complete_weights()


def gather(runtime: RankRuntime) -> dict[str, torch.Tensor]:
    """Put the state of all ranks together on the first rank of the job, on the CPU; the others get nothing."""
    return gather_slices(runtime, slices_to_save(runtime))


@torch.no_grad()
def scatter(runtime: RankRuntime, full: Mapping[str, torch.Tensor], facts: Mapping[str, Any] | None) -> None:
    """Fill the slices of all ranks from the full tensors that the first rank of the job has.

    Without `facts` there are only weights, and the optimizer keeps its state. Tensors are broadcast one by one, so only
    the first rank holds more than one. Raises WorldError on every rank where names or shapes are not those of the job.
    Those of weights are checked before anything changes.
    """
    first = runtime.group.rank() == 0
    has: Any = [{name: (tuple(whole.shape), whole.dtype) for name, whole in full.items()} if first else None]
    dist.broadcast_object_list(has, group=runtime.group, group_src=0)
    shapes: dict[str, tuple[int, ...]] = {name: shape for name, (shape, _) in has[0].items()}
    _check(
        runtime,
        slices_to_load(runtime, {"steps_taken": 0}),
        shapes,
        lambda name: not name.startswith(OPTIMIZER),
    )
    slices = slices_to_load(runtime, facts or {"steps_taken": 0})
    if facts is not None:
        _check(runtime, slices, shapes, lambda name: name.startswith(OPTIMIZER))
    for name, (shape, dtype) in has[0].items():
        whole = torch.empty(shape, dtype=dtype, device=runtime.device.torch)
        if first:
            whole.copy_(full[name])
        dist.broadcast(whole, group=runtime.group, group_src=0)
        for part in slices.get(name, ()):
            part.tensor.copy_(part.within(whole))
    for buffer in runtime.buffers.values():
        buffer.copy_main_to_model()
    runtime.complete_weights()


def _check(
    runtime: RankRuntime,
    slices: TensorSlices,
    has: Mapping[str, tuple[int, ...]],
    concerns: Callable[[str], bool],
) -> None:
    """Compare names and shapes with those that all ranks need. All ranks raise the same WorldError, or none does."""
    mine = {name: parts[0].full_shape for name, parts in slices.items() if concerns(name) and parts}
    every: list[Any] = [None] * runtime.group.size()
    dist.all_gather_object(every, mine, group=runtime.group)
    needed = {name: shape for of_rank in every for name, shape in of_rank.items()}
    has = {name: shape for name, shape in has.items() if concerns(name)}
    different = sorted(name for name in needed.keys() & has.keys() if needed[name] != has[name])
    facts = [f"'{name}' is missing" for name in sorted(needed.keys() - has.keys())]
    facts += [f"'{name}' belongs to no module of the job" for name in sorted(has.keys() - needed.keys())]
    facts += [f"'{name}' has shape {has[name]}, not {needed[name]}" for name in different]
    if facts:
        shown = "; ".join(facts[:SHOWN]) + (f"; and {len(facts) - SHOWN} more" if len(facts) > SHOWN else "")
        raise WorldError(f"this state belongs to another job: {shown}.")


def _tensors(runtime: RankRuntime, stage: Stage, shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the state of a shard, flat: as many values as it has, or a single one without a dim."""
    full = f"{stage.module}.{shard.part.name}"
    yield full, shard.main.detach()
    for state, tensor in states_of(runtime.optimizer, shard).items():
        yield f"{OPTIMIZER}{state}.{full}", tensor


def _frozen(runtime: RankRuntime) -> Iterator[tuple[str, tuple[TensorSlice, ...], bool]]:
    """Yield the weights that do not train, and whether this rank writes them."""
    for stage, weights in weights_of(runtime).items():
        places = StageSlices(runtime.stages[stage])
        for name, weight in weights.items():
            if name not in runtime.buffers[stage].weights:
                yield f"{stage.module}.{name}", places.whole(name, weight), places.gives(name)


def _joined(runtime: RankRuntime, stage: Stage) -> Iterator[tuple[str, tuple[TensorSlice, ...]]]:
    """Yield the whole parameters that this rank writes of a stage."""
    places, of_stage = StageSlices(runtime.stages[stage]), runtime.buffers[stage]
    for buffer in of_stage.buffers:
        shards = {shard.part.name: shard for shard in buffer.shards}
        for span in buffer.bucket.spans:
            shard = shards.get(span.name)
            kept = dict(_tensors(runtime, stage, shard)) if shard else {}
            if buffer.shared and _is_cut(buffer, span):
                kept = _gathered(buffer, span, kept)
            if shard and shard.part.start == 0 and span.name in of_stage.counted:
                for name, tensor in kept.items():
                    slices = tuple(places.slices(ParameterRange(span.name, 0, span.size), tensor))
                    if slices and (tensor.dim() or span.name in of_stage.written):
                        yield name, slices


def _is_cut(buffer: Buffer, span: Span) -> bool:
    """Whether a parameter lies in several shards of its bucket."""
    each = buffer.bucket.size // buffer.bucket.shards
    return span.start // each != (span.start + span.size - 1) // each


def _gathered(buffer: Buffer, span: Span, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Assemble a parameter from the shards of the dp ranks. Those that have no part of it take part with nothing."""
    every: list[Any] = [None] * buffer.shard_group.size()
    dist.all_gather_object(
        every, {name: compact(tensor) for name, tensor in kept.items()}, group=buffer.shard_group
    )
    holders = [parts for parts in every if parts]
    return {
        name: torch.cat([parts[name] for parts in holders]) if tensor.dim() else tensor
        for name, tensor in kept.items()
    }
