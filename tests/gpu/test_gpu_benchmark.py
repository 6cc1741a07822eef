"""What is measured on a GPU can be measured on the CPU."""

import importlib.metadata
from typing import Any

import pytest

import benchmarked
from mimogrid.shell.world.launch import Pool


pytestmark = pytest.mark.world


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes."""
    return benchmarked.run("cpu", tmp_path_factory.mktemp("gpu") / "found.json")


def test_alone(found: dict[str, Any]) -> None:
    """On one rank MimoModel has the same loss and gradient norm as the job."""
    benchmarked.check_alone(found)


def test_apart(found: dict[str, Any]) -> None:
    """On four ranks megatron-core's schedule comes to the same, too; one that has none is told by its version."""
    apart = found["apart"]
    if "skipped" in apart:
        assert importlib.metadata.version("megatron-core") in apart["skipped"]
        pytest.skip(apart["skipped"])
    benchmarked.check_beside(apart)


def test_overhead(found: dict[str, Any]) -> None:
    """The messages that are timed alone are those of the plan."""
    benchmarked.check_overhead(found["overhead"])


def test_messages_of_megatrons_are_copies(pool: Pool) -> None:
    """Through host memory a message is what its tensor was when it was posted."""
    assert [[1.0] * 3, [0.0] * 3] == pool.run("benchmarked:exchange", 2)
