"""What the tests share: one pool of processes for every world, and jobs opened from a spec."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from scale import drawn


if TYPE_CHECKING:  # The core's tests run where there is no torch.
    from mimogrid.core.job.spec import JobSpec
    from mimogrid.shell.job.jobs import Job
    from mimogrid.shell.run.parity import ParityReport
    from mimogrid.shell.world.launch import Pool
    from updates import Seen


# Before anything imports torch: the workers share the cores already.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing here is compiled, and torch's compiler takes two seconds to import where megatron-core asks for it.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# What is tested is what is computed, and not how long that takes where much else runs.
settings.register_profile("scaled, without a clock", settings(), deadline=None, max_examples=drawn(50))
settings.load_profile("scaled, without a clock")


IMPORTED = (
    "hypothesis.strategies",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "mimogrid.shell.run.preload",
)
"""What ranks import, now or when they need it; every test that kills a rank starts new ones. The last one freezes."""


@pytest.fixture(scope="session")
def pool() -> "Iterator[Pool]":
    """Eight processes that run one world after the other, forked from one that has imported everything."""
    from mimogrid.shell.world.launch import Pool  # noqa: PLC0415

    with Pool(8) as pool:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
        yield pool


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[JobSpec], Job]":
    """Open a spec as the job of a file; every rank reads that file."""
    from mimogrid.shell.job import jobfile  # noqa: PLC0415
    from mimogrid.shell.job.jobs import open_job  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("jobs")

    def open_spec(spec: "JobSpec") -> "Job":
        path = Path(folder, f"{len(list(folder.iterdir()))}.toml")
        path.write_text(jobfile.dump(spec))
        return open_job(path)

    return open_spec


@pytest.fixture(scope="session")
def parity(pool: "Pool", opened: "Callable[[JobSpec], Job]") -> "Callable[[JobSpec], ParityReport]":
    """Compare the layout of a spec with the same model on one process."""

    def compare(spec: "JobSpec", *, steps: int = 1) -> "ParityReport":
        job = opened(spec)
        said = pool.run("mimogrid.shell.run.parity:in_world", job.topology.world_size, job, steps)
        (found,) = [one for one in said if one is not None]
        return found

    return compare


@pytest.fixture(scope="session")
def train(pool: "Pool", opened: "Callable[[JobSpec], Job]") -> "Callable[..., list[Seen]]":
    """Train steps of a job (`updates.train`); return what each rank that is not idle saw."""

    def train(spec: "JobSpec", steps: range = range(3), *arguments: Any) -> "list[Seen]":
        job = opened(spec)
        said = pool.run("updates:train", job.topology.world_size, job, steps, *arguments)
        return [seen for seen in said if seen is not None]

    return train
