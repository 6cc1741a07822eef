"""Soak: does a process hold more after 2,000 steps than after 200?

    python benchmarks/soak.py [--steps 2000]

Trains a small job on four local ranks, with a checkpoint every 50 steps, and prints of each rank the resident memory,
open files, threads, and process groups at both ends. Exit code 1 where one of them grew by more than is allowed:
nothing of files, threads and groups, and of memory what the table of losses and the allocator's slack explain.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import torch.distributed as dist

from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run import train
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


MEMORY_ALLOWED = 24 << 20
"""Bytes by which a rank may grow."""
JOB = """
[modules.vision]
model = "vit"
feeds = ["language"]
grid = { dp = 2 }
options = { layers = 1, hidden = 8, heads = 2, features = 5 }

[modules.language]
model = "gpt"
grid = { pp = 2 }
options = { layers = 2, hidden = 8, heads = 2, vocab = 12 }

[data]
source = "synthetic"
options = { sequence = 12, rows = { vision = [1, 3] } }

[batch]
global_size = 4
microbatches = 2

[train]
checkpoint_every = 50
evaluate = false
"""


@attrs.frozen
class Held:
    """What a process holds."""

    memory: int
    files: int
    threads: int
    groups: int

    @classmethod
    def now(cls) -> "Held":
        """Return what this process holds now."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE"),
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            len(dist.distributed_c10d._world.pg_map),
        )


def in_world(place: RankPlace, job: Job, folder: str, early: int) -> tuple[Held, Held]:
    """Train; return what this rank held after `early` steps and after the last."""
    held, last = dict[int, Held](), job.spec.train.steps - 1

    def watched(runtime: RankRuntime, index: int, *arguments: Any, **named: Any) -> Outcome:
        outcome = train_step(runtime, index, *arguments, **named)
        if index in {early, last}:
            held[index] = Held.now()
        return outcome

    with patch.object(train, "train_step", watched):
        train.in_world(place, job, None, folder)
    return held[early], held[last]


def main() -> int:
    """Train, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    early = steps // 10
    with tempfile.TemporaryDirectory() as name, Pool(4) as pool:
        path = Path(name, "job.toml")
        path.write_text(JOB)
        job = open_job(path, [f"train.steps={steps}"])
        Path(name, "run").mkdir()
        said = pool.run("soak:in_world", 4, job, str(Path(name, "run")), early)
    grown = False
    for rank, (first, last) in enumerate(said):
        print(f"rank {rank}  step {early}: {_words(first)}   step {steps}: {_words(last)}")
        counts = ((one.files, one.threads, one.groups) for one in (first, last))
        before, after = counts
        grown |= last.memory - first.memory > MEMORY_ALLOWED or any(
            b > a for a, b in zip(before, after, strict=True)
        )
    print(
        "it grew"
        if grown
        else f"nothing grew (allowed: {MEMORY_ALLOWED >> 20} MiB, no file, thread or group)"
    )
    return int(grown)


def _words(held: Held) -> str:
    return f"{held.memory / 2**20:.1f} MiB, {held.files} files, {held.threads} threads, {held.groups} groups"


if __name__ == "__main__":
    raise SystemExit(main())
