"""What ``nox -s gpu`` runs on a GPU holds on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import devices_checked as checks
from devices_checked import Opened, Where
from mimogrid.shell.launch import Pool


pytestmark = pytest.mark.world
CPU = Where(shared=None, own=None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parity(pool: Pool, opened: Opened, precision: str) -> None:
    """Worlds of eight, four and one."""
    assert 3 == len(checks.parity(pool, opened, CPU, precision))


def test_runs(pool: Pool, tmp_path: Path) -> None:
    """A run learns, and its checkpoints go from device to device."""
    checks.digits(pool, CPU, tmp_path / "digits", 5)
    checks.checkpoints(pool, CPU, tmp_path)


def test_worlds_leave_nothing(pool: Pool, opened: Opened) -> None:
    """No memory, no group."""
    assert {"bytes_left": 0} == checks.leaks(pool, opened, CPU)


def test_programs(pool: Pool, opened: Opened) -> None:
    """They run in two parts, and on local layers."""
    checks.unsynchronized(pool, opened, CPU)
    checks.layers(pool, opened, CPU, "CoreAttention")


def test_a_step_beside_megatrons(tmp_path: Path) -> None:
    """The benchmark runs without a GPU, and MimoModel has the same loss and gradient norm on the same networks."""
    program = Path(__file__).parents[1] / "benchmarks" / "gpu" / "step.py"
    options = ("--tiny", "--device", "cpu", "--precision", "fp32", "--pairs", "1", "--steps", "1")
    command = [sys.executable, "-W", "ignore", str(program), *options, "--json", str(tmp_path / "step.json")]
    subprocess.run(command, check=True, env=os.environ, capture_output=True, timeout=200)
    (found,) = json.loads((tmp_path / "step.json").read_text())["jobs"]
    assert 0 < found["mfu"] < 1
    beside = found["mimo_model"]
    if "skipped" in beside:
        pytest.skip(beside["skipped"])
    for ours, theirs in (beside["loss"], beside["gradient_norm"]):
        assert pytest.approx(theirs, rel=1e-5) == ours
