"""The demonstration for a sceptic shows what it says: ours is exact, and means are off by the ratio of the dp sizes."""

import runpy

import pytest

from demos import PARITY
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool


@pytest.mark.world
def test_means_are_off_by_the_ratio_and_sums_are_not(pool: Pool) -> None:
    """On dp sizes of 3 and 2, with samples of one length."""
    demo = runpy.run_path(str(PARITY))
    job = open_job(demo["JOB"], (*demo["LAYOUT"], demo["DATA"]["samples of one length"]))
    (rules,) = [found for found in pool.run("demos:parity", 5, job) if found]
    for ratio, apart in rules["mimogrid"].values():
        assert pytest.approx(1, abs=1e-12) == ratio
        assert 1e-12 > apart
    assert pytest.approx(2 / 3) == rules["means"]["vision"][0]
    assert pytest.approx(1) == rules["means"]["language"][0]
