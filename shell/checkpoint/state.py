"""State: what a run must keep to go on as if it had never stopped, as the pieces that a checkpoint holds.

Weights are under ``module.parameter`` (trained ones as the main weights), what the optimizer keeps for each under
``optimizer.STATE.module.parameter``: of the parameter's shape, or one value. The rest is in the manifest: how many
steps were taken, and what decisions hang on (`core.update.decision.SkipState`). Random draws have no state: each is a
hash of the seed and of what it is for.

A host that writes checkpoints of its own gets all of it from `gather`, as full tensors on one rank, and gives
it back to `scatter`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.errors import WorldError
from mimogrid.core.job.models import Parameter
from mimogrid.core.topology.topology import Stage
from mimogrid.core.update.buckets import ParameterRange, Span, boxes
from mimogrid.core.update.decision import SkipState
from mimogrid.core.update.reductions import counts_in_norm
from mimogrid.shell.checkpoint.files import Piece, Pieces
from mimogrid.shell.checkpoint.manifest import OPTIMIZER
from mimogrid.shell.checkpoint.versions import versions
from mimogrid.shell.job import jobfile
from mimogrid.shell.modules.weights import cut_over
from mimogrid.shell.runtime.gradients import Buffer, Shard
from mimogrid.shell.runtime.optimizer import begin_states, states_of
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.world.groups import ModuleGroups


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


def pieces_to_save(runtime: RankRuntime) -> Pieces:
    """Return what this rank writes; all ranks of the job call it together.

    Of several ranks that hold the same values one writes them. A parameter that dp ranks share is put together on
    the dp rank where it begins, so that files hold blocks of the full tensors and nothing else.
    """
    return {
        **{name: pieces for name, pieces, writes in _frozen(runtime) if writes},
        **{name: pieces for stage in runtime.stages for name, pieces in _joined(runtime, stage)},
    }


def pieces_to_load(runtime: RankRuntime, facts: Mapping[str, Any]) -> Pieces:
    """Return what this rank reads: its frozen weights, its main weights, and what the optimizer keeps."""
    if runtime.optimizer is not None and facts["steps_taken"]:
        begin_states(runtime.optimizer)
    found: dict[str, tuple[Piece, ...]] = {name: pieces for name, pieces, _ in _frozen(runtime)}
    for stage, buffer in ((s, b) for s, of_stage in runtime.buffers.items() for b in of_stage.buffers):
        held = _Held(runtime, stage)
        for shard in buffer.shards:
            for name, tensor in _tensors(runtime, stage, shard):
                found[name] = tuple(held.pieces(shard.part, tensor))
    return found


def restore(runtime: RankRuntime, facts: Mapping[str, Any]) -> None:
    """Take up the rest of a run's state, once its pieces are loaded."""
    runtime.steps_taken = facts["steps_taken"]
    runtime.skip_state = SkipState.of(facts["watch"])
    for buffer in runtime.buffers.values():
        buffer.copy_main_to_model()


def gather(runtime: RankRuntime) -> dict[str, torch.Tensor]:
    """Put the pieces of all ranks together on the first rank of the job, on the CPU; the others get nothing."""
    mine = [
        (name, piece.full_shape, piece.offsets, piece.tensor.detach().cpu())
        for name, pieces in pieces_to_save(runtime).items()
        for piece in pieces
    ]
    full: dict[str, torch.Tensor] = {}
    for of_rank in runtime.hand_over(mine):
        for name, shape, offsets, block in of_rank:
            whole = full.setdefault(name, torch.empty(shape, dtype=block.dtype))
            whole[_within(offsets, block.shape)] = block
    return full


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
            piece.tensor.copy_(whole[_within(piece.offsets, piece.tensor.shape)])
    for buffer in runtime.buffers.values():
        buffer.copy_main_to_model()


def _check(
    runtime: RankRuntime, pieces: Pieces, has: Mapping[str, tuple[int, ...]], concerns: Callable[[str], bool]
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


def _within(offsets: Iterable[int], shape: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def _tensors(runtime: RankRuntime, stage: Stage, shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is kept of a shard, flat: as many values as it has, or one without a dim."""
    full = f"{stage.module}.{shard.part.name}"
    yield full, shard.main.detach()
    for state, tensor in states_of(runtime.optimizer, shard).items():
        yield f"{OPTIMIZER}{state}.{full}", tensor


def _frozen(runtime: RankRuntime) -> Iterator[tuple[str, tuple[Piece, ...], bool]]:
    """Yield the weights that do not train, and whether this rank writes them."""
    for stage, weights in runtime.weights().items():
        held = _Held(runtime, stage)
        for name, weight in weights.items():
            if name not in runtime.buffers[stage].weights:
                part = ParameterRange(name, 0, weight.numel())
                pieces = tuple(held.pieces(part, weight.detach().reshape(-1)))
                yield f"{stage.module}.{name}", pieces, held.counts(name)


def _joined(runtime: RankRuntime, stage: Stage) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Yield the whole parameters that this rank writes of a stage."""
    held, of_stage = _Held(runtime, stage), runtime.buffers[stage]
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
                        yield name, tuple(held.pieces(ParameterRange(span.name, 0, span.size), tensor))


def _is_cut(buffer: Buffer, span: Span) -> bool:
    each = buffer.bucket.size // buffer.bucket.shards
    return span.start // each != (span.start + span.size - 1) // each


def _gathered(buffer: Buffer, span: Span, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put together what dp ranks have of a parameter; those that have none of it come along with nothing."""
    every: list[Any] = [None] * buffer.shard_group.size()
    dist.all_gather_object(
        every, {name: tensor.cpu() for name, tensor in kept.items()}, group=buffer.shard_group
    )
    holders = [parts for parts in every if parts]
    return {
        name: torch.cat([parts[name] for parts in holders]) if tensor.dim() else tensor
        for name, tensor in kept.items()
    }


def _spread(
    block: torch.Tensor,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    parameter: Parameter,
    group: dist.ProcessGroup,
) -> Iterator[Piece]:
    """Yield where a block of a shard lies in the full parameter: apart, where it reaches into several `tp_blocks`."""
    dim = parameter.tp_dim
    assert dim is not None
    each = shape[dim] // parameter.tp_blocks
    full = tuple(size * group.size() if d == dim else size for d, size in enumerate(shape))
    start, stop = offsets[dim], offsets[dim] + block.shape[dim]
    for i in range(start // each, -(-stop // each)):
        first, last = max(start, i * each), min(stop, (i + 1) * each)
        moved = first + (i * (group.size() - 1) + group.rank()) * each
        there = tuple(moved if d == dim else offset for d, offset in enumerate(offsets))
        yield Piece(block.narrow(dim, first - start, last - first), full, there)


class _Held:
    """Where the parameters of a stage lie in the full ones, on this rank."""

    def __init__(self, runtime: RankRuntime, stage: Stage) -> None:
        runner = runtime.stages[stage]
        self._groups: ModuleGroups = runner.groups
        self._info = runner.info
        self._table = {parameter.name: parameter for parameter in runner.info.parameters}
        self._shapes = {name: tuple(weight.shape) for name, weight in runtime.weights()[stage].items()}
        self._position = runner.module.position(runtime.rank)

    def counts(self, name: str) -> bool:
        """Whether this rank is the one that writes a parameter that all dp ranks hold."""
        return counts_in_norm(self._position, self._info, self._table.get(name))

    def pieces(self, part: ParameterRange, tensor: torch.Tensor) -> Iterator[Piece]:
        """Yield the places of values of a parameter, flat and in order, in the full one."""
        shape = self._shapes[part.name]
        parameter: Parameter | None = self._table.get(part.name)
        if not tensor.dim():
            yield Piece(tensor.view(1), (1,), (0,))
            return
        begin = 0
        for offsets, lengths in boxes(shape, part.start, part.stop):
            block = tensor[begin : begin + torch.Size(lengths).numel()].view(lengths)
            begin += block.numel()
            if parameter is None or parameter.tp_dim is None or self._tp(parameter).size() == 1:
                yield Piece(block, shape, offsets)
            else:
                yield from _spread(block, shape, offsets, parameter, self._tp(parameter))

    def _tp(self, parameter: Parameter) -> dist.ProcessGroup:
        return cut_over(parameter, self._groups)
