"""A Slurm cluster for all tests here, or the reason why there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import slurm_cluster
from slurm_cluster import Cluster


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes on loopback; the tests are skipped where a command of Slurm is missing."""
    if absent := slurm_cluster.missing():
        pytest.skip(f"Slurm is not installed: no {', '.join(absent)} (Debian: apt-get install slurm-wlm)")
    yield from slurm_cluster.opened(tmp_path_factory.mktemp("slurm"), ROOT)
