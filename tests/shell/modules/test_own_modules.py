"""User modules: what breaks their contract with the plan is found when they run."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.world.launch import Pool


BUILDER = """
import torch
from torch import nn


class Rows(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear, self.dtype = nn.Linear(4, 8), dtype

    def forward(self, inputs):
        rows = self.linear(inputs["rows"])
        return {"rows": rows.to(getattr(torch, self.dtype))}


def build(dtype="float32"):
    return Rows(dtype)
"""
JOB = """
[modules.ears]
model = "its_own:build"
width = 8
feeds = ["language"]
[modules.language]
model = "gpt"
options = { layers = 1, hidden = 8, heads = 2, vocab = 8 }
[data]
source = "synthetic"
options = { features = { ears = 4 } }
[batch]
global_size = 2
"""

NUMBERS = itertools.count()


@pytest.fixture
def own_job(tmp_path: Path) -> Callable[..., Job]:
    """A job with a module of its own beside the job file."""
    name = f"its_own_{next(NUMBERS)}"  # Ranks may have imported that of another test.
    (tmp_path / f"{name}.py").write_text(BUILDER)
    (tmp_path / "job.toml").write_text(JOB.replace("its_own", name))
    return lambda *overrides: open_job(tmp_path / "job.toml", overrides)


def test_rows_of_another_dtype_than_the_edge_are_refused(pool: Pool, own_job: Callable[..., Job]) -> None:
    """Rows in another dtype than the target expects raise an error, because it would read them as noise."""
    job = own_job("modules.ears.options.dtype=float64")
    with pytest.raises(WorldError, match=r"module 'ears' returned rows of torch\.float64"):
        pool.run("mimogrid.shell.run.parity:in_world", 2, job, 1)


def test_a_pattern_that_matches_nothing_of_an_own_module_is_refused(
    pool: Pool, own_job: Callable[..., Job]
) -> None:
    """The names of an own module are known once it is built, and then a pattern must match one."""
    job = own_job('modules.ears.trainable=["linear.wieght"]')
    with pytest.raises(PlanError, match=r"'linear\.wieght' matches no parameter of module 'ears'") as refused:
        pool.run("mimogrid.shell.run.parity:in_world", 2, job, 1)
    assert "linear.weight" in str(refused.value)
