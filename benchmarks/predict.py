"""Predicted and real step times: every job is probed, simulated with what was found, and run.

    python benchmarks/predict.py [JOB ...] [--repeat N] [--steps N] [--out FILE]

Without jobs, those in `predict/`, by three kinds. What is asked of their errors, as a median over a kind:

    as many ranks as cores     real networks, two ranks                                  10 %
    timed stages               4 and 8 ranks that sleep where others compute             10 %
    more ranks than cores      real networks, 4 and 8 ranks; printed, and aimed at       20 %

Real steps are those of the loop of `mimogrid train` without what it writes. Prediction and steps are of the same
samples. What else the machine does meanwhile is in the real steps and hardly in the predictions: the load is told, and
a machine under load can make a good prediction look bad.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch

from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.unevenness import DurationFactors
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.probe.results import Probed
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


FOLDER = Path(__file__).with_suffix("")
KINDS = {
    "as many ranks as cores": (0.10, ("gpt-2", "gpt-2-halves", "pair-2")),
    "timed stages": (0.10, ("timed-4", "timed-8")),
    "more ranks than cores": (0.20, ("real-4", "real-8", "tensor-8")),
}
"""What is asked of the median error, and of which jobs."""
WARM_UP = 2


@attrs.frozen
class Compared:
    """A job's step: predicted, and real ones, in seconds."""

    name: str
    ranks: int
    predicted: float
    real: tuple[float, ...]
    cores: float | None

    @property
    def median(self) -> float:
        """The real step."""
        return statistics.median(self.real)

    @property
    def error(self) -> float:
        """By how much the prediction is too long; below 0: too short."""
        return self.predicted / self.median - 1

    def row(self) -> str:
        """Return a line of the table."""
        cores = "-" if self.cores is None else f"{self.cores:.2f}"
        spread = f"{1e3 * min(self.real):.1f} to {1e3 * max(self.real):.1f}"
        return (
            f"{self.name:16}{self.ranks:6}{cores:>7}{1e3 * self.predicted:13.1f}{1e3 * self.median:10.1f}"
            f"{spread:>20}{self.error:+9.1%}"
        )


HEAD = (
    f"{'job':16}{'ranks':>6}{'cores':>7}{'predicted ms':>13}{'real ms':>10}{'real steps ms':>20}{'error':>9}"
)


def in_world(place: RankPlace, job: Job, steps: int) -> list[float] | None:
    """Run some steps; return how long each took on the first rank."""
    with open_session(place, job) as session:
        assert session.runtime is not None
        runtime, seconds = session.runtime, []
        following = job.step(0)
        for index in range(WARM_UP + steps):
            begin = time.perf_counter()
            step, following = following, job.step(index + 1)
            train_step(runtime, index, step, following)
            seconds.append(time.perf_counter() - begin)
    return seconds[WARM_UP:] if place.rank == job.topology.ranks[0] else None


def compare(pool: Pool, path: Path, *, repeat: int, steps: int) -> Compared:
    """Probe, simulate and run a job."""
    job = open_job(path)
    size = job.topology.world_size
    real = _first(pool.run(f"{Path(__file__).stem}:in_world", size, job, steps))
    probed: Probed = _first(pool.run("mimogrid.shell.run.probe.measure:in_world", size, job, repeat))
    predicted = [
        simulate(
            job.program_of(step), probed.costs, duration_factors=DurationFactors(step, ragged=True)
        ).step_s
        for step in (job.step(WARM_UP + i) for i in range(steps))
    ]
    return Compared(path.stem, size, statistics.median(predicted), tuple(real), probed.costs.cores)


def _first(results: Sequence[object]) -> object:
    return next(result for result in results if result is not None)


def _load() -> str:
    return "load " + " ".join(f"{load:.1f}" for load in os.getloadavg())


def main() -> None:
    """Compare all jobs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=5, help="steps that are probed")
    parser.add_argument("--steps", type=int, default=10, help="real steps")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args()
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    cores = len(os.sched_getaffinity(0))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    tell(f"{platform.platform()}, {cores} cores, {versions}; before: {_load()}")
    tell(HEAD)
    kinds = {"": (None, tuple(given.jobs))} if given.jobs else KINDS
    with Pool(8) as pool:
        for kind, (target, jobs) in kinds.items():
            found = []
            for name in jobs:
                path = name if given.jobs else FOLDER / f"{name}.toml"
                found.append(compare(pool, path, repeat=given.repeat, steps=given.steps))
                tell(found[-1].row())
            median = statistics.median(abs(one.error) for one in found)
            asked = f" ({'within' if median <= target else 'BEYOND'} {target:.0%})" if target else ""
            tell(f"{kind or 'all'}: median error {median:.1%}{asked}")
    tell(f"after: {_load()}")
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
