"""Hosts: plain torch programs with a process group of their own that train a job inside it, ``hosts:function``."""

import contextlib
import datetime
import importlib.util
import itertools
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as megatron_random
from torch import nn

from mimogrid.adapters.megatron import (
    ModalityNetwork,
    forward_backward_func,
    from_specs,
    open_collections,
)
from mimogrid.adapters.torch_module import Embedded, Example
from mimogrid.core.base.hashing import draw_bits
from mimogrid.core.topology.roles import ModuleLayout, ModuleStageInfo, RankRole
from mimogrid.shell.device import device as devices
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.modules.loss import Predictions, weighted_cross_entropy
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.tensor_slices import full_tensors, weights_of
from mimogrid.shell.runtime.train_step import train_step


TIMEOUT = datetime.timedelta(seconds=60)
Arrays = Mapping[str, np.ndarray]


@contextlib.contextmanager
def host(place: RankPlace) -> Iterator[None]:
    """A process group of a program's own, as big as its world, with ranks that made different groups before."""
    assert place.meeting
    torch.set_num_threads(1)  # Sums are rounded otherwise on another number.
    store = dist.FileStore(place.meeting, place.size)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=TIMEOUT)
    try:
        dist.new_group([0, 1])
        yield
    finally:
        dist.destroy_process_group()


@attrs.frozen
class Trained:
    """What a rank saw of some steps, and full weights (on the job's first rank)."""

    losses: list[float]
    by_module: list[Mapping[str, float]]
    norms: list[float]
    weights: Arrays


def _trained(outcomes: list[Outcome | None], state: Mapping[str, torch.Tensor]) -> Trained:
    kept = [outcome for outcome in outcomes if outcome]
    assert all(outcome.taken for outcome in kept)
    return Trained(
        [outcome.loss for outcome in kept],
        [outcome.losses for outcome in kept],
        [outcome.gradient_norm for outcome in kept],
        {name: tensor.numpy() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)},
    )


# -- a plain loop ------------------------------------------------------------------------------------------


def train(place: RankPlace, job: Job, steps: int, options: Mapping[str, Any]) -> Trained:
    """Train a job's own samples in a plain loop."""
    with host(place), Embedded(job, **options) as embedded:
        outcomes = [embedded.step() for _ in range(steps)]
        return _trained(outcomes, embedded.state_dict())


def by_itself(place: RankPlace, job: Job, steps: int) -> Trained | None:
    """Train the same in a world of the job's own, as the command does."""
    with open_session(place, job) as session:
        runtime = session.runtime
        if runtime is None:
            return None
        outcomes = [
            train_step(runtime, index, job.step(index), job.step(index + 1)) for index in range(steps)
        ]
        return _trained([*outcomes], full_tensors(runtime, weights_of(runtime)))


def settings(place: RankPlace, job: Job) -> tuple[list[Any], list[list[Any]], float]:
    """Everything global that a host may have set: before, then in, between and after two lives of the job.

    Last, what the host's own process group sums up when all is over.
    """
    with host(place):
        torch.set_num_threads(2)
        torch.manual_seed(5)
        before = _settings()
        seen = []
        for _ in range(2):
            embedded = Embedded(job)
            seen.append(_settings()[:-1])
            embedded.step()
            seen.append(_settings()[:-1])
            embedded.close()
            embedded.close()
            seen.append(_settings())
        total = torch.ones(1) * place.rank
        dist.all_reduce(total)
        torch.set_num_threads(1)
        return before, seen, float(total)


def _settings() -> list[Any]:

    return [
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        list(warnings.filters),
        dict(os.environ),
        mappings.torch is torch,
        megatron_random._CUDA_RNG_STATE_TRACKER is None,
        parallel_state._GLOBAL_MEMORY_BUFFER is None,
        len(dist.distributed_c10d._world.pg_map),
    ]


# -- what the host does itself -----------------------------------------------------------------------------


def own_optimizer(place: RankPlace, job: Job, steps: int) -> Trained:
    """Let a program's own optimizer, clipping and schedule take the steps."""
    spec = job.spec.optimizer
    with host(place), Embedded(job, optimizer="host") as embedded:
        weights = list(embedded.parameters())
        made = {"lr": spec.lr, "betas": (0.9, 0.95), "weight_decay": spec.weight_decay}  # the job's defaults
        optimizer = torch.optim.AdamW(weights or [nn.Parameter(torch.zeros(1))], **made, fused=True)
        outcomes = []
        for _ in range(steps):
            outcome = embedded.step()
            if outcome and outcome.gradient_norm > spec.clip_norm:
                for weight in weights:
                    assert weight.grad is not None
                    weight.grad.mul_(spec.clip_norm / outcome.gradient_norm)
            optimizer.step()
            optimizer.zero_grad()  # to None, which is torch's default
            outcomes.append(outcome)
        return _trained(outcomes, embedded.state_dict())


def own_batches(place: RankPlace, job: Job, source: Job, steps: int) -> Trained:
    """Give each step its samples, drawn from another job's source."""
    size = job.spec.batch.global_size
    with host(place), Embedded(job) as embedded:
        outcomes = [
            embedded.step([_example(source, i) for i in range(step * size, (step + 1) * size)])
            for step in range(steps)
        ]
        return _trained(outcomes, embedded.state_dict())


def own_losses(place: RankPlace, job: Job) -> list[tuple[float, float]]:
    """Take the first step twice, with the job's loss and with thrice that; return loss and gradient norm."""
    found = []
    for loss in (weighted_cross_entropy, Thrice()):
        there = attrs.evolve(place, meeting=f"{place.meeting}-{len(found)}")
        with host(there), Embedded(job, optimizer="host") as embedded:
            outcome = embedded.step(loss=loss)
            assert outcome is not None
            assert not any(isinstance(part, Thrice) for part in parts_of(embedded))
            found.append((outcome.loss, outcome.gradient_norm))
    return found


def parts_of(embedded: Embedded) -> Iterator[nn.Module]:
    """Yield all networks of this rank, part by part."""
    for runner in embedded.runtime.stages.values() if embedded.runtime else ():
        yield from runner.network.modules()


class Thrice(nn.Module):
    """A loss of the host's; a module, which must not become a part of the network."""

    def forward(self, predictions: Predictions) -> torch.Tensor:
        """Return three times the loss of the job."""
        return 3 * (predictions.cross_entropies() * predictions.weights).sum()


class _Tensors(dict[str, Any]):
    """Tensors that are loaded when they are asked for."""

    def __init__(self, source: Job, sample_id: int) -> None:
        super().__init__()
        self.source, self.sample_id = source, sample_id

    def __missing__(self, module: str) -> Any:
        assert self.source.source
        return self.source.source.load(self.sample_id, module)


def _example(source: Job, sample_id: int) -> Example:
    assert source.source
    # Ids of the host's need not begin at 0.
    sample = attrs.evolve(source.source.describe(sample_id), id=1000 + sample_id)
    return Example(sample, _Tensors(source, sample_id))


def unlike_batches(place: RankPlace, job: Job, source: Job) -> None:
    """Give one rank other samples than the rest."""
    size = job.spec.batch.global_size
    first = size if place.rank == 1 else 0
    with host(place), Embedded(job) as embedded:
        embedded.step([_example(source, i) for i in range(first, first + size)])


def handed(place: RankPlace, job: Job, steps: int) -> Trained:
    """Hand over a network as it would be built by name; on other dp ranks with other weights, which must not count."""
    from own import Encoder  # noqa: PLC0415

    torch.manual_seed(draw_bits(job.spec.seed, "enc", "own") % 2**63 + place.rank)
    with host(place), Embedded(job, modules={"enc": Encoder(8, 5)}) as embedded:
        outcomes = [embedded.step() for _ in range(steps)]
        return _trained(outcomes, embedded.state_dict())


def resumed(place: RankPlace, job: Job, other: Job, steps: int) -> tuple[Trained, Trained]:
    """Train `steps` and save; load under another layout and go on. Returns the first part and the rest."""
    with host(place):
        with Embedded(job) as embedded:
            begun = [embedded.step() for _ in range(steps)]
            state = embedded.state_dict()
        with Embedded(other) as embedded:
            embedded.load_state_dict(state)
            assert embedded.runtime is None or embedded.index == steps
            rest = [embedded.step() for _ in range(steps)]
            return _trained(begun, state), _trained(rest, embedded.state_dict())


def refused(place: RankPlace, job: Job, options: Mapping[str, Any]) -> None:
    """Enter with options that do not fit; the host's process group must live on."""
    with host(place):
        try:
            Embedded(job, **options)
        finally:
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == place.size


def foreign_state(place: RankPlace, job: Job) -> None:
    """Load a state in which a name is misspelt; on every rank that is an error."""
    with host(place), Embedded(job) as embedded:
        state = embedded.state_dict()
        if state:
            state["enc.projector.wieght"] = state.pop("enc.layers.0.mlp.up.weight")
        embedded.load_state_dict(state)


# -- Megatron ----------------------------------------------------------------------------------------------


def collections(place: RankPlace, job: Job) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Return the ranks of every group of every module's collection, and how many groups are left over."""
    with host(place), Embedded(job) as embedded:
        before = len(dist.distributed_c10d._world.pg_map)
        with open_collections(
            job.topology, embedded.groups, embedded.world, devices.of(torch.device("cpu"))
        ) as opened:
            seen = {
                module: {
                    name: dist.get_process_group_ranks(group)
                    for name, group in vars(collection).items()
                    if group is not None
                }
                for module, collection in opened.items()
            }
            for collection in opened.values():
                dist.barrier(collection.mp)
        return seen, len(dist.distributed_c10d._world.pg_map) - before


def as_megatron(
    place: RankPlace, job: Job, steps: int, changes: Mapping[str, Any] | None = None
) -> tuple[Trained, list[float]]:
    """Train in a loop like that of Megatron-LM: a schedule function, called with what one is called with."""
    size = job.spec.batch.global_size // job.spec.batch.microbatches

    def microbatches() -> Iterator[list[Example]]:
        for begin in itertools.count(0, size):
            yield [_example(job, i) for i in range(begin, begin + size)]

    with host(place):
        forward_backward = forward_backward_func(job)
        iterator, losses = microbatches(), []
        for _ in range(steps):
            reduced = forward_backward(
                **{
                    "forward_step_func": None,
                    "data_iterator": iterator,
                    "model": [],
                    "num_microbatches": job.spec.batch.microbatches,
                    "seq_length": job.topology.sequence,
                    "micro_batch_size": size,
                    **(changes or {}),
                }
            )
            losses.append(sum(float(loss) for each in reduced for loss in each.values()))
        state = forward_backward.embedded.state_dict()
        forward_backward.embedded.close()
        return _trained([], state), losses


def evaluated(place: RankPlace, job: Job) -> tuple[Mapping[str, float], Mapping[str, float], float, float]:
    """Evaluate twice and step; beside it, step without having evaluated."""
    with host(place):
        with Embedded(job) as embedded:
            first, second = embedded.evaluate(), embedded.evaluate()
            taken = embedded.step()
        with Embedded(job) as embedded:
            expected = embedded.step()
    assert first is not None
    assert second is not None
    assert taken is not None
    assert expected is not None
    return first, second, taken.loss, expected.loss


def own_modality(place: RankPlace, job: Job, steps: int) -> Trained:
    """Train a job with an encoder that is specified for Megatron."""
    import specs  # noqa: PLC0415 -- warns that it is experimental

    torch.manual_seed(place.rank)  # the first dp rank's weights count
    stage = ModuleStageInfo("vision", 0, is_first_stage=True, is_last_stage=True, position={})
    role = RankRole(place.rank, ModuleLayout.NON_COLOCATED, {"vision": stage}, ("language",))
    model = from_specs(specs.language(), {"vision": specs.vision(hidden=8)}, {"vision": 0}, role=role)
    network = ModalityNetwork(model.modality_submodules["vision"], "pixels")
    with host(place), Embedded(job, modules={"enc": network}) as embedded:
        outcomes = [embedded.step() for _ in range(steps)]
        return _trained(outcomes, embedded.state_dict())


# -- examples ----------------------------------------------------------------------------------------------


def example(place: RankPlace, path: str, steps: int) -> list[float]:
    """Run the main function of a program, as torchrun would start it."""
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec
    assert spec.loader
    program = importlib.util.module_from_spec(spec)
    with host(place):
        spec.loader.exec_module(program)
        losses: list[float] = program.main(steps)
        return losses
