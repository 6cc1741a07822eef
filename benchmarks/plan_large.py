"""Plan large worlds: CPU time of every part of the plan, whole and per rank, by size of the world.

    python benchmarks/plan_large.py              # about 100, 1,000 and 10,000 ranks
    python benchmarks/plan_large.py 1000 --microbatches 26

The job is that of `large`, with rows that are ragged and at times absent: no two dp ranks of an encoder need be
alike. A plan that is linear in the world has about the same microseconds per rank in every column. `one rank` is
what each rank does in every step of training: it lowers its own program.
"""

import argparse
import importlib.metadata
import platform
import time
from collections.abc import Callable

import attrs

import large
from mimogrid.core.base.hashing import draw_integer
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.program.verify import listing_of, verify
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.step.traffic import edge_traffic
from mimogrid.core.topology.groups import channels_of, groups_of
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.roles import RankRole, role_of
from mimogrid.core.topology.topology import Topology


Task = Callable[[], object]
THERE = 7
"""Of ten samples, so many have an image."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("ranks", type=int, nargs="*", default=[100, 1_000, 10_000])
    parser.add_argument("--microbatches", type=int, default=4)
    args = parser.parse_args()
    columns = [measure(ranks, args.microbatches) for ranks in args.ranks]
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mimogrid", "attrs"))
    print(f"{processor()}; Python {platform.python_version()}; {versions}")
    print(f"{args.microbatches} microbatches; CPU milliseconds, and microseconds per rank\n")
    print(f"{'':12}" + "".join(f"{count:>14,} ranks" for _, count in columns))
    for part in columns[0][0]:
        cells = ((seconds[part], seconds[part] / count * 1e6) for seconds, count in columns)
        print(f"{part:12}" + "".join(f"{total * 1e3:10.1f} ms {each:6.1f}" for total, each in cells))


def measure(ranks: int, microbatches: int) -> tuple[dict[str, float], int]:
    """Return the seconds of every part for about so many ranks, and how many they are."""
    spec = large.job(ranks, microbatches)
    topology = parse(spec, large.FACTS)
    step = step_of(topology, samples(spec))
    order = order_of(topology)
    program = plan_step(step, order)
    middle = topology.ranks[len(topology.ranks) // 2]
    tasks: dict[str, Task] = {
        "parse": lambda: parse(spec, large.FACTS),
        "roles": lambda: roles(attrs.evolve(topology)),
        "groups": lambda: groups_of(topology),
        "channels": lambda: channels_of(topology),
        "routes": lambda: edge_traffic(step),
        "one rank": lambda: fresh(step, order).of(middle),
        "program": lambda: listing_of(fresh(step, order)),
        "verify": lambda: verify(program),
    }
    return {part: timed(task) for part, task in tasks.items()}, len(topology.ranks)


def roles(topology: Topology) -> list[RankRole]:
    """Return the role of every rank."""
    return [role_of(topology, rank) for rank in topology.ranks]


def fresh(step: Step, order: Order) -> Program:
    """Return the program of a step with nothing known of the step yet."""
    return plan_step(Step(step.topology, step.samples), order)


def samples(spec: JobSpec) -> tuple[Sample, ...]:
    """Draw ragged samples, some without an image."""
    return tuple(
        Sample(
            id=i,
            length=8,
            rows={
                "vision": draw_integer(0, i, "vision", 2, 6) * (draw_integer(0, i, "there", 1, 10) <= THERE),
                "audio": draw_integer(0, i, "audio", 1, 4),
            },
        )
        for i in range(spec.batch.global_size)
    )


def timed(task: Task) -> float:
    """Return the CPU seconds of a task: the machine may be shared. The first of two runs fills what is kept per job."""
    seconds: list[float] = []
    for _ in range(2):
        begin = time.process_time()
        task()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def processor() -> str:
    """Name the processor."""
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main()
