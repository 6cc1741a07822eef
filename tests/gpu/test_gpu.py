"""The checks of every test run, on a GPU that many ranks share, and by a rank alone with NCCL."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarked
import devices_checked as checks
from devices_checked import Opened, Where
from mimogrid.shell.world.launch import Pool


pytestmark = pytest.mark.gpu
GPU = Where(shared="host", own="nccl")
Summary = dict[str, Any]


def test_ranks_are_on_the_gpu(pool: Pool, opened: Opened, summary: Summary) -> None:
    """All of them, those that share it too; else what follows would say nothing."""
    found = checks.kinds(pool, opened, GPU)
    assert {"shared": {("cuda", "gloo")}, "own": {("cuda", "nccl")}} == found
    summary["ranks_on"] = "cuda"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parity(pool: Pool, opened: Opened, summary: Summary, precision: str) -> None:
    """Worlds of four and eight ranks through host memory, and of one with NCCL; fp32 without TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    summary[f"parity_{precision}"] = checks.parity(pool, opened, GPU, precision)


def test_digits(pool: Pool, summary: Summary, tmp_path: Path) -> None:
    """A run on real data learns."""
    summary["digits"] = checks.digits(pool, GPU, tmp_path / "digits", 50)


def test_checkpoints(pool: Pool, summary: Summary, tmp_path: Path) -> None:
    """They go to the CPU and back, byte by byte."""
    summary["checkpoints"] = checks.checkpoints(pool, GPU, tmp_path)


def test_worlds_leave_nothing(pool: Pool, opened: Opened, summary: Summary) -> None:
    """What is left after the third world was left after the second."""
    summary["leaks"] = checks.leaks(pool, opened, GPU)


def test_nothing_waits_for_the_device(pool: Pool, opened: Opened, summary: Summary) -> None:
    """Up to the agreement on the step torch counts any synchronization as an error."""
    summary["unsynchronized"] = checks.unsynchronized(pool, opened, GPU)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
)
def test_layers_of_transformer_engine(pool: Pool, opened: Opened, summary: Summary) -> None:
    """In bf16 modules are made of them."""
    summary["layers"] = checks.layers(pool, opened, GPU, "TELayerNormColumnParallelLinear")


def test_steps_are_measured(summary: Summary, tmp_path: Path) -> None:
    """The benchmark runs here, on one rank and on four, and megatron-core comes to the same."""
    found = benchmarked.run("cuda", tmp_path / "found.json")
    summary["benchmark"] = found
    benchmarked.check_alone(found)
    benchmarked.check_overhead(found["overhead"])
    if "skipped" not in found["apart"]:
        benchmarked.check_beside(found["apart"])
