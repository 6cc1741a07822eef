"""What share of a step a rank waits for data, without and with workers, for a source that takes half a step.

    python benchmarks/loading.py [--steps 60] [--burn]

Measures what a step takes whose samples are there at once. Then each sample takes so long that all of a step take half
of that: the source sleeps, as one that waits for a disk or a network, or with --burn computes, as one that decodes,
for which there must be a core. Prints the share of waiting and the time of a step for each kind and number of workers.
"""

import argparse
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool


SOURCE = """
import time
from mimogrid.core.base.samples import Sample

class Slow:
    def __init__(self, sample_s, burns):
        self.sample_s, self.burns = sample_s, burns

    def describe(self, sample_id):
        return Sample(id=sample_id, length=64, rows={})

    def load(self, sample_id, module):
        import torch
        if self.burns:
            end = time.thread_time() + self.sample_s
            while time.thread_time() < end:
                sum(range(1000))
        else:
            time.sleep(self.sample_s)
        tokens = torch.randint(1, 512, (64,), generator=torch.Generator().manual_seed(sample_id))
        return {"tokens": tokens, "labels": tokens.roll(-1), "loss_weights": torch.ones(64)}

def slow(sequence, sample_s, burns):
    return Slow(sample_s, burns)
"""
JOB = """
[modules.language]
model = "gpt"
options = { layers = 4, hidden = 128, heads = 4, vocab = 512 }
[data]
source = "slow_samples:slow"
options = { sequence = 64, sample_s = 0.0, burns = false }
[batch]
global_size = 16
microbatches = 4
[train]
evaluate = false
"""
READS = 2
"""How often a stage that is the first and the last reads a sample. Without workers it is loaded each time."""


def main() -> None:
    """Print a line for each way to load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--burn", action="store_true")
    args = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"load average {os.getloadavg()[0]:.1f} before, {args.steps} steps of 16 samples in 4 microbatches")
    with tempfile.TemporaryDirectory() as name, Pool(1) as pool:
        folder = Path(name)
        (folder / "slow_samples.py").write_text(SOURCE)
        (folder / "job.toml").write_text(JOB)
        step_s = trained(pool, folder, args.steps)["step_s"]
        print(f"{'no delay':24} {1e3 * step_s:7.1f} ms a step")
        slow = f"data.options.sample_s={step_s / 2 / 16}", f"data.options.burns={str(args.burn).lower()}"
        print(f"samples of a step then take {1e3 * step_s / 2:.1f} ms, each read {READS} times")
        for workers, kind in ((0, "thread"), (1, "thread"), (1, "process"), (2, "process")):
            found = trained(
                pool, folder, args.steps, *slow, f"data.workers={workers}", f'data.worker_kind="{kind}"'
            )
            way = f"{workers} workers, {kind}" if workers else "no workers"
            share = 100 * found["waiting_for_data"]
            print(f"{way:24} {1e3 * found['step_s']:7.1f} ms a step, waits for data {share:6.2f} % of it")
    print(f"load average {os.getloadavg()[0]:.1f} after")


def trained(pool: Pool, folder: Path, steps: int, *overrides: str) -> dict[str, Any]:
    """Train the job; return its report."""
    job = open_job(folder / "job.toml", [f"train.steps={steps}", *overrides])
    with tempfile.TemporaryDirectory() as run:
        (report,) = pool.run("mimogrid.shell.run.train:in_world", 1, job, None, run)
    return dict(report)


if __name__ == "__main__":
    main()
