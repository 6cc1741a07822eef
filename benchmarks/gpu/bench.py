"""Bench: a rank of a job, ready to run the same step again and again, and the clocks that it is measured by.

The step is the job's own: planned, run by the executor, agreed on. Its samples are made once and kept, so that no
time of it is the source's.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from mimogrid.core.step.step import Step
from mimogrid.shell.device.device import Device
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.data import Loads
from mimogrid.shell.runtime.exchange import gather_values
from mimogrid.shell.runtime.execute import Executor, execute
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.train_step import train_step
from workload import Options


WARM_UP = 3
COMPARED = ("loss", "gradient_norm")
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
"""By which part of its size a sum may differ that is added up in another order, and over rows of another shape."""


class Kept:
    """A source that makes every sample once."""

    def __init__(self, source: Loads) -> None:
        self._source = source
        self._made: dict[tuple[int, str], Mapping[str, torch.Tensor]] = {}

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return what the source does."""
        key = sample_id, module
        if key not in self._made:
            self._made[key] = self._source.load(sample_id, module)
        return self._made[key]


@attrs.frozen(eq=False)
class Bench:
    """A rank with its stages, and the one step that it runs."""

    session: Session
    runtime: RankRuntime
    step: Step
    source: Loads

    @property
    def device(self) -> Device:
        """Where this rank computes."""
        return self.session.device

    def train(self, *, update: bool = True, executor: Executor = execute) -> Outcome:
        """Run the step; without `update`, up to the gradients and their norm."""
        return train_step(
            self.runtime, 0, self.step, self.step, update=update, source=self.source, executor=executor
        )

    def gradients(self) -> tuple[float, float]:
        """Run the step without its update; return its loss and gradient norm."""
        outcome = self.train(update=False)
        return outcome.loss, outcome.gradient_norm

    def seconds(self, body: Callable[[], object]) -> float:
        """Return how long a body takes that all ranks begin together, the device's part included."""
        gather_values(self.runtime, torch.zeros(1, device=self.device.torch))
        self.device.finish()
        begin = time.perf_counter()
        body()
        self.device.finish()
        return time.perf_counter() - begin


@contextlib.contextmanager
def open_bench(place: RankPlace, job: Job, options: Options) -> Iterator[Bench]:
    """Enter the world of a job. Alone on a GPU with NCCL; ranks that share it talk through host memory."""
    transport = ("nccl" if place.size == 1 else "host") if options.on_gpu else None
    with open_session(place, job, transport=transport) as session:
        assert session.runtime is not None
        assert job.source is not None
        yield Bench(session, session.runtime, job.step(0), Kept(job.source))
        session.world.wait_for_all("measured")


# -- clocks ------------------------------------------------------------------------------------------------


def slowest(bench: Bench, mine: Sequence[float]) -> list[float]:
    """Return of each of some times the longest that a rank took, on every rank."""
    times = torch.tensor(mine, dtype=torch.float64, device=bench.device.torch)
    return list(gather_values(bench.runtime, times).amax(dim=0).tolist())


def total(bench: Bench, mine: Sequence[float]) -> list[float]:
    """Return of each of some times the sum over ranks, on every rank."""
    times = torch.tensor(mine, dtype=torch.float64, device=bench.device.torch)
    return list(gather_values(bench.runtime, times).sum(dim=0).tolist())


def by_turns(
    bench: Bench, ours: Callable[[], object], theirs: Callable[[], object], pairs: int
) -> dict[str, Any]:
    """Time two bodies, first one and then the other going first. A ratio above 1 says that ours is faster."""
    took: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    computed: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for pair in range(pairs):
        for body in (ours, theirs) if pair % 2 else (theirs, ours):
            before = time.process_time()
            took[body].append(bench.seconds(body))
            computed[body].append(time.process_time() - before)
    mine, other = slowest(bench, took[ours]), slowest(bench, took[theirs])
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    cpu, other_cpu = total(bench, computed[ours]), total(bench, computed[theirs])
    return {
        "pairs": pairs,
        "ours_s": statistics.median(mine),
        "theirs_s": statistics.median(other),
        "theirs_by_ours": statistics.median(ratios),
        "theirs_by_ours_spread": [min(ratios), max(ratios)],
        "ours_cpu_s": statistics.median(cpu),
        "theirs_cpu_s": statistics.median(other_cpu),
        "theirs_by_ours_cpu": statistics.median(b / a for a, b in zip(cpu, other_cpu, strict=True)),
    }


def compared(bench: Bench, theirs: Callable[[], tuple[float, float]], pairs: int) -> dict[str, Any]:
    """Compare losses and gradient norms of a step without its update; where they are the same, time both."""
    for _ in range(WARM_UP):
        said = list(zip(bench.gradients(), theirs(), strict=True))
    found: dict[str, Any] = {name: list(pair) for name, pair in zip(COMPARED, said, strict=True)}
    limit = TOLERANCE[bench.runtime.job.spec.precision]
    if not all(math.isclose(ours, other, rel_tol=limit) for ours, other in said):
        return found | {"failed": f"they differ by more than {limit:g} of their size; not timed."}
    return found | by_turns(bench, bench.gradients, theirs, pairs)


def peak_bytes(device: Device) -> int | None:
    """Return the most memory of the device that tensors took since the last call; None on the CPU."""
    if not device.is_asynchronous:
        return None
    most = torch.cuda.max_memory_allocated(device.torch)
    torch.cuda.reset_peak_memory_stats(device.torch)
    return most
