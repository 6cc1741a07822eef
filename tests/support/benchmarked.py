"""The benchmark of a GPU, run as it is run there: what holds of its results on any machine."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hosts import host
from mimogrid.shell.device.device import Device
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.device.streams import Streams


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAM, PEER = BENCHMARKS / "gpu" / "step.py", BENCHMARKS / "peer" / "peer.py"
COMMIT = "the one under test"
MICROBATCHES, SAMPLES = 4, 2
ROWS, SEQUENCE, WIDTH = 4, 32, 32
"""The sizes of the tiny model: rows of an image, positions of a sequence, and how wide both modules are."""


def run(device: str, out: Path) -> dict[str, Any]:
    """Run the command on its tiny model in fp32; return its parts by name, and the machine."""
    how = ("--tiny", "--device", device, "--precision", "fp32", "--pairs", "2", "--steps", "2")
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *how, "--out", str(out), "--commit", COMMIT]
    subprocess.run(command, check=True, env=os.environ, capture_output=True, timeout=300)
    found = json.loads(out.read_text())
    return {"machine": found["machine"]} | {each["part"]: each for each in found["measured"]}


def check_alone(found: dict[str, Any]) -> None:
    """One rank is measured, and told of with the versions that it ran with."""
    machine, alone = found["machine"], found["alone"]
    assert platform.python_version() == machine["python"]
    for package in ("torch", "megatron-core"):
        assert importlib.metadata.version(package) == machine[package.replace("-", "_")]
    assert COMMIT == machine["commit"]
    assert {"device", "cores", "transformer_engine", "cuda", "driver"} <= machine.keys()
    assert 0 < alone["mfu"] < 1
    assert SAMPLES * MICROBATCHES * SEQUENCE / alone["step_s"] == alone["tokens_per_s"]
    check_beside(alone["mimo_model"])


def check_beside(found: dict[str, Any]) -> None:
    """Megatron comes to the same, and the ratios are told with their spread."""
    for ours, theirs in (found["loss"], found["gradient_norm"]):
        assert abs(ours - theirs) <= 1e-5 * abs(ours)
    least, most = found["theirs_by_ours_spread"]
    assert 0 < least <= found["theirs_by_ours"] <= most


def check_overhead(found: dict[str, Any]) -> None:
    """Two dp ranks send rows and a stage hidden states, each microbatch, and gradients come back; nothing else does."""
    assert 2 * MICROBATCHES * (2 + 1) == found["messages"]
    assert 2 * MICROBATCHES * SAMPLES * (ROWS + SEQUENCE) * WIDTH * 4 == found["bytes"]
    assert 0 < found["messages_alone_of_step"]
    assert 0 < found["post_us_per_message"]
    assert [0, 1, 2, 3] == [each["rank"] for each in found["by_rank"]]
    for each in found["by_rank"]:
        spent = (each["posting_s"], each["waiting_s"], each["computing_s"])
        assert 0 < min(spent)


def exchange(place: RankPlace) -> list[float]:
    """Swap tensors with the other rank through host memory, as Megatron's messages are carried; return what came.

    The tensor is overwritten as soon as it is posted, and what comes goes into one that wants a gradient.
    """
    sys.path.insert(0, str(PROGRAM.parent))
    from carried import Staged  # noqa: PLC0415 -- no part of a package

    posts = Staged(Device(torch.device("cpu"), "gloo", Streams(), stages_through_host=True))
    with host(place):
        group, other = dist.group.WORLD, 1 - place.rank
        mine, came = torch.full((3,), float(place.rank)), torch.full((3,), -1.0, requires_grad=True)
        posted = [posts.isend(mine, other, group), posts.irecv(came, other, group)]
        mine.fill_(-2.0)
        for each in posted:
            each.wait()
        return list(came.tolist())
