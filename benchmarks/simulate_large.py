"""Simulate large worlds: CPU time, memory and classes of ranks, by size of the world.

    python benchmarks/simulate_large.py              # about 100, 1,000 and 10,000 ranks, 512 microbatches
    python benchmarks/simulate_large.py 1000 --microbatches 64
    python benchmarks/simulate_large.py 1000 10000 --microbatches 8 --ragged

The job is that of `large`; all samples are alike, or ragged and at times absent, so that no two dp ranks are alike.
Each world is simulated in a process of its own, from the samples' descriptions to the idle times and the peaks of
memory of all ranks, with the costs assumed and finite bandwidth.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time

import attrs
import plan_large

import large
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.simulate.memory import peak_bytes
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.unevenness import DurationFactors
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.parse import parse


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("ranks", type=int, nargs="*", default=[100, 1_000, 10_000])
    parser.add_argument("--microbatches", type=int, default=512)
    parser.add_argument("--ragged", action="store_true", help="samples of drawn sizes")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.ranks[0], args.microbatches, ragged=args.ragged)))
        return
    print(f"{args.microbatches} microbatches{', ragged samples' * args.ragged}")
    for ranks in args.ranks:
        command = [sys.executable, __file__, str(ranks), "--microbatches", str(args.microbatches), "--one"]
        command += ["--ragged"] * args.ragged
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(
            f"{found['ranks']:>8,} ranks  {found['classes']:>4} classes  {found['samples']:>9,} samples  "
            f"{found['seconds']:6.2f} s CPU  {found['bytes'] / 2**20:6.0f} MiB  "
            f"ratio to the lower bound {found['ratio']:.4f}"
        )


def measure(ranks: int, microbatches: int, *, ragged: bool) -> dict[str, float]:
    """Simulate a world of about so many ranks; return what it took."""
    spec = large.job(ranks, microbatches)
    topology = parse(spec, large.FACTS)
    gc.disable()  # as the command does
    begin = time.process_time()
    alike = {"vision": 4, "audio": 2}
    samples = (
        plan_large.samples(spec)
        if ragged
        else tuple(Sample(id=i, length=8, rows=alike) for i in range(spec.batch.global_size))
    )
    step = step_of(topology, samples)
    program = plan_step(step, order_of(topology))
    costs = attrs.evolve(assumed(topology), edge=EdgeCosts(latency=1e-3, bytes_per_s=1e6))
    timeline = simulate(
        program, costs, duration_factors=DurationFactors(step, ragged=True) if ragged else None
    )
    peaks = peak_bytes(timeline)
    seconds = time.process_time() - begin
    assert len(timeline.idle_s_by_rank) == len(peaks) == len(topology.ranks)
    return {
        "ranks": len(topology.ranks),
        "classes": len(timeline.classes.members),
        "samples": len(samples),
        "seconds": seconds,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "ratio": timeline.ratio_to_bound,
    }


if __name__ == "__main__":
    main()
