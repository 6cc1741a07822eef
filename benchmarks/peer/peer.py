"""Peer: megatron-core's own `MimoModel` and schedule, and ours, in one run on this machine's cores, with gloo.

    make bench-peer
    python benchmarks/peer/peer.py [--pairs N] [--layout NAME ...] [--mix NAME ...] [--out FILE]

Both sides have the same networks, weights, samples and gradient buffers, and run the forwards and backwards of a step,
sum gradients over dp ranks, and agree on loss and gradient norm (`benchmarks/gpu/schedule.py`). Loss and norm are
compared first, and nothing is timed where they differ. Then the sides take turns. A step takes as long as its slowest
rank. Its CPU time is that of all ranks together, in which waiting is nothing.

Every sample has one image of the same size: where several dp ranks of an encoder feed one of the language model,
Megatron's bridge takes no other. Texts are equally long, or ragged: log-normal, a sixth of them outside of a factor of
2.5. Megatron pads those of a microbatch to the longest, as the task encoder of its examples does; ours computes a row
without padding. Microbatches have the same samples on both sides, in the order of the source. Megatron's schedule is
1F1B, the only one that it has for several modules. Where the language model is in stages ours is zb-h1, which has no
more microbatches in flight; elsewhere it is 1f1b, too.

Each layout has up to four ranks. On fewer cores they share them; then a step is faster only by what it does not do.
"""

import argparse
import contextlib
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "gpu"), str(HERE.parent)]

import attrs  # noqa: E402
from packing import Given, log_normal  # noqa: E402

from bench import Bench, Kept, compared  # noqa: E402
from machine import said_by, version  # noqa: E402
from mimogrid.core.base.samples import Sample  # noqa: E402
from mimogrid.core.job.models import Gpt, Vit  # noqa: E402
from mimogrid.core.job.schedules import ONE_F_ONE_B, SCHEDULES, ZB_H1  # noqa: E402
from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec, ScheduleSpec, TrainSpec  # noqa: E402
from mimogrid.core.step.step import step_of  # noqa: E402
from mimogrid.shell.device.place import RankPlace  # noqa: E402
from mimogrid.shell.job.jobs import Job  # noqa: E402
from mimogrid.shell.runtime.session import open_session  # noqa: E402
from mimogrid.shell.world.launch import Pool  # noqa: E402
from workload import opened  # noqa: E402


NEEDED = (0, 19)
"""The first megatron-core that has a schedule for several modules."""
LAYOUTS: Mapping[str, Mapping[str, GridSpec]] = {
    "encoder 1, language 1": {"vision": GridSpec(), "language": GridSpec()},
    "encoder 1, language pp 3": {"vision": GridSpec(), "language": GridSpec(pp=3)},
    "encoder dp 2, language pp 2": {"vision": GridSpec(dp=2), "language": GridSpec(pp=2)},
    "encoder tp 2, language tp 2": {"vision": GridSpec(tp=2), "language": GridSpec(tp=2)},
}
MODELS = {
    "vision": ModuleSpec(
        model="vit", options=Vit(layers=3, hidden=128, heads=4, features=16), feeds=("language",)
    ),
    "language": ModuleSpec(model="gpt", options=Gpt(layers=6, hidden=128, heads=4, vocab=256)),
}
SAMPLES, MICROBATCHES, ROWS = 32, 8, 64
"""Of a step; and the rows of an image."""
TEXT, LONGEST = 192, 960
MIXES: Mapping[str, Callable[[random.Random], int]] = {
    "equal": lambda _: TEXT,
    "ragged": lambda draws: log_normal(draws, 16, LONGEST),
}
"""By name, what draws the length of a text."""


def samples_of(mix: str) -> tuple[Sample, ...]:
    """Draw the samples of a step."""
    draws = random.Random(mix)
    return tuple(Sample(id=i, length=MIXES[mix](draws), rows={"vision": ROWS}) for i in range(SAMPLES))


def job_of(layout: Mapping[str, GridSpec], schedule: str | None) -> JobSpec:
    """Return the job of both models in a layout."""
    return JobSpec(
        modules={name: attrs.evolve(module, grid=layout[name]) for name, module in MODELS.items()},
        data=DataSpec(source="synthetic", options={"sequence": ROWS + LONGEST}),
        batch=BatchSpec(global_size=SAMPLES, microbatches=MICROBATCHES),
        schedule=ScheduleSpec(name=schedule or (ZB_H1 if layout["language"].pp > 1 else ONE_F_ONE_B)),
        train=TrainSpec(steps=1_000_000, evaluate=False),
    )


def in_world(place: RankPlace, job: Job, samples: Sequence[Sample], pairs: int) -> dict[str, Any]:
    """Compare both sides on every rank of a world; all return the same."""
    from schedule import open_schedule  # noqa: PLC0415 -- needs megatron-core 0.19

    with open_session(place, job) as session:
        assert session.runtime is not None
        step = step_of(job.topology, tuple(samples))
        bench = Bench(session, session.runtime, step, Kept(Given(samples)))
        with open_schedule(bench) as theirs:
            found = compared(bench, theirs, pairs)
        session.world.wait_for_all("measured")
    return found


def padding(samples: Sequence[Sample]) -> float:
    """Return the positions of the language model that padding makes, over those that samples have."""
    size = SAMPLES // MICROBATCHES
    lengths = [sample.length + ROWS for sample in samples]
    microbatches = [lengths[i : i + size] for i in range(0, SAMPLES, size)]
    return sum(size * max(of) for of in microbatches) / sum(lengths)


def lines(layouts: Sequence[str], mixes: Sequence[str], pairs: int, schedule: str | None) -> Iterator[str]:
    """Measure, and yield the report."""
    of_models = ", ".join(
        f"{name} {m.options.layers} x {m.options.hidden}" for name, m in MODELS.items() if m.options
    )
    yield f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    yield f"torch {version('torch')}, megatron-core {version('megatron-core')}, gloo, fp32"
    yield f"mimogrid {said_by('git', 'describe', '--always', '--dirty', '--abbrev=12')}"
    yield f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())} (1, 5, 15 minutes) when it began"
    yield f"{of_models}; {SAMPLES} samples in {MICROBATCHES} microbatches, {pairs} pairs"
    yield f"ours: {schedule or 'zb-h1 where the language model is in stages, else 1f1b'}; theirs: 1F1B"
    for mix in mixes:
        yield f"{mix}: padded positions of the language model by real ones {padding(samples_of(mix)):.2f}"
    yield ""
    yield f"{'':37}{'loss':^25}{'seconds':^16}{'their seconds by ours':^24}{'CPU':>7}"
    yield f"{'layout':29}{'mix':8}{'ours':>11}{'theirs':>14}{'ours':>8}{'theirs':>8}{'median':>10}{'spread':>14}"
    with Pool(max(map(ranks_of, layouts))) as pool:
        for layout in layouts:
            for mix in mixes:
                yield f"{layout:29}{mix:8}" + told(measured(pool, layout, mix, pairs, schedule))


def ranks_of(layout: str) -> int:
    """Return the ranks of a layout, whose modules have some each."""
    return sum(grid.tp * grid.dp * grid.pp for grid in LAYOUTS[layout].values())


def measured(pool: Pool, layout: str, mix: str, pairs: int, schedule: str | None) -> dict[str, Any]:
    """Measure a layout on a mix."""
    with opened(job_of(LAYOUTS[layout], schedule)) as job:
        found: dict[str, Any] = pool.run("peer:in_world", ranks_of(layout), job, samples_of(mix), pairs)[0]
    return found


def told(found: Mapping[str, Any]) -> str:
    """Return the rest of a line of the report."""
    ours, theirs = found["loss"]
    if "failed" in found:
        return f"{ours:11.7f}{theirs:14.7f}  {found['failed']}"
    least, most = found["theirs_by_ours_spread"]
    return (
        f"{ours:11.7f}{theirs:14.7f}{found['ours_s']:8.2f}{found['theirs_s']:8.2f}{found['theirs_by_ours']:10.2f}"
        f"{f'[{least:.2f}, {most:.2f}]':>16}{found['theirs_by_ours_cpu']:8.2f}"
    )


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--mix", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="ours; by default zb-h1 for a language model in stages, else 1f1b",
    )
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args()
    there = version("megatron-core") or "0"
    if tuple(map(int, there.split(".")[:2])) < NEEDED:
        parser.error(
            f"megatron-core {there} has no schedule for several modules; 'make bench-peer' brings one."
        )
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(given.out.open("w", encoding="utf-8")) if given.out else None
        for line in lines(given.layout, given.mix, given.pairs, given.schedule):
            print(line, flush=True)
            if out:
                print(line, file=out, flush=True)


if __name__ == "__main__":
    main()
