"""The command `plan`, and the job files that it writes."""

import json
from pathlib import Path

import pytest

from mimogrid.shell.cli.main import main
from mimogrid.shell.job import jobfile


ROOT = Path(__file__).parents[3]
JOB = """
[modules.vision]
model = "vit"
feeds = ["language"]
options = { layers = 2, hidden = 512, heads = 8 }

[modules.language]
model = "gpt"
grid = { pp = 2 }
options = { layers = 4, hidden = 1024, heads = 12, ffn = 4096, vocab = 32000 }

[data]
source = "synthetic"
options = { sequence = 256, rows = { vision = [64, 64] } }

[batch]
global_size = 8
microbatches = 4
"""


@pytest.fixture
def job(tmp_path):
    """A job file of two modules on three ranks."""
    path = tmp_path / "job.toml"
    path.write_text(JOB.replace("heads = 12", "heads = 8"))
    return path


def planned(capsys, *arguments):
    """The exit code of `plan --json`, and what it prints."""
    code = main(["plan", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_winner_is_a_job_that_other_commands_take(job, tmp_path, capsys):
    """It loads to what was planned, is legal, and can be simulated."""
    out = tmp_path / "best.toml"
    code, found = planned(capsys, job, "--gpus", 4, "--gpu", "h100", "--out", out)
    assert 0 == code
    best = found["layouts"][0]
    assert jobfile.dump(jobfile.load(out)) == best["job"]
    for command in ("check", "simulate"):
        assert 0 == main([command, str(out), "--json"])
        capsys.readouterr()


def test_every_layout_says_what_scripts_ask_for(job, capsys):
    """The keys are always there; those of layouts that cannot run are null."""
    _, found = planned(capsys, job, "--gpus", 2, "--gpu", "h100")
    assert found["costs"].startswith("assumed: FLOPs at 50%")
    for layout in found["layouts"]:
        assert {"job", "step_time", "tokens_per_s_per_gpu", "peak_bytes", "reason"} <= set(layout)
    own = [layout for layout in found["layouts"] if layout["own"]]
    assert ["needs 3 GPUs of 2" in layout["reason"] for layout in own] == [True]


def test_illegal_sizes_are_told_with_their_reason(job, capsys):
    """Of eight heads a tensor-parallel size of 16 takes none, but vocab and heads allow 8 within a node."""
    job.write_text(JOB.replace("heads = 12, ffn = 4096", "heads = 4, ffn = 4096"))
    _, found = planned(capsys, job, "--gpus", 8, "--gpu", "h100")
    reasons = [layout["reason"] for layout in found["layouts"] if layout["kind"] == "illegal"]
    assert any("tp=8" in reason and "4" in reason for reason in reasons)


def test_nothing_fits(job, capsys):
    """Exit code 1, with the nearest miss; in words, too."""
    arguments = [job, "--gpus", 2, "--gpu", "h100", "--memory-gb", 0.01]
    code, found = planned(capsys, *arguments)
    assert 1 == code
    assert "short by" in found["nearest_miss"]
    assert 1 == main(["plan", *map(str, arguments)])
    assert "The closest one: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        (["--gpu", "h1000"], "'h1000' is not known"),
        (["--gpu", "h100", "--precision", "fp7"], "'fp7' is no precision of h100"),
        (["--gpu", "h100", "--efficiency", "2"], "is 2.0"),
        (["--gpu", "h100", "--memory-gb", "-1"], "is -1.0"),
    ],
)
def test_wrong_arguments_are_said(job, capsys, more, fact):
    """As problems, with exit code 2."""
    assert 2 == main(["plan", str(job), "--gpus", "4", *more])
    assert fact in capsys.readouterr().err


def test_a_published_layout_is_beaten_per_allocated_gpu(capsys):
    """Seventeen of twenty-four GPUs are active in it."""
    _, found = planned(capsys, ROOT / "examples/plans/qwen27b_24.toml", "--gpus", 24, "--gpu", "h200")
    [own] = [layout for layout in found["layouts"] if layout["own"]]
    assert 17 == own["active_gpus"]
    assert found["layouts"][0]["tokens_per_s_per_gpu"] > own["tokens_per_s_per_gpu"]
