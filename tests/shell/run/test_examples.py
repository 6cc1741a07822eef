"""The examples run, and the files that launch a job on a cluster start what it needs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool


ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
PROGRAMS = ("megatron_mimo.py", "own_module.py")
FAKES = {
    "scontrol": 'echo "node-a"; echo "node-b"',
    "srun": 'for i in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$i SLURM_LOCALID=$((i % 4)) "$@"; done',
    "mimogrid": 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*"',
}
"""Commands of a cluster, as far as the batch file uses them."""


@pytest.mark.world
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_train(pool: Pool, program: str) -> None:
    """On four ranks, of which those that see losses see the same fall."""
    said = [losses for losses in pool.run("hosts:example", 4, str(EXAMPLES / program), 12) if losses]
    assert all(said[0] == losses for losses in said)
    assert 12 == len(said[0])
    assert said[0][-1] < 0.95 * said[0][0]


def batch_file(tmp_path: Path, **variables: str) -> list[list[str]]:
    """Run the batch file for Slurm among fakes; return what each rank was started with, word by word."""
    for name, body in FAKES.items():
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/bash\n{body}\n")
        fake.chmod(0o755)
    text = (EXAMPLES / "slurm/train.sbatch").read_text()
    (tasks,) = re.findall(r"^#SBATCH --ntasks=(\d+)$", text, re.MULTILINE)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    slurm = {"SLURM_NTASKS": tasks, "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[a-b]"}
    said = subprocess.run(
        ["bash", EXAMPLES / "slurm/train.sbatch"],
        env={"PATH": path, **slurm, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split() for line in said.stdout.splitlines()]


def test_slurm_starts_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as the job needs, each told its place, with arguments that mimogrid understands."""
    job = open_job(EXAMPLES / "three/job.toml")
    started = batch_file(tmp_path)
    assert [[str(rank), "7", str(rank % 4)] for rank in range(job.topology.world_size)] == [
        words[:3] for words in started
    ]
    assert {("node-a", "20123")} == {tuple(words[3:5]) for words in started}
    (command,) = {tuple(words[5:]) for words in started}
    assert ("train", "examples/three/job.toml", "--set", 'train.run_dir="runs/three-123"') == command
    assert 0 == main(["check", str(ROOT / command[1]), *command[2:]]), capsys.readouterr().err


def test_slurm_goes_on_with_a_run(tmp_path: Path) -> None:
    """Where the folder is there already, the job was queued again."""
    (tmp_path / "mine").mkdir()
    (command,) = {tuple(words[5:]) for words in batch_file(tmp_path, RUN="mine")}
    assert ("train", "examples/three/job.toml", "--resume", "mine") == command


def test_slurm_asks_for_enough_nodes() -> None:
    """And for no more."""
    text = (EXAMPLES / "slurm/train.sbatch").read_text()
    asked = {
        name: int(value) for name, value in re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", text, re.MULTILINE)
    }
    assert -(-asked["ntasks"] // asked["ntasks-per-node"]) == asked["nodes"]
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]


def test_kubernetes_starts_every_rank() -> None:
    """As many pods, all at once, as the job needs ranks; and each is told so."""
    text = (EXAMPLES / "kubernetes/job.yaml").read_text()
    size = open_job(EXAMPLES / "three/job.toml").topology.world_size
    for pattern in (r"completions: (\d+)", r"parallelism: (\d+)", r"WORLD_SIZE\s+value: \"(\d+)\""):
        assert [str(size)] == re.findall(pattern, text), pattern
    (argument,) = re.findall(r"- (--set=.*)", text)
    assert 0 == main(["check", str(EXAMPLES / "three/job.toml"), argument])


@pytest.mark.parametrize("file", ["slurm/train.sbatch", "kubernetes/job.yaml"])
def test_launch_files_say_what_a_line_is_for(file: str) -> None:
    """At least one comment for every four lines; and a size that is no power of two."""
    lines = [line.strip() for line in (EXAMPLES / file).read_text().splitlines() if line.strip()]
    comments = [line for line in lines if line.startswith("# ")]
    assert 4 * len(comments) >= len(lines)


def test_what_the_page_shows_is_what_runs() -> None:
    """Every piece of code in it stands in an example, as it is."""
    page = (ROOT / "docs/adapters.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    programs = "".join((EXAMPLES / name).read_text() for name in PROGRAMS)
    assert shown
    assert all(piece in programs for piece in shown)
