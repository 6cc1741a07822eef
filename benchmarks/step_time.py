"""Where the time of a step goes on each rank: compute, transport and waiting, and mimogrid's own overhead.

    python benchmarks/step_time.py [JOB] [--set KEY=VALUE ...] [--steps N]

Own overhead is CPU time of the rank's main thread outside of computing (compute actions and freeing what they saved,
norm, optimizer) and transport: planning the step, lowering, the loop itself, agreement. The target is at most 3 % of
the step for stages whose actions take 5 ms or more. Without a job, one with such stages is used.

Memory is the growth of the resident set from before the stages were built to its highest point, beside what
the schedule says is needed: weights, gradients, optimizer state, and the activations in flight.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mimogrid.core.schedule.actions import Action, Compute, Kind, Wait
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Stage
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime import agreement
from mimogrid.shell.runtime.gradients import Buffer, StageBuffer
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.stage import StageStep
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.runtime.transport import Transport
from mimogrid.shell.world.launch import Pool


JOB = Path(__file__).with_name("step_time.toml")


class Meter:
    """CPU time of this thread spent inside some methods."""

    def __init__(self) -> None:
        self.spent = 0.0

    def around(self, owner: Any, *names: str) -> None:
        """Count the time of some methods of a class, or functions of a module."""
        for name in names:
            setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, method: Any) -> Any:
        """Return a function whose time counts."""

        def counted(*arguments: Any, **named: Any) -> Any:
            begin = time.thread_time()
            try:
                return method(*arguments, **named)
            finally:
                self.spent += time.thread_time() - begin

        return counted


def in_world(place: RankPlace, job: Job, steps: int) -> dict[str, Any]:
    """Measure one rank."""
    compute, transport = Meter(), Meter()
    compute.around(StageStep, "compute", "release")
    compute.around(torch.optim.AdamW, "step")
    compute.around(StageBuffer, "clear", "scale", "partials", "copy_main_to_model")
    StageBuffer.is_finite = property(compute.counted(StageBuffer.is_finite.fget))  # type: ignore[method-assign]
    transport.around(StageBuffer, "tie")
    transport.around(Buffer, "reduce", "wait", "gather", "wait_for_weights")
    transport.around(Transport, "send", "receive", "wait")
    transport.around(agreement, "gather_values")
    before = _resident()
    with open_session(place, job) as session:
        runtime = session.runtime
        assert runtime is not None
        following = job.step(0)
        for index in range(2):  # warm up: allocator, threads, caches
            step, following = following, job.step(index + 1)
            train_step(runtime, index, step, following)
        compute.spent = transport.spent = 0.0
        wall, cpu = time.perf_counter(), time.thread_time()
        waited = busy = 0
        durations = []
        for index in range(2, steps + 2):
            step, following = following, job.step(index + 1)
            for timed in train_step(runtime, index, step, following).timeline:
                spent = timed.end_ns - timed.begin_ns
                if isinstance(timed.action, Compute):
                    busy += spent
                    durations.append(spent)
                elif isinstance(timed.action, Wait):
                    waited += spent
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        own = cpu - compute.spent - transport.spent
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held, activations = _held(runtime), _activations(runtime, steps + 2, step)
    return {
        "rank": place.rank,
        "stages": [str(stage) for stage in runtime.stages],
        "step_ms": 1e3 * wall / steps,
        "compute": busy / 1e9 / wall,
        "waiting": waited / 1e9 / wall,
        "own_overhead": own / wall,
        "own_ms_per_step": 1e3 * own / steps,
        "median_action_ms": sorted(durations)[len(durations) // 2] / 1e6,
        "peak_mb": (peak - before) / 1e6,
        "needed_mb": (held + activations) / 1e6,
        "activations_mb": activations / 1e6,
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _held(runtime: RankRuntime) -> int:
    """Bytes of weights, gradients and the optimizer's two moments."""
    return sum(
        weight.numel() * weight.element_size() * (4 if weight.requires_grad else 1)
        for runner in runtime.stages.values()
        for weight in runner.network.parameters()
    )


def _activations(runtime: RankRuntime, index: int, step: Step) -> int:
    """Bytes of activations in flight at most: what a forward saves, times the schedule's microbatches."""
    saved: dict[Stage, int] = {}
    plain = StageStep.compute

    def recorded(stage: StageStep, action: Compute) -> None:
        if action.kind is not Kind.FORWARD or action.stage in saved:
            return plain(stage, action)
        weights = {w.untyped_storage().data_ptr() for w in stage.runner.network.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            plain(stage, action)
        saved[action.stage] = sum(sizes.values())
        return None

    StageStep.compute = recorded  # type: ignore[method-assign]
    try:
        train_step(runtime, index, step, step)
    finally:
        StageStep.compute = plain  # type: ignore[method-assign]
    actions = runtime.job.program_of(step).of(runtime.rank)
    return sum(size * _most_in_flight(actions, stage) for stage, size in saved.items())


def _most_in_flight(actions: tuple[Action, ...], stage: Stage) -> int:
    flying = most = 0
    for action in actions:
        if isinstance(action, Compute) and action.stage == stage:
            flying += 1 if action.kind is Kind.FORWARD else -1
            most = max(most, flying)
    return most


def main() -> None:
    """Run the job and print a table; with --json, the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", nargs="?", default=str(JOB))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    job = open_job(given.job, given.overrides)
    # Large blocks go back to the system when freed, so that the resident set says what is held.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    size = job.topology.world_size
    with Pool(size) as pool:
        rows = pool.run(f"{Path(__file__).stem}:in_world", size, job, given.steps)
    if given.json:
        print(json.dumps(rows))
        return
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, torch {torch.__version__}")
    columns = [name for name in rows[0] if name not in {"rank", "stages"}]
    print(f"{'rank':24}" + "".join(f"{name:>17}" for name in columns))
    for row in rows:
        name = f"{row['rank']} {' '.join(row['stages'])}"
        print(f"{name:24}" + "".join(f"{row[column]:17.3f}" for column in columns))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
