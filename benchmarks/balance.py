"""Balance: idle time by imbalance with samples in their order and dealt by cost, and what dealing itself takes.

    python benchmarks/balance.py [--mix text images audio] [--samples 1024 4096] [--microbatches 16] [--dp 8]

A language model behind two encoders, each on GPUs of its own, under 1F1B; the samples are the mixes of `packing`. The
step is simulated with costs of its total work, so both ways of laying it out compute equally much. Planning is CPU time
of this process: the step laid out in order (descriptions checked and counted), and what dealing adds. Every rank plans
each step once. Even is the step if every compute action took its mean: what the total work allows.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

from packing import MIXES, ragged

from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.pricing.machine import machine_of
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.simulate.imbalance import imbalance
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.parse import parse


FACTS = SourceFacts(sequence=1 << 16, features={"vision": 588, "audio": 588})
"""What the source of the samples would say."""
TIMES = 5


def main() -> None:
    """Print a line for each mix and number of samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--mix", nargs="*", choices=MIXES, default=["text", "images", "audio"])
    parser.add_argument("--samples", type=int, nargs="*", default=[512, 1024, 4096])
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--dp", type=int, default=8)
    args = parser.parse_args()
    print(f"Python {platform.python_version()}; dp = {args.dp}, {args.microbatches} microbatches")
    print(
        "Idle by imbalance and step over the even step, in order and dealt by cost; planning in order + dealing\n"
    )
    for mix in args.mix:
        for count in args.samples:
            print(f"{mix:8}{count:8,}  {measure(mix, count, args.microbatches, args.dp)}", flush=True)


def measure(mix: str, count: int, microbatches: int, dp: int) -> str:
    """Return a line: idle times and steps, and what planning takes."""
    topology, samples = parse(job(count, microbatches, dp), FACTS), ragged(mix, count)
    step = step_of(topology, samples)
    costs = on_machine(step, machine_of("h100", "bf16"), spread=True)
    found = imbalance(step, order_of(topology), costs)
    assert found
    idle, took, even = found.idle_s, found.step_s, found.even_s
    balance = Balance(topology)
    plain_s = seconds(lambda: step_of(topology, samples).sizes)
    dealing_s = seconds(lambda: balance.dealt(step_of(topology, samples)).sizes) - plain_s
    return (
        f"idle {idle['none']:9.3f} s {idle['cost']:9.3f} s {idle['cost'] / idle['none']:6.1%}  "
        f"step {took['none'] / even:6.3f} {took['cost'] / even:6.3f} x {even:.3f} s  "
        f"plan {plain_s * 1e3:6.1f} ms + {dealing_s * 1e3:6.1f} ms ({dealing_s / even:.2%} of the step)"
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


def seconds(task: Callable[[], object]) -> float:
    """Return the median CPU seconds of a task."""
    found = []
    for _ in range(TIMES):
        begin = time.process_time()
        task()
        found.append(time.process_time() - begin)
    return statistics.median(found)


if __name__ == "__main__":
    main()
