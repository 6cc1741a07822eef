"""What a step holds on each rank at most, measured and planned, without what is there all the time.

    python benchmarks/memory.py [JOB] [--set KEY=VALUE ...] [--actions]

Torch's profiler counts every byte that the CPU allocator gives out and takes back. Weights, gradients and the
optimizer's state are there before the step begins, so they do not count; their bytes are known exactly. What is counted
is what `mimogrid simulate` estimates: activations, messages and temporaries. With --actions every action is listed. The
target is a difference of at most a tenth of the whole peak.
"""

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mimogrid.core.pricing.footprint import kept
from mimogrid.core.schedule.actions import Action
from mimogrid.core.simulate.memory import most_bytes
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.execute import RankContext, Timed, execute
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


JOB = Path(__file__).with_name("step_time.toml")
MARK = "action "
MB = 1e6


def in_world(place: RankPlace, job: Job) -> dict[str, Any]:
    """Measure the second step of one rank: in the first the optimizer makes its state."""
    with open_session(place, job) as session:
        runtime = session.runtime
        assert runtime is not None
        train_step(runtime, 0, job.step(0), job.step(1))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            train_step(runtime, 1, job.step(1), job.step(2), executor=_marked)
    always = kept(job.topology, place.rank).bytes
    return {
        "kept": always,
        "planned": most_bytes(job.program_of(job.step(1)), place.rank) - always,
        "actions": _levels(profiled.profiler.kineto_results.events()),
    }


def _marked(actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
    timeline: list[Timed] = []
    for index, action in enumerate(actions):
        with record_function(f"{MARK}{action}"):
            timeline += execute((action,), context, first=index)
    return tuple(timeline)


def _levels(events: Any) -> list[tuple[str, int, int]]:
    """Return each action with the most bytes that the step holds in it, and those that are left after it."""
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    marks = sorted((event.start_ns(), event.end_ns(), event.name()) for event in events)
    held = place = 0
    found: list[tuple[str, int, int]] = []
    for begin, end, name in marks:
        if not name.startswith(MARK):
            continue
        while place < len(memory) and memory[place][0] < begin:
            held += memory[place][1]
            place += 1
        most = held
        while place < len(memory) and memory[place][0] <= end:
            held += memory[place][1]
            place += 1
            most = max(most, held)
        found.append((name.removeprefix(MARK), most, held))
    return found


def main() -> None:
    """Run the job and print a line for each rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", nargs="?", default=str(JOB))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--actions", action="store_true")
    given = parser.parse_args()
    job = open_job(given.job, given.overrides)
    size = job.topology.world_size
    with Pool(size) as pool:
        rows = pool.run(f"{Path(__file__).stem}:in_world", size, job)
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{Path(given.job).name} {' '.join(given.overrides)}")
    for rank, row in enumerate(rows):
        name, most, _ = max(row["actions"], key=lambda action: action[1])
        planned, always = row["planned"], row["kept"]
        ratios = f"{planned / most:.3f} of it, {(planned + always) / (most + always):.3f} of the whole"
        print(
            f"rank {rank}: {always / MB:.1f} MB always; at most {most / MB:.1f} MB more, in {name}; "
            f"planned {planned / MB:.1f} MB ({ratios})"
        )
        for action, peak, left in row["actions"] if given.actions else ():
            print(f"    {action:40} {peak / MB:10.2f} {left / MB:10.2f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
