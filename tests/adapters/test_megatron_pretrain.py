"""A program in the shape of Megatron's own: its losses are those of Megatron's schedule, and it resumes bitwise."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import megatrons
import pretraining
from mimogrid.shell.world.launch import Pool
from scale import nightly, nightly_only


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


WIDE = [
    {"encoder_tp": 2, "encoder_dp": 2, "llm_offset": 4, "llm_tp": 2, "llm_dp": 1, "llm_pp": 2},
    {"encoder_tp": 2, "encoder_dp": 2, "llm_offset": 4, "llm_tp": 2, "llm_dp": 2},
]
"""Grids of eight ranks."""


def run_of(pool: Pool, weights: Any, grids: Mapping[str, int], **options: object) -> list[pretraining.Run]:
    """Run the program on the ranks of its grids."""
    ranks = grids["llm_offset"] + grids["llm_tp"] * grids["llm_dp"] * grids.get("llm_pp", 1)
    found: list[pretraining.Run] = pool.run(
        "pretraining:pretrained", ranks, written(**grids, **options), weights, "fp64"
    )
    return found


@pytest.mark.world
@pytest.mark.parametrize(
    "grids",
    [
        {"encoder_tp": 1, "encoder_dp": 2, "llm_offset": 2, "llm_tp": 1, "llm_dp": 1, "llm_pp": 2},
        *nightly_only(WIDE),
    ],
)
def test_a_program_trains_as_under_megatron(pool: Pool, grids: dict[str, int]) -> None:
    """Losses are those of its schedule on one process."""
    with megatrons.alone():
        expected, weights = pretraining.by_megatron(written(**grids))
    assert expected[-1] < expected[0]
    runs = run_of(pool, weights, grids)
    for one in runs:
        assert one.losses == [None] * 4 or one.losses == pytest.approx(expected, rel=1e-9)
    assert sum(one.losses[0] is not None for one in runs) == grids["llm_tp"] * grids["llm_dp"]


@nightly
@pytest.mark.world
@pytest.mark.parametrize("grids", WIDE)
def test_a_program_that_resumes_is_one_that_did_not_stop(
    pool: Pool, tmp_path: Path, grids: dict[str, int]
) -> None:
    """Its checkpoints are Megatron's; losses and weights behind them are the same to the last bit."""
    with megatrons.alone():
        _, weights = pretraining.by_megatron(written(**grids))
    whole = run_of(pool, weights, grids, save=tmp_path, save_interval=2)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    again = run_of(pool, weights, grids, load=tmp_path)
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
