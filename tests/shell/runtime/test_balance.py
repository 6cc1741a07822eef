"""A balanced step computes what the step in order computes: the same loss, and the same gradients."""

from collections.abc import Callable

import attrs
import numpy as np
import pytest

from layouts import job
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from parity import Parity, assert_same
from scale import nightly_only


pytestmark = pytest.mark.world

CLOSE = 1e-9


def assigned(spec: JobSpec) -> JobSpec:
    """The same job with its samples assigned by cost."""
    return attrs.evolve(spec, batch=attrs.evolve(spec.batch, balance="cost"))


@pytest.mark.parametrize(
    "grids",
    [
        "enc(1,1,2)@0 lm(1,1,2)@2",
        "img(1,1,2)@0 aud(1,1,1)@2*2 lm(2,2,1)@4",
        *nightly_only(
            ["enc(1,1,3)@0 lm(1,2,2)@3", "enc(1,1,4)@0 lm(2,1,2)@0", "enc(2,1,2)@0->gen gen(1,2,2)@4"]
        ),
    ],
)
def test_balancing_keeps_the_loss_and_the_gradients(
    pool: Pool, opened: Callable[[JobSpec], Job], grids: str
) -> None:
    """In fp64 both are those of the samples in their order, though dp ranks have other samples."""
    spec = attrs.evolve(job(grids, samples=12), precision="fp64")
    jobs = [opened(spec), opened(assigned(spec))]
    assert jobs[0].step(0).samples != jobs[1].step(0).samples
    found = [
        next(one for one in pool.run("bodies:gradients", each.topology.world_size, each) if one is not None)
        for each in jobs
    ]
    (loss, gradients), (same_loss, same) = found
    assert abs(loss - same_loss) <= CLOSE
    assert gradients.keys() == same.keys()
    largest = max(np.abs(each).max() for each in gradients.values())
    for name, each in gradients.items():
        assert np.abs(each - same[name]).max() <= CLOSE * max(1.0, largest), name


def test_a_balanced_layout_is_the_model(parity: Parity) -> None:
    """It has the gradients of one process, step after step, also where dp sizes do not divide each other."""
    assert_same(parity, assigned(job("enc(1,1,2)@0 lm(1,1,3)@2", samples=8)), steps=2)
