"""Balance: idle time by imbalance with samples in their order and assigned by cost, and what assigning itself takes.

    python benchmarks/balance.py [--mix text images audio] [--samples 1024 4096] [--microbatches 16] [--dp 8]
    python benchmarks/balance.py --measured [--mix text images audio] [--samples 64] [--steps 5]

A language model behind two encoders, each on GPUs of its own, under 1F1B; the samples are the mixes of `packing`. The
step is simulated with costs of its total work, so both ways of laying it out compute equally much. Planning is CPU time
of this process: the step laid out in order (descriptions checked and counted), and what assigning adds. Every rank
plans each step once. Even is the step if every compute action took its mean: what the total work allows.

With `--measured` four CPU ranks run the small job of `packing`, all modules on each, and count the CPU time of their
compute actions. The two layouts of one step take turns; numbers are medians over the steps.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from packing import GRIDS, JOB, MIXES, Given, ragged

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BALANCES, BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.pricing.machine import machine_of
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.schedule.orders import Orders
from mimogrid.core.simulate.imbalance import imbalance
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.stage import StageStep
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


FACTS = SourceFacts(sequence=1 << 16, features={"vision": 588, "audio": 588})
"""What the source of the samples would say."""
TIMES = 9


def main() -> None:
    """Print a line for each mix and number of samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--mix", nargs="*", choices=MIXES, default=["text", "images", "audio"])
    parser.add_argument("--samples", type=int, nargs="*")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--dp", type=int, default=8)
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())} (1, 5, 15 minutes) when it began")
    if args.measured:
        print_measured(args.mix, args.samples or [64], args.steps)
        return
    print(f"dp = {args.dp}, {args.microbatches} microbatches")
    print(
        "Idle by imbalance and step over the even step, in order and assigned by cost; planning in order + assigning\n"
    )
    for mix in args.mix:
        for count in args.samples or (512, 1024, 4096):
            print(f"{mix:8}{count:8,}  {measure(mix, count, args.microbatches, args.dp)}", flush=True)


def measure(mix: str, count: int, microbatches: int, dp: int) -> str:
    """Return a line: idle times and steps, and what planning takes."""
    topology, samples = parse(job(count, microbatches, dp), FACTS), ragged(mix, count)
    step = step_of(topology, samples)
    costs = on_machine(step, machine_of("h100", "bf16"), spread=True)
    found = imbalance(step, Orders(topology), costs)
    assert found
    idle, took, even = found.idle_s, found.step_s, found.even_s
    balance = Balance(topology)
    plain_s = seconds(lambda _: in_order(topology, samples))
    assigning_s = seconds(balance.assigned, lambda: in_order(topology, samples))
    return (
        f"idle {idle['none']:9.3f} s {idle['cost']:9.3f} s {idle['cost'] / idle['none']:6.1%}  "
        f"step {took['none'] / even:6.3f} {took['cost'] / even:6.3f} x {even:.3f} s  "
        f"plan {plain_s * 1e3:6.1f} ms + {assigning_s * 1e3:6.1f} ms ({assigning_s / even:.2%} of the step)"
    )


def job(count: int, microbatches: int, dp: int) -> JobSpec:
    """Return the job of a step of `count` samples."""
    vit = {"layers": 24, "hidden": 1024, "heads": 16, "features": 588}
    modules = {
        "vision": ModuleSpec(model="vit", options=Vit(**vit), feeds=("language",), grid=GridSpec(dp=dp)),
        "audio": ModuleSpec(model="vit", options=Vit(**vit), feeds=("language",), grid=GridSpec(dp=dp)),
        "language": ModuleSpec(
            model="gpt",
            options=Gpt(layers=32, hidden=4096, heads=32, vocab=32000),
            grid=GridSpec(tp=2, dp=dp, pp=4),
        ),
    }
    return JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=count, microbatches=microbatches),
        precision="bf16",
    )


def in_order(topology: Topology, samples: tuple[Sample, ...]) -> Step:
    """Return a step in order, with what every step needs of its samples."""
    step = step_of(topology, samples)
    assert step.sizes
    return step


def seconds(task: Callable[[Any], object], prepare: Callable[[], object] = lambda: None) -> float:
    """Return the median CPU seconds of a task on what is prepared for it."""
    found = []
    for _ in range(TIMES):
        prepared = prepare()
        begin = time.process_time()
        task(prepared)
        found.append(time.process_time() - begin)
    return statistics.median(found)


# -- measured ----------------------------------------------------------------------------------------------

RANKS, MICROBATCHES = 4, 4


def print_measured(mixes: Sequence[str], counts: Sequence[int], steps: int) -> None:
    """Print, for each mix and number of samples, what four CPU ranks compute."""
    print(f"{RANKS} CPU ranks, {MICROBATCHES} microbatches; CPU seconds that the ranks compute in a step")
    with Pool(RANKS) as pool:
        for count in counts:
            overrides = (*GRIDS["dp = 4"], f"batch.global_size={count}", f"batch.microbatches={MICROBATCHES}")
            opened = open_job(JOB, overrides)
            for mix in mixes:
                found = pool.run(f"{Path(__file__).stem}:in_world", RANKS, opened, mix, steps)
                for way in BALANCES:
                    busy = [statistics.median(of_rank[way]) for of_rank in found]
                    idle = sum(max(busy) - each for each in busy)
                    ranks = " ".join(f"{each:7.3f}" for each in busy)
                    mean = max(busy) * RANKS / sum(busy)
                    print(
                        f"{mix:8}{count:6}  {way:5} {ranks}  idle {idle:6.3f} s  largest / mean {mean:.3f}",
                        flush=True,
                    )


def in_world(place: RankPlace, opened: Job, mix: str, steps: int) -> dict[str, list[float]]:
    """Return the CPU seconds in which this rank computes, step by step, with samples in order and assigned by cost."""
    samples = ragged(mix, opened.spec.batch.global_size)
    plain = step_of(opened.topology, samples)
    ways = dict(zip(BALANCES, (plain, Balance(opened.topology).assigned(plain)), strict=True))
    found: dict[str, list[float]] = {way: [] for way in ways}
    took = [0.0]
    compute = StageStep.compute

    def timed(stage: StageStep, action: Compute) -> None:
        begin = time.thread_time()
        compute(stage, action)
        took[0] += time.thread_time() - begin

    with open_session(place, opened) as session, patch.object(StageStep, "compute", timed):
        assert session.runtime
        for index in range(steps + 1):
            for way, step in ways.items():
                took[0] = 0.0
                train_step(session.runtime, 0, step, step, update=False, source=Given(samples))
                if index:  # the first warms up
                    found[way].append(took[0])
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
