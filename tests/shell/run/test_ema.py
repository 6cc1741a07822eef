"""Running means of the weights: those that a hand computes, however they are sharded, and across resumes."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.checkpoint.manifest import published
from mimogrid.shell.cli.export import export
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool
from running import trained


pytestmark = pytest.mark.world

DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits" / "job.toml"
KEPT = 0.75
SETTINGS = [
    "precision=fp64",
    "train.evaluate=false",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=9",
    f"optimizer.ema={KEPT}",
    "modules.vision.options.hidden=16",
    "modules.language.options.hidden=16",
    "modules.vision.frozen=['input.*']",
    "batch.global_size=16",
]
OTHER = ["modules.language.grid.pp=1", "modules.language.grid.tp=2", "optimizer.sharded=true"]

Weights = Mapping[str, torch.Tensor]


def run(pool: Pool, folder: Path, *overrides: str) -> None:
    """Train three steps, or go on to them."""
    resume = folder.exists()
    if resume:
        (folder / "report.json").unlink()
    trained(pool, open_job(DIGITS, [*SETTINGS, "train.steps=3", *overrides]), folder, resume=resume)


def exported(checkpoint: Path, out: Path, *, ema: bool) -> Weights:
    """The weights of a checkpoint, or their means, by ``module.parameter``."""
    export(checkpoint, out, to="safetensors", bytes_most=1 << 30, ema=ema)
    return {
        f"{path.stem}.{name}": tensor
        for path in sorted(out.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_means_are_those_by_hand(pool: Pool, tmp_path: Path) -> None:
    """They begin with the weights after the first update; what is frozen is as it is. A resume goes on bitwise."""
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    run(pool, whole)
    steps = published(whole / "checkpoints")
    assert 3 == len(steps)
    after = [exported(step, tmp_path / f"weights-{step.name}", ema=False) for step in steps]
    expected = dict(after[0])
    for weights in after[1:]:
        expected = {name: torch.lerp(expected[name], weights[name], 1 - KEPT) for name in expected}
    means = exported(steps[-1], tmp_path / "means", ema=True)
    assert all(torch.equal(expected[name], means[name]) for name in expected)
    assert torch.equal(after[-1]["vision.input.weight"], means["vision.input.weight"])
    assert not torch.equal(after[-1]["language.embedding.weight"], means["language.embedding.weight"])
    run(pool, cut, "train.steps=2")
    shutil.copytree(cut, other)
    run(pool, cut)
    resumed = exported(published(cut / "checkpoints")[-1], tmp_path / "resumed", ema=True)
    assert all(torch.equal(means[name], resumed[name]) for name in means)
    run(pool, other, *OTHER)
    found = exported(published(other / "checkpoints")[-1], tmp_path / "found", ema=True)
    assert 1e-9 > max(float((means[name] - found[name]).abs().max()) for name in means)


def test_a_run_without_means_has_none_to_export(pool: Pool, tmp_path: Path) -> None:
    """It says with which option a run has."""
    run(pool, tmp_path / "run", "train.steps=1", "optimizer.ema=0.0")
    with pytest.raises(PlanError, match=r"a run keeps means with optimizer\.ema"):
        exported(published(tmp_path / "run" / "checkpoints")[-1], tmp_path / "out", ema=True)
