"""Updates: bodies that train some steps and tell what came of it: decisions, weights, what the optimizer keeps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import numpy as np
import torch

from mimogrid.core.schedule.actions import Compute
from mimogrid.core.update.decision import is_passed_over
from mimogrid.shell.checkpoint import files as checkpoint
from mimogrid.shell.checkpoint import manifest, saving
from mimogrid.shell.checkpoint.state import manifest_of, restore, slices_to_load, slices_to_save
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.optimizer import states_of
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.stage import StageStep
from mimogrid.shell.runtime.tensor_slices import weights_of
from mimogrid.shell.runtime.train_step import train_step


@attrs.frozen
class Spoilt:
    """A gradient with one infinite value, on one rank in one step, before it is summed over any other."""

    rank: int
    step: int
    module: str
    name: str


@attrs.frozen(eq=False)
class Seen:
    """What a rank saw of a run.

    Attributes:
        losses, norms, taken, scales: of each step that was run.
        steps_taken, skip state: at the end.
        weights: those of the networks here, by stage and name.
        pieces: what the rank would write into a checkpoint: full shape, offsets, values.
        bytes: what the optimizer keeps for each value, and main weights.
    """

    losses: list[float]
    norms: list[float]
    taken: list[bool]
    scales: list[float]
    steps_taken: int
    skip_state: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]
    pieces: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], np.ndarray]]
    bytes: int


def train(  # noqa: PLR0917 -- a body is called by position
    place: RankPlace,
    job: Job,
    steps: range,
    spoilt: Spoilt | None = None,
    save: Path | None = None,
    resume: Path | None = None,
    samples: int | None = None,
) -> Seen | None:
    """Train steps; begin with the checkpoint in `resume`, and write one to `save` in the end.

    Each step has its own samples, or those of step `samples`.
    """
    with open_session(place, job) as session:
        runtime = session.runtime
        if runtime is None:
            return None
        if resume is not None:
            newest = manifest.newest(resume)
            assert newest is not None
            facts = manifest.read_manifest(newest)
            checkpoint.load(newest, slices_to_load(runtime, facts), runtime.group)
            restore(runtime, facts)
        outcomes = []
        for index in steps:
            if not is_passed_over(job.spec.train, index):
                spoils = spoilt and spoilt.step == index and spoilt.rank == place.rank
                step = job.step(index if samples is None else samples)
                with _spoiling(runtime, spoilt) if spoils else nullcontext():
                    outcomes.append(train_step(runtime, index, step, step))
        pieces = slices_to_save(runtime)
        if save is not None:
            facts = manifest_of(runtime, steps.stop)
            saving.save(save, pieces, facts, runtime.group, keep=1)
        return Seen(
            losses=[outcome.loss for outcome in outcomes],
            norms=[outcome.gradient_norm for outcome in outcomes],
            taken=[outcome.taken for outcome in outcomes],
            scales=[outcome.loss_scale for outcome in outcomes],
            steps_taken=runtime.steps_taken,
            skip_state=attrs.asdict(runtime.skip_state),
            weights={
                f"{stage}.{name}": _array(weight)
                for stage, weights in weights_of(runtime).items()
                for name, weight in weights.items()
            },
            pieces={
                name: (piece.full_shape, piece.offsets, _array(piece.tensor))
                for name, (piece,) in pieces.items()
            },
            bytes=_bytes(runtime),
        )


@contextmanager
def _spoiling(runtime: RankRuntime, spoilt: Spoilt) -> Iterator[None]:
    """Let the first computation of the stage that holds the parameter leave an infinite value in its gradient."""
    stage = next(s for s, buffer in runtime.buffers.items() if spoilt.name in buffer.weights)
    gradient, compute = runtime.buffers[stage].weights[spoilt.name].grad, StageStep.compute
    assert stage.module == spoilt.module
    assert gradient is not None
    done = False

    def spoil(self: StageStep, action: Compute) -> None:
        nonlocal done
        compute(self, action)
        if action.stage == stage and not done:
            gradient.view(-1)[-1] = torch.inf
            done = True

    with patch.object(StageStep, "compute", spoil):
        yield


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    exact: np.ndarray = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy().copy()
    return exact


def _bytes(runtime: RankRuntime) -> int:
    buffers = [buffer for of_stage in runtime.buffers.values() for buffer in of_stage.buffers]
    kept = sum(
        state.numel() * state.element_size()
        for buffer in buffers
        for shard in buffer.shards
        for state in states_of(runtime.optimizer, shard).values()
        if state.dim()
    )
    apart = sum(
        buffer.main.untyped_storage().nbytes()
        for buffer in buffers
        if buffer.main.untyped_storage().data_ptr() != buffer.weights.untyped_storage().data_ptr()
    )
    return kept + apart


def put_together(said: list[Any]) -> dict[str, np.ndarray]:
    """Return the full tensors of what the ranks of a world would write; every value comes from exactly one."""
    full: dict[str, np.ndarray] = {}
    written: dict[str, np.ndarray] = {}
    for seen in (seen for seen in said if seen is not None):
        for name, (shape, offsets, values) in seen.pieces.items():
            whole = full.setdefault(name, np.zeros(shape, values.dtype))
            times = written.setdefault(name, np.zeros(shape, np.int64))
            where = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            whole[where] = values
            times[where] += 1
    assert all((times == 1).all() for times in written.values())
    return full


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    """Everything that the ranks of two worlds would write is bitwise the same."""
    one, other = put_together(ours), put_together(theirs)
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.tobytes() == other[name].tobytes(), name
