"""The omni example answers and draws on any layout, with the gradients of one process; at night it learns to."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimogrid.core.base.errors import WorldError
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.world.launch import Pool
from scale import nightly


OMNI = Path(__file__).parents[3] / "examples/omni"
SMALL = ("batch.global_size=16", "optimizer.warmup_steps=0", "train.steps=6", "precision=fp64")
ELSEWHERE = (
    "modules.vision.grid={ dp = 1, offset = 0 }",
    "modules.audio.grid={ dp = 2, offset = 0 }",
    "modules.language.grid={ dp = 2, offset = 0 }",
    "modules.generator.grid={ dp = 2, offset = 0 }",
    "batch.microbatches=1",
)
"""All modules on two ranks: no grid is that of the job, and samples have other places in their shares."""
ANSWERS_LEAST, DIGITS_LEAST = 0.9, 0.85
SHORT = """
def build(**options):
    from flow import Flow

    class Short(Flow):
        def _drawn(self, *arguments):
            return super()._drawn(*arguments)[1:]

    return Short(**options)
"""
"""A generator that leaves out the drawing of its first sample."""
LENS = """
def describe(options):
    return {"width": 64}

def build():
    from torch import nn

    class Lens(nn.Module):
        def forward(self, inputs):
            return {"rows": inputs["vision"] * inputs["gain"].repeat_interleave(inputs["lengths"])[:, None]}

    return Lens()

def with_gain(source):
    import torch

    load = source.load
    source.load = lambda i, module: {"gain": torch.ones(1)} if module == "lens" else load(i, module)
    return source

def sums(seed, folder, sequence):
    import sums as usual

    training = with_gain(usual.sums(seed, folder, sequence))
    held_out = training.held_out
    training.held_out = lambda *, task: Plain(with_gain(held_out(task=task)))
    return training

class Plain:
    def __init__(self, questions):
        self._load = questions.load
        for name in ("stop", "describe", "prompt", "answer", "spell", "image"):
            setattr(self, name, getattr(questions, name))

    def load(self, i, module):
        assert module != "generator", "nobody asks for its loss"
        return self._load(i, module)
"""
"""A module between vision and language, which reads a number of each sample beside its rows; nothing is to be drawn."""
OURS = ("short", "lens", "flow", "media", "pencil", "sums")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example with its media."""
    folder = tmp_path_factory.mktemp("omni") / "omni"
    shutil.copytree(OMNI, folder, ignore=shutil.ignore_patterns("media", "__pycache__"))
    runpy.run_path(str(folder / "make.py"))["main"]()
    return folder


@pytest.fixture
def job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The job, small; what it makes importable is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return open_job(folder / "job.toml", SMALL)


@pytest.mark.world
def test_what_is_drawn_does_not_depend_on_the_layout(pool: Pool, job: Job) -> None:
    """Every sample has an answer and a drawing of its own, the same on six ranks as on two that share all modules."""
    said = []
    for overrides in ((), ELSEWHERE):
        laid = open_job(job.path, [*SMALL, *overrides])
        (answers,) = filter(None, pool.run("generated:answered", laid.topology.world_size, laid, "add"))
        said.append(answers)
    six, two = said
    assert 16 == len(six) == len({answer.sample_id for answer in six})
    assert six == two
    drawings = [torch.stack([answer.predictions["generator"] for answer in answers]) for answers in said]
    assert (16, 1, 128) == tuple(drawings[0].shape)
    torch.testing.assert_close(drawings[1], drawings[0], rtol=1e-9, atol=1e-9)
    assert len(drawings[0].flatten(1).unique(dim=0)) == 16


@pytest.mark.world
def test_every_gradient_is_that_of_one_process(pool: Pool, job: Job) -> None:
    """Those of both losses: noise and times belong to samples, not to ranks."""
    (found,) = filter(None, pool.run("mimogrid.shell.run.parity:in_world", 6, job, 1))
    assert found.passed, found
    assert any(one.parameter.startswith("generator.blocks") for one in found.worst)


@pytest.mark.world
def test_where_only_answers_are_asked_for(pool: Pool, job: Job, folder: Path) -> None:
    """A module between reads what is loaded beside its rows, as in training; a module with a loss of its own rests."""
    (folder / "lens.py").write_text(LENS)
    between = (
        "modules.vision.feeds=['lens']",
        "modules.lens={ model = 'lens:build', feeds = ['language'], grid = { offset = 0 } }",
        "data.source='lens:sums'",
    )
    (answers,) = filter(
        None, pool.run("generated:answered", 6, open_job(job.path, [*SMALL, *between]), "add")
    )
    assert 16 == len(answers)
    assert not any(answer.predictions for answer in answers)


@pytest.mark.world
def test_the_report_has_answers_and_drawings(pool: Pool, job: Job, tmp_path: Path) -> None:
    """After a few steps both losses have fallen; what the scores say of drawings stands in the report."""
    said = pool.run("running:briefly", 6, job, None, str(tmp_path))
    report = next(report for report in said if report)
    for losses in report["losses_by_module"].values():
        assert min(losses[-2:]) < losses[0]
    assert {"language", "generator"} == set(report["losses_by_module"])
    assert {"add": {"drawn_digits", "drawn_sums"}} == {t: set(of) for t, of in report["generated"].items()}
    assert b"\x89PNG" == (tmp_path / "predictions.png").read_bytes()[:4]


@pytest.mark.world
def test_a_drawing_for_another_number_of_samples_is_refused(pool: Pool, job: Job, folder: Path) -> None:
    """By the rank that drew, before anybody reads it."""
    (folder / "short.py").write_text(SHORT)
    cut = open_job(job.path, [*SMALL, "modules.generator.model='short:build'"])
    with pytest.raises(WorldError, match="the first dim counts samples"):
        pool.run("generated:answered", 6, cut, "add")


@nightly
def test_the_whole_example_answers_and_draws(tmp_path: Path) -> None:
    """As a user runs it; see its file."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shutil.copytree(OMNI, tmp_path / "omni", ignore=shutil.ignore_patterns("media", "__pycache__"))
    command = [str(tmp_path / "omni/run.sh"), "--set", f"train.run_dir={tmp_path / 'run'}"]
    subprocess.run(command, env=environment, check=True)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["accuracy"] >= ANSWERS_LEAST
    assert report["generated"]["add"]["drawn_digits"] >= DIGITS_LEAST
