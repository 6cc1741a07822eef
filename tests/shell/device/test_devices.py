"""What ``nox -s gpu`` runs on a GPU holds on the CPU."""

from pathlib import Path

import pytest
import torch

import devices_checked as checks
from devices_checked import Opened, Where
from mimogrid.core.base.errors import PlanError
from mimogrid.shell.device import device as devices
from mimogrid.shell.device.place import QUEUES, prepare
from mimogrid.shell.world.launch import Pool
from scale import nightly_only


pytestmark = pytest.mark.world
CPU = Where(shared=None, own=None)


def test_ranks_are_on_the_cpu(pool: Pool, opened: Opened) -> None:
    """Unless they are told otherwise."""
    every = {("cpu", "gloo")}
    assert {"shared": every, "own": every} == checks.kinds(pool, opened, CPU)


@pytest.mark.parametrize("precision", ["bf16", *nightly_only(["fp32"])])
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


def test_streams_that_share_one_queue_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receive that is posted ahead would stop computing; what a process prepares by itself is not refused."""
    monkeypatch.setenv(QUEUES, "1")
    with pytest.raises(PlanError, match=f"environment.{QUEUES}: is 1: all streams"):
        devices.of(torch.device("cuda", 0))
    monkeypatch.delenv(QUEUES)
    prepare()
    devices._check_queues()
