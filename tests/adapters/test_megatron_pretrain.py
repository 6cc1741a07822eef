"""A program in the shape of Megatron's own: its losses are those of Megatron's schedule, and it resumes bitwise."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import megatrons
import pretraining
from mimogrid.shell.world.launch import Pool
from scale import nightly_only


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """Give Megatron's grids a world to fit in, without a process group."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "8"}):
        yield


SIZES = {
    "micro-batch-size": 2,
    "global-batch-size": 8,
    "train-iters": 4,
    "log-interval": 0,
    "weight-decay": 0.1,
}


def written(*flags: str, **options: object) -> list[str]:
    """Arguments of the program."""
    named = {**SIZES, **{name.replace("_", "-"): value for name, value in options.items()}}
    return [f"--{name}={value}" for name, value in named.items()] + [f"--{flag}" for flag in flags]


@pytest.mark.world
@pytest.mark.parametrize(
    "grids",
    [
        {"encoder_tp": 2, "encoder_dp": 2, "llm_offset": 4, "llm_tp": 2, "llm_dp": 1, "llm_pp": 2},
        *nightly_only([{"encoder_tp": 2, "encoder_dp": 2, "llm_offset": 4, "llm_tp": 2, "llm_dp": 2}]),
    ],
)
def test_a_program_trains_as_under_megatron(pool: Pool, tmp_path: Path, grids: dict[str, int]) -> None:
    """On eight ranks losses are those of its schedule on one process; a run that resumes is one that did not stop."""
    with megatrons.alone():
        expected, weights = pretraining.by_megatron(written(**grids))
    assert expected[-1] < expected[0]

    def run(*arguments: str) -> list[pretraining.Run]:
        found: list[pretraining.Run] = pool.run("pretraining:pretrained", 8, [*arguments], weights, "fp64")
        return found

    whole = run(*written(save=tmp_path, save_interval=2, **grids))
    for one in whole:
        assert one.losses == [None] * 4 or one.losses == pytest.approx(expected, rel=1e-9)
    assert sum(one.losses[0] is not None for one in whole) == grids["llm_tp"] * grids["llm_dp"]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    again = run(*written(load=tmp_path, **grids))
    for one, other in zip(whole, again, strict=True):
        assert one.losses[2:] == other.losses
        assert one.state.keys() == other.state.keys()
        assert [] == [name for name in one.state if not np.array_equal(one.state[name], other.state[name])]


def test_few_lines_put_it_on_mimogrid() -> None:
    """They are marked, and fewer than 30."""
    marked = re.findall(r"^.*#.*\bmimogrid\b.*$", pretraining.PROGRAM.read_text(), re.MULTILINE)
    named = [
        line
        for line in pretraining.PROGRAM.read_text().splitlines()
        if "import" in line and "mimogrid" in line
    ]
    assert 0 < len(marked) < 30
    assert set(named) <= set(marked)
