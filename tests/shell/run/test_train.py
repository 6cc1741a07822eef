"""A run from the job file to what it leaves in its folder, in local worlds and under torchrun."""

import itertools
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool
from scale import nightly, nightly_only


ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "examples" / "digits" / "job.toml"
TRAIN = "running:briefly"
SMALL = "batch.global_size=16"
COMMON = ("train.steps=3", "precision=fp64", "optimizer.warmup_steps=1")

Trained = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def trained(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train the digits job with overrides; return its report and its folder."""

    def train(*overrides: str) -> tuple[dict[str, Any], Path]:
        job = open_job(DIGITS, [SMALL, *overrides])
        folder = tmp_path_factory.mktemp("run")
        size = job.topology.world_size
        reports = pool.run(TRAIN, size, job, None, str(folder))
        return next(report for report in reports if report), folder

    return train


@pytest.fixture(scope="module")
def usual(trained: Trained) -> tuple[dict[str, Any], Path]:
    """The job under its own layout, which others are compared with."""
    return trained(*COMMON)


def test_a_run_leaves_all_that_the_design_names(trained: Trained) -> None:
    """Report, metrics, weights, trace, pictures, logs and TensorBoard events are there, and agree."""
    report, folder = trained("train.steps=3")
    assert 3 == report["steps"] == len(report["losses"]) == len(report["losses_by_module"]["language"])
    assert report == json.loads((folder / "report.json").read_text())
    assert {"0", "1", "2", "3"} == set(report["busy_fraction"]) == set(report["peak_bytes"])
    assert all(0 < fraction < 1 for fraction in report["busy_fraction"].values())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert report["losses"] == [line["loss"] for line in lines]
    modes = {(folder / name).stat().st_mode for name in ("report.json", "weights.safetensors")}
    assert 1 == len(modes)
    assert b"\x89PNG" == (folder / "predictions.png").read_bytes()[:4]
    assert 4 == len(list((folder / "logs").glob("rank-*.jsonl")))
    assert 1 == len(list((folder / "tensorboard").glob("events.*")))
    names = {event["name"] for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"vision.0 F0", "language.1 B3"} <= names
    drawn = (folder / "timeline.svg").read_text()
    assert all(
        f"rank {rank}  {stage}  {which}<" in drawn
        for rank, stage in ((0, "vision.0"), (3, "language.1"))
        for which in ("planned", "measured")
    )


def test_a_profile_reads_like_the_program(trained: Trained) -> None:
    """Its ranges are the actions of the program, in order and none within another; other steps and ranks have none."""
    wanted = ("train.profile={steps = [1, 2], ranks = [0, 3]}", "train.steps=3", "train.evaluate=false")
    _, folder = trained(*wanted)
    job = open_job(DIGITS, [SMALL])
    written = {path.name: json.loads(path.read_text()) for path in (folder / "profiles").iterdir()}
    assert {f"step-{step}-rank-{rank}.json" for step in (1, 2) for rank in (0, 3)} == set(written)
    for name, trace in written.items():
        step, rank = map(int, re.findall(r"\d+", name))
        planned = list(map(str, job.program_of(job.step(step)).of(rank)))
        ranges = sorted(
            (event["ts"], event["ts"] + event["dur"], event["name"])
            for event in trace["traceEvents"]
            if event.get("cat") == "user_annotation" and event["name"] in planned
        )
        assert planned == [name for _, _, name in ranges]
        assert all(end <= begin for (_, end, _), (begin, _, _) in itertools.pairwise(ranges))
        assert any(event["name"] == "aten::mm" for event in trace["traceEvents"])


def test_final_weights_have_every_parameter_once_and_whole(trained: Trained) -> None:
    """The file of weights holds exactly the parameters of the plan, at full shape, by name."""
    _, folder = trained("train.steps=1", "train.evaluate=false", "modules.language.grid.tp=2")
    topology = open_job(DIGITS).topology
    planned = {
        f"{module.name}.{parameter.name}": parameter.shape
        for module in topology.modules.values()
        for parameter in module.parameters
    }
    assert planned == {n: tuple(t.shape) for n, t in load_file(folder / "weights.safetensors").items()}


@pytest.mark.parametrize(
    "layout",
    [
        ["modules.vision.grid.dp=3", "modules.language.grid.pp=1", "modules.language.grid.dp=2"],
        ["modules.vision.grid.offset=0", "modules.language.grid.offset=1"],
        *nightly_only(
            [["modules.vision.grid.tp=2", "modules.vision.grid.dp=1", "modules.vision.microbatches=8"]]
        ),
    ],
)
def test_any_layout_trains_the_same_model(
    trained: Trained, usual: tuple[dict[str, Any], Path], layout: list[str]
) -> None:
    """After some steps in fp64 the weights of two layouts agree, and so do their answers."""
    report, folder = usual
    other, other_folder = trained(*COMMON, *layout)
    assert pytest.approx(report["losses"], rel=1e-12) == other["losses"]
    assert report["accuracy"] == other["accuracy"]
    ours, theirs = (load_file(f / "weights.safetensors") for f in (folder, other_folder))
    assert 1e-9 > max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_two_runs_are_bitwise_equal(trained: Trained) -> None:
    """The same job trains to the same bits."""
    first, second = (trained("train.steps=3", "train.evaluate=false") for _ in range(2))
    assert first[0]["losses"] == second[0]["losses"]
    assert (first[1] / "weights.safetensors").read_bytes() == (second[1] / "weights.safetensors").read_bytes()


@nightly
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_on_one_node_and_on_two_trains_to_the_same_bits(
    trained: Trained, tmp_path: Path, nodes: int
) -> None:
    """Built-in launch, one torchrun agent and two agents on loopback give bitwise the same losses."""
    overrides = [SMALL, "train.steps=3", "train.evaluate=false"]
    ours, _ = trained(*overrides)
    meeting = [f"--nnodes={nodes}", f"--nproc-per-node={4 // nodes}", "--rdzv-backend=c10d"]
    meeting.append(f"--rdzv-endpoint=127.0.0.1:{_free_port()}")
    _await([_torchrun(overrides, tmp_path, *meeting, f"--node-rank={node}") for node in range(nodes)])
    assert ours["losses"] == json.loads((tmp_path / "report.json").read_text())["losses"]


def test_a_folder_of_another_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """A named folder that is not empty ends the command with code 2, and nothing in it is touched."""
    (tmp_path / "kept").write_text("mine")
    done = _mimogrid("train", str(DIGITS), "--set", f"train.run_dir={tmp_path}")
    assert 2 == done.returncode
    assert "is not empty" in done.stderr
    assert "--resume" in done.stderr
    assert ["kept"] == [path.name for path in tmp_path.iterdir()]


def test_resuming_a_finished_run_does_nothing(trained: Trained) -> None:
    """A finished run stays as it is, with exit code 0."""
    _, folder = trained("train.steps=1", "train.evaluate=false")
    before = (folder / "report.json").read_bytes()
    done = _mimogrid("train", str(DIGITS), "--resume", str(folder), "--set", "train.steps=1", "--set", SMALL)
    assert 0 == done.returncode
    assert "is finished" in done.stderr
    assert before == (folder / "report.json").read_bytes()


def _mimogrid(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mimogrid", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _torchrun(overrides: list[str], folder: Path, *launcher: str) -> "subprocess.Popen[str]":
    settings = [f"train.run_dir={folder}", *overrides]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "mimogrid", "train"]
    command += [str(DIGITS), *(word for setting in settings for word in ("--set", setting))]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _await(agents: "list[subprocess.Popen[str]]") -> None:
    for agent in agents:
        _, errors = agent.communicate(timeout=200)
        assert 0 == agent.returncode, errors


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
