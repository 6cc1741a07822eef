"""What is measured on a GPU can be measured on the CPU."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarked
from mimogrid.shell.world.launch import Pool


pytestmark = pytest.mark.world


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes."""
    return benchmarked.run("cpu", tmp_path_factory.mktemp("gpu") / "found.json")


def test_alone(found: dict[str, Any]) -> None:
    """On one rank MimoModel has the same loss and gradient norm as the job."""
    benchmarked.check_alone(found)


def test_apart(found: dict[str, Any]) -> None:
    """On four ranks megatron-core's schedule comes to the same, too; one that has none is told by its version."""
    apart = found["apart"]
    if "skipped" in apart:
        assert importlib.metadata.version("megatron-core") in apart["skipped"]
        pytest.skip(apart["skipped"])
    benchmarked.check_beside(apart)


@pytest.mark.parametrize("layout", ["encoder dp 2, language pp 2", "encoder tp 2, language tp 2"])
def test_peer(layout: str, tmp_path: Path) -> None:
    """Beside megatron-core's own schedule the loss is the same, also where Megatron pads ragged samples."""
    there = importlib.metadata.version("megatron-core")
    if there.startswith("0.16."):
        pytest.skip(f"megatron-core {there} has no schedule for several modules")
    command = [sys.executable, "-W", "ignore", str(benchmarked.PEER), "--pairs", "1", "--layout", layout]
    out = tmp_path / "peer.txt"
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=900)
    for line in out.read_text(encoding="utf-8").splitlines()[-2:]:
        ours, theirs, *seconds = map(float, line.split("equal")[-1].split("ragged")[-1].split()[:4])
        assert pytest.approx(ours, rel=1e-6) == theirs
        assert all(second > 0 for second in seconds)


def test_overhead(found: dict[str, Any]) -> None:
    """The messages that are timed alone are those of the plan."""
    benchmarked.check_overhead(found["overhead"])


def test_messages_of_megatrons_are_copies(pool: Pool) -> None:
    """Through host memory a message is what its tensor was when it was posted."""
    assert [[1.0] * 3, [0.0] * 3] == pool.run("benchmarked:exchange", 2)
