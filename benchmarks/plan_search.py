"""Search layouts: CPU seconds of `mimogrid plan` on the example jobs, on one core.

    python benchmarks/plan_search.py [--out FILE]

The search ends by its proof or by a budget of simulated actions, never by a clock, so that its result is the same on
every machine; this says what the budget comes to on yours.
"""

import argparse
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

from mimogrid.core.plan.layouts import Question
from mimogrid.core.plan.planner import plan
from mimogrid.core.pricing.machine import machine_of
from mimogrid.shell.job.jobs import open_job


PLANS = Path(__file__).parents[1] / "examples/plans"
JOBS = (
    ("clip_llama7b_8.toml", 8, "h100"),
    ("qwen27b_24.toml", 24, "h200"),
    ("clip_llama7b_64.toml", 64, "h100"),
    ("omni72b_1172.toml", 1172, "h100"),
)


def main() -> None:
    """Print the table, with the machine; write both, if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the table there, too")
    out = parser.parse_args().out
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    cores, python = os.cpu_count(), platform.python_version()
    say(
        f"{platform.machine()}, {cores} cores, {platform.system()}; Python {python}, attrs {version('attrs')}"
    )
    say(f"{'job':24}{'GPUs':>6}{'CPU s':>8}{'looked at':>11}{'simulated':>11}{'gap':>7}  step")
    for name, gpus, gpu in JOBS:
        say(searched(name, gpus, gpu))
    if out:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def searched(name: str, gpus: int, gpu: str) -> str:
    """Search the layouts of a job; return its row."""
    job = open_job(PLANS / name)
    machine = machine_of(gpu, job.spec.precision)
    begin = time.process_time()
    found = plan(
        Question(
            spec=job.spec,
            facts=job.topology.source,
            samples=job.step(0).samples,
            machine=machine,
            gpus=gpus,
            memory_bytes=machine.accelerator.memory_bytes,
        )
    )
    seconds = time.process_time() - begin
    assert found.best
    counts = f"{found.looked_at:>11,}{found.simulated:>11}{found.gap:>7.1%}"
    return f"{name:24}{gpus:>6}{seconds:>8.1f}{counts}  {found.best.step_s:.4g} s"


if __name__ == "__main__":
    main()
