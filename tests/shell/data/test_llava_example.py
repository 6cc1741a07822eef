"""The LLaVA example runs from a checkpoint and a store to what transformers answers; at night it learns to read."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.sources.digits import digits
from mimogrid.shell.world.launch import Pool
from running import trained
from scale import nightly
from stores import LLAVA, example, indexed


SETS = re.findall(r"--set ('[^']*'|\S+)", (LLAVA / "run.sh").read_text())
"""What the example sets on top of what `init` writes."""
READ_LEAST = 0.9


@pytest.mark.world
def test_a_few_steps_and_back_to_transformers(
    pool: Pool, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the example with few samples and steps: losses fall, and transformers loads what they leave."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llava, "checkpoint")
    make, source = example("make"), digits(0, ("vision",), ("language",))
    make.store(tmp_path, "train", source, 32)
    records = make.store(tmp_path, "held_out", source.held_out(task="read"), 4)
    indexed(tmp_path / "train.json", tmp_path / "checkpoint", media=tmp_path / "images")
    assert main(["init", "checkpoint", "--out", "job.toml"]) == 0
    small = ("batch.global_size=16", "optimizer.warmup_steps=0", "train.steps=8")
    job = open_job("job.toml", [*(text.strip("'") for text in SETS), *small])
    losses = trained(pool, job, tmp_path / "run")["losses"]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    assert main(["export", "run", "--to", "hf", "tuned"]) == 0
    before, after = (load_file(Path(name, "model.safetensors")) for name in ("checkpoint", "tuned"))
    assert {name for name, tensor in before.items() if torch.equal(tensor, after[name])} == {
        name for name in before if "post_layernorm" in name or "encoder.layers.2." in name
    }
    answers = example("answer").answers(Path("tuned"), records, tmp_path / "images")
    assert len(answers) == 4
    assert all(set(answer.split()) <= set(make.WORDS) for answer in answers)


@nightly
def test_the_whole_example_reads_strips_that_it_has_not_seen(tmp_path: Path) -> None:
    """As a user runs it; see its file."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [str(LLAVA / "run.sh"), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    right, of = re.findall(r"exact (\d+) of (\d+)", ran.stdout)[-1]
    assert int(right) >= READ_LEAST * int(of), ran.stdout
