"""Many random layouts against one process: ``nox -s parity-long``.

    python tests/long/parity_long.py [--layouts 2000] [--seed 0] [--summary FILE]

Draws jobs from the strategy that the ordinary tests draw from, runs each in fp64 on a pool of local processes,
and prints how many there were, of what, and the worst difference. A failing one is shrunk, and printed as a job
file that `mimogrid parity` takes as it is.
"""

import argparse
import collections
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from layouts import layouts
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.parity import ParityReport
from mimogrid.shell.world.launch import Pool


BATCH = 250
"""Layouts drawn with one seed; the summary is written anew after each batch."""


class Tally:
    """What has been run, and how far it was off at worst."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.loss = self.gradients = 0.0
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, job: Job, report: ParityReport) -> None:
        """Count a layout that agreed."""
        self.counts.update(features(job))
        self.loss = max(self.loss, report.loss)
        self.gradients = max(self.gradients, report.gradients)

    def summary(self) -> str:
        """Return what came of it, as a list in Markdown."""
        machine = f"{os.cpu_count()} cores, {platform.platform()}"
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        kinds = [f"{count} {name}" for name, count in self.counts.most_common() if name != "layouts"]
        lines = (
            f"layouts run: {self.counts['layouts']}, all within 1e-9",
            f"worst difference: loss {self.loss:.2e}, gradients {self.gradients:.2e} (fp64)",
            f"time: {time.monotonic() - self.begun:.0f} s on {machine}, {versions}",
            f"of these: {', '.join(kinds)}",
        )
        return "".join(f"- {line}\n" for line in lines)


def main() -> int:
    """Run the batches; print the summary, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary", type=Path)
    arguments = parser.parse_args()
    tally = Tally()
    with Pool(8) as pool, tempfile.TemporaryDirectory() as folder:
        for first in range(0, arguments.layouts, BATCH):
            count = min(BATCH, arguments.layouts - first)
            run(pool, Path(folder, "job.toml"), tally, count=count, start=arguments.seed + first)
            print(tally.summary(), flush=True)
            if arguments.summary:
                arguments.summary.write_text(HEAD + tally.summary())
    return 0


def run(pool: Pool, path: Path, tally: Tally, *, count: int, start: int) -> None:
    """Draw `count` layouts and compare each; raise for the first, shrunk, that differs."""

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(spec=layouts())
    def check(spec: JobSpec) -> None:
        note(jobfile.dump(spec))
        path.write_text(jobfile.dump(spec))
        job = open_job(path)
        reports = pool.run("mimogrid.shell.run.parity:in_world", job.topology.world_size, job, 1)
        report = next(v for v in reports if v)
        assert report.passed, str(report)
        tally.add(job, report)

    check()


HEAD = """# Random layouts against one process

`nox -s parity-long` draws legal jobs of up to 8 ranks at random and compares the loss and every gradient with the same
model on one process. The last run:

"""


def features(job: Job) -> list[str]:
    """Return what a layout has, in words that are counted."""
    modules = job.topology.modules.values()
    found = ["layouts", job.topology.role(0).layout.value]
    for axis in ("tp", "cp", "pp", "dp"):
        found += [f"with {axis}"] * any(module.grid.extent(axis) > 1 for module in modules)
    written = job.spec.modules.values()
    found += ["with experts"] * any(module.experts for module in modules)
    found += ["with ep"] * any(module.grid.ep > 1 for module in written)
    found += ["sequence parallel"] * any(module.sequence_parallel for module in modules)
    found += ["with own microbatches"] * any(module.microbatches for module in written)
    found += ["recomputing"] * any(module.recompute != "none" for module in written)
    found += ["partly frozen"] * any(module.frozen or module.trainable is not None for module in written)
    found += ["with idle ranks"] * (len(job.topology.ranks) < job.topology.world_size)
    found += [f"of {len(modules)} modules"]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
