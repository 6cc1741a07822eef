"""The examples run, and the files that launch a job on a cluster start what it needs."""

import re
from pathlib import Path

import pytest

from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool


ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
PROGRAMS = ("megatron_mimo.py", "own_module.py")


@pytest.mark.world
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_train(pool: Pool, program: str) -> None:
    """On four ranks, of which those that see losses see the same fall."""
    said = [losses for losses in pool.run("hosts:example", 4, str(EXAMPLES / program), 12) if losses]
    assert all(said[0] == losses for losses in said)
    assert 12 == len(said[0])
    assert said[0][-1] < 0.95 * said[0][0]


def test_slurm_starts_every_rank() -> None:
    """As many as the job needs, on no more nodes than that takes; `nox -s slurm` submits the file."""
    text = (EXAMPLES / "slurm/train.sbatch").read_text()
    asked = {
        name: int(value) for name, value in re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", text, re.MULTILINE)
    }
    assert asked["ntasks"] == open_job(EXAMPLES / "three/job.toml").topology.world_size
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


def test_what_the_pages_show_is_what_runs() -> None:
    """Every piece of code in them stands in an example, as it is."""
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("adapters.md", "megatron.md"))
    shown = re.findall(r"^```python\n(.*?)^```$", pages, re.MULTILINE | re.DOTALL)
    programs = "".join((EXAMPLES / name).read_text() for name in (*PROGRAMS, "megatron_pretrain.py"))
    assert shown
    assert all(piece in programs for piece in shown)
