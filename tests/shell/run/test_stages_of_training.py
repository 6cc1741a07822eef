"""Staged recipes: a run goes on with other parameters that train, or with LoRA that was not there."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool
from running import trained


pytestmark = pytest.mark.world

DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits" / "job.toml"
LR = 1e-3
SETTINGS = [
    "precision=fp64",
    "train.evaluate=false",
    'optimizer={ lr = 1e-3, name = "adamw", clip_norm = 0, weight_decay = 0.1 }',
    "modules.vision.options.hidden=16",
    "modules.language.options.hidden=16",
    "batch.global_size=16",
]
FIRST = ["train.steps=2", 'modules.vision.trainable=["projector.*"]', "modules.language.frozen=true"]
SECOND = ["train.steps=3", 'modules.language.lora={ rank = 2, targets = ["q", "down"] }']
CHANGED = ("modules.vision.trainable", "modules.language")


def test_first_the_projector_then_all(pool: Pool, tmp_path: Path) -> None:
    """What begins to train begins as in a new run: its first update with Adam is one learning rate."""
    first, second = (open_job(DIGITS, [*SETTINGS, *more]) for more in (FIRST, SECOND))
    run = tmp_path / "run"
    trained(pool, first, run)
    before = load_file(run / "weights.safetensors")
    (run / "weights.safetensors").unlink()
    (run / "report.json").unlink()
    losses = trained(pool, second, run, resume=True, changed=CHANGED)["losses"]
    assert 3 == len(losses)
    after = load_file(run / "weights.safetensors")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert {name for name in moved if not moved[name]} == {n for n in before if n.startswith("language.")}
    new = {name for name in after if name not in before}
    assert all(".lora." in name for name in new)
    for name in (n for n in before if n.startswith("vision.") and "projector" not in n):
        decay = 1 - LR * 0.1
        assert LR == pytest.approx(float((after[name] - before[name] * decay).abs().max()), rel=1e-3), name
    for name in (n for n in new if n.endswith(".b")):  # B was zero
        assert LR == pytest.approx(float(after[name].abs().max()), rel=1e-3), name


def test_stages_are_alike_on_every_layout(pool: Pool, tmp_path: Path) -> None:
    """The second stage on other grids, with a shared update: the same losses and weights, and it resumes again."""
    losses, weights = [], []
    others = ["modules.language.grid.pp=1", "modules.language.grid.tp=2", "optimizer.sharded=true"]
    longer = ["train.steps=4"]
    for number, layout in enumerate(([], others)):
        run = tmp_path / f"run-{number}"
        trained(pool, open_job(DIGITS, [*SETTINGS, *FIRST]), run)
        for more, changed in (([], CHANGED), (longer, ())):
            (run / "weights.safetensors").unlink()
            (run / "report.json").unlink()
            job = open_job(DIGITS, [*SETTINGS, *SECOND, *more, *layout])
            report = trained(pool, job, run, resume=True, changed=changed)
        losses.append(report["losses"])
        weights.append(load_file(run / "weights.safetensors"))
    assert pytest.approx(losses[0], rel=1e-9) == losses[1]
    worst = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert 1e-9 > worst


def test_a_second_stage_may_round_the_base(pool: Pool, tmp_path: Path) -> None:
    """Its matrices are those of the first stage, rounded once; on two tp ranks it resumes bitwise."""
    half = ["precision=fp32", "modules.language.lora.base=bf16", "modules.language.grid.pp=1"]
    half += ["modules.language.grid.tp=2", "optimizer.sharded=true"]
    trained(pool, open_job(DIGITS, [*SETTINGS, *FIRST, "precision=fp32"]), tmp_path / "straight")
    before = load_file(tmp_path / "straight" / "weights.safetensors")
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    losses = []
    for run, stops in (("straight", [4]), ("stopped", [3, 4])):
        for stop, changed in zip(stops, (CHANGED, ()), strict=False):
            for name in ("weights.safetensors", "report.json"):
                (tmp_path / run / name).unlink()
            job = open_job(DIGITS, [*SETTINGS, *SECOND, *half, f"train.steps={stop}"])
            report = trained(pool, job, tmp_path / run, resume=True, changed=changed)
        losses.append(report["losses"])
    assert losses[0] == losses[1]
    first, second = (load_file(tmp_path / run / "weights.safetensors") for run in ("straight", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rounded = {name for name, weight in first.items() if weight.dtype is torch.bfloat16}
    assert "language.layers.1.mlp.up.weight" in rounded
    assert all(torch.equal(before[name].bfloat16(), first[name]) for name in rounded)


def test_a_change_that_nobody_named_is_refused(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`inspect` says so before anything starts, and says that it fits where it is named."""
    run = tmp_path / "run"
    trained(pool, open_job(DIGITS, [*SETTINGS, *FIRST, "train.steps=1"]), run)
    overrides = [word for each in (*SETTINGS, *SECOND) for word in ("--set", each)]
    asked = ["inspect", str(run), "--job", str(DIGITS), *overrides]
    assert 2 == main(asked)
    assert "--changed modules.language.lora" in capsys.readouterr().err
    assert 0 == main([*asked, *(word for key in CHANGED for word in ("--changed", key))])
