"""Placement: everything lies where CUDA needs it, and nothing makes the host wait for the device."""

import functools
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from layouts import job
from mimogrid.core.job.precision import HALF
from mimogrid.core.job.spec import GridSpec, JobSpec, OptimizerSpec
from mimogrid.shell.device.device import sent
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from pretended import CUDA, OnCuda, Pretending, pretending
from scale import nightly_only


Opened = Callable[[JobSpec], Job]
CUT = GridSpec(tp=2, offset=0, sequence_parallel=True)
small = functools.partial(job, microbatches=2, samples=2)
JOBS: dict[str, JobSpec] = {
    "update shared by dp ranks, tied": small(
        "enc(1,1,1)@0 lm(1,2,2)@0",
        precision="bf16",
        optimizer=OptimizerSpec(sharded=True),
        changes={"lm": {"options": {"tied_embeddings": True}}},
    ),
    # The encoder draws nothing, and yet megatron forks the state that it would draw from.
    "sequence parallel, dropout in one, recomputation": small(
        "enc(2,1,1)@0 lm(2,1,1)@0",
        data={"sequence": 16},
        changes={
            "enc": {"grid": CUT, "recompute": "selective"},
            "lm": {"grid": CUT, "recompute": "full", "options": {"dropout": 0.1}},
        },
    ),
    "context parallel": small(
        "enc(1,1,1)@0 lm(1,1,1)@0",
        data={"sequence": 16},
        changes={key: {"grid": GridSpec(cp=2, offset=0)} for key in ("enc", "lm")},
    ),
    "split backward, partly frozen": small(
        "enc(1,1,1)@0 lm(1,2,1)@1", schedule="zb-h1", changes={"lm": {"frozen": ("layers.0.*",)}}
    ),
    "experts": small(
        "enc(1,1,2)@0 lm(2,1,1)@0",
        changes={"lm": {"grid": GridSpec(tp=2, ep=2, offset=0), "options": {"experts": 4, "aux_loss": 0.1}}},
    ),
    "frozen, two losses": small(
        "enc(1,1,1)@0 mid(1,1,1)@0 lm(1,1,1)@1->gen gen(1,1,1)@1",
        precision="fp16",
        changes={"enc": {"frozen": True}},
    ),
}
OFTEN = ("experts", "sequence parallel, dropout in one, recomputation", "update shared by dp ranks, tied")
"""Those that run in every run of the tests."""


@pytest.mark.world
@pytest.mark.parametrize("name", [*OFTEN, *nightly_only(sorted({*JOBS} - {*OFTEN}))])
def test_programs_run_on_a_device_of_their_own(pool: Pool, opened: Opened, name: str) -> None:
    """A step computes what it does on the CPU, and the host waits for no more than how many tokens an expert gets."""
    opened_job = opened(JOBS[name])
    size, precision = opened_job.topology.world_size, opened_job.spec.precision
    here = pool.run("bodies:usual", size, opened_job)
    there = pool.run("bodies:placed", size, opened_job)
    # In half precision the kernels of the CPU are not the same for tensors of all classes.
    close = 0.0 if precision not in HALF else 1e-2
    for expected, (loss, norm, waits) in zip(here, there, strict=True):
        assert pytest.approx(expected, rel=close, abs=0) == (loss, norm)
        assert ({"aten._to_copy.default in experts._crossing"} if name == "experts" else set()) == waits


@pytest.fixture
def cuda() -> Iterator[Pretending]:
    """CUDA, as far as a CPU can tell."""
    with pretending() as mode:
        yield mode


def test_two_devices_do_not_meet(cuda: Pretending) -> None:
    """Where a tensor of the host's meets one of the device's, CUDA refuses; a single number it takes."""
    there = torch.ones(3, device=CUDA)
    assert isinstance(there + torch.tensor(2.0), OnCuda)
    with pytest.raises(RuntimeError, match="on cuda and on cpu"):
        there + torch.ones(3)


def test_waiting_for_the_device_is_noted(cuda: Pretending) -> None:
    """Values, sizes that hang on values, and copies that are not from pinned memory."""
    there = torch.arange(3.0, device=CUDA)
    each = torch.ones(3, dtype=torch.int64, device=CUDA)
    host = torch.ones(2)
    asked: list[tuple[bool, Callable[[], object]]] = [
        (False, there.sum),
        (True, lambda: there.sum().item()),
        (True, there.tolist),
        (True, lambda: there[there > 1]),
        (False, lambda: there.masked_fill(there > 1, 0)),
        (True, there.nonzero),
        (True, lambda: there.repeat_interleave(each)),
        (False, lambda: there.repeat_interleave(each, output_size=3)),
        (True, there.cpu),
        (True, lambda: torch.tensor([1.0, 2.0], device=CUDA)),
        (True, lambda: host.to(CUDA, non_blocking=True)),
        (False, lambda: sent(host, CUDA)),
    ]
    for waits, ask in asked:
        cuda.waits.clear()
        ask()
        assert waits == bool(cuda.waits)


@pytest.mark.world
def test_processes_that_may_use_cuda_are_forked_from_nobody(pool: Pool) -> None:
    """What is forked from a process that has imported megatron-core is told that there is no GPU."""
    (usual,) = pool.run("parents:mine", 1)
    assert os.getpid() != usual
    with Pool(1, may_use_cuda=True) as its_own:
        assert [os.getpid()] == its_own.run("parents:mine", 1)
