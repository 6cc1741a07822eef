"""Metrics: what a rank counts over a run, and what the first rank writes and shows after each step.

``metrics.jsonl`` has a line per step; `step` is its index, counted from 0 as everywhere else. Beside the losses stands
what the last steps reached (`core.faults.throughput`), and the most memory that a rank took. Progress counts the steps
that are done: after the step with index 0 one is.
"""

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import attrs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from mimogrid.core.faults.stragglers import StepTimes, Straggler, mean, stragglers
from mimogrid.core.faults.throughput import Measured, Throughput, is_encoder, peak_flops, throughput
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.pricing.flops import model_flops
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.step.step import Step
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.folders import METRICS
from mimogrid.shell.run.progress import progress_text
from mimogrid.shell.run.trackers import Trackers, tracked
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.execute import Timed
from mimogrid.shell.runtime.rank import RankRuntime


PROGRESS_EVERY_S = 10.0
"""Seconds from one line of progress to the next, where there is no terminal."""
WINDOW = 64
"""Steps over which step times are averaged before stragglers are named."""
RECENT = 10
"""The steps whose mean is shown as what the run reaches now."""
NONE: Mapping[str, float] = {}
ABOVE = 1.5
"""How many times as long as expected a straggler takes."""


class StragglerWatch:
    """Collects the step times of all ranks, and names the stragglers after each window of steps.

    One slow step means nothing: it may follow a checkpoint.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._predicted: Mapping[int, float] | None = None
        self._window: list[Sequence[StepTimes]] = []

    def after(self, step: Step, step_times: Sequence[StepTimes]) -> tuple[Straggler, ...]:
        """Add the times of a step; return the stragglers of a window that is full, and begin another."""
        self._window.append(step_times)
        if len(self._window) < WINDOW:
            return ()
        costs = self._job.spec.schedule.costs
        if costs is not None and self._predicted is None:  # a plan predicts the same of every step
            self._predicted = simulate(self._job.program_of(step), costs).busy_s
        steps, self._window = self._window, []
        return tuple(stragglers(list(mean(steps)), above=ABOVE, predicted=self._predicted))


class Meter:
    """Measures the steps of a run on its first rank: the last `RECENT` of them, and all but the first."""

    def __init__(self, *, active: int, allocated: int, peak: float | None) -> None:
        self._active, self._allocated, self._peak = active, allocated, peak
        self._steps: deque[Measured] = deque(maxlen=RECENT)
        self._whole, self._count = Measured(), 0
        self._data_s, self._data_of_s = dict[int, float](), 0.0
        self._ended = time.perf_counter()

    def add(self, step: Step, outcome: Outcome) -> None:
        """Measure a step that has just ended. With it comes what ranks computed in the step before."""
        now = time.perf_counter()
        seconds, self._ended = now - self._ended, now
        if self._count == 1:
            self._steps.clear()
            self._whole = Measured()
        elif self._steps:
            before_s = self._steps[-1].seconds
            data_s = sum(times.load_s for times in outcome.step_times)
            busy_s = sum(max(0.0, times.busy_s - times.load_s) for times in outcome.step_times)
            known = Measured(busy_s=busy_s, data_s=data_s, of_s=before_s * self._active)
            self._steps[-1] += known
            self._whole += known
            for times in outcome.step_times:
                self._data_s[times.rank] = self._data_s.get(times.rank, 0.0) + times.load_s
            self._data_of_s += before_s
        flops = model_flops(step)
        measured = Measured(
            steps=1,
            seconds=seconds,
            samples=len(step.samples),
            tokens=step.tokens,
            flops=sum(flops.values()),
            encoder_flops=sum(flops[name] for name in flops if is_encoder(step.topology, name)),
        )
        self._steps.append(measured)
        self._whole += measured
        self._count += 1

    def leave_out(self) -> None:
        """Count nothing between the step that was added last and now."""
        self._ended = time.perf_counter()

    @property
    def recent(self) -> Throughput | None:
        """What the last steps reached."""
        return self._throughput(sum(self._steps, start=Measured()))

    @property
    def whole(self) -> Throughput | None:
        """What all steps reached since the run was started or resumed."""
        return self._throughput(self._whole)

    @property
    def waiting_for_data(self) -> dict[int, float]:
        """By rank, the share of the time of all steps but the first and the last in which it waited for data."""
        return {rank: data_s / self._data_of_s for rank, data_s in self._data_s.items()}

    def _throughput(self, measured: Measured) -> Throughput | None:
        return throughput(measured, active=self._active, allocated=self._allocated, peak=self._peak)


def meter_of(runtime: RankRuntime) -> Meter:
    """Return a meter for the ranks and the devices of a job."""
    topology, peak = runtime.topology, peak_flops(runtime.device.name, runtime.job.spec.precision)
    return Meter(active=len(topology.ranks), allocated=topology.world_size, peak=peak)


@attrs.define
class Tally:
    """What a rank has counted so far. Losses include those before a resume, throughput does not.

    `busy_ns` and `step_ns` are of all steps but the `last`, which a device may not have finished yet. A step in
    `train.skip_steps` has no loss, and is among the `skipped`. The first rank of the job has a `meter` and the
    values of `validations`, each with its step. Training `ends_early`, after `last_step`, if validations say so.
    """

    begun: float = attrs.field(factory=time.perf_counter)
    busy_ns: int = 0
    step_ns: int = 0
    losses: list[float] = attrs.field(factory=list[float])
    losses_by_module: dict[str, list[float]] = attrs.field(factory=dict[str, list[float]])
    skipped: list[int] = attrs.field(factory=list[int])
    last: tuple[Timed, ...] = ()
    meter: Meter | None = None
    validations: list[tuple[int, Mapping[str, float]]] = attrs.field(
        factory=list[tuple[int, Mapping[str, float]]]
    )
    ends_early: bool = False
    last_step: int = 0

    def add(self, index: int, step: Step, outcome: Outcome) -> None:
        """Count a step."""
        self.busy_ns, self.step_ns = self._times()
        self.last_step = index
        self.losses.append(outcome.loss)
        for name, loss in outcome.losses.items():
            self.losses_by_module.setdefault(name, []).append(loss)
        if not outcome.taken:
            self.skipped.append(index)
        self.last = outcome.timeline
        if self.meter:
            self.meter.add(step, outcome)

    @property
    def busy_fraction(self) -> float:
        """The fraction of the time of all steps in which this rank computed."""
        busy_ns, step_ns = self._times()
        return busy_ns / step_ns if step_ns else 0.0

    def _times(self) -> tuple[int, int]:
        """Return the nanoseconds of computing and of steps, the last step included."""
        busy_ns = sum(t.end_ns - t.begin_ns for t in self.last if isinstance(t.action, Compute))
        step_ns = self.last[-1].end_ns - self.last[0].begin_ns if self.last else 0
        return self.busy_ns + busy_ns, self.step_ns + step_ns

    @property
    def seconds(self) -> float:
        """Seconds since the first step began."""
        return time.perf_counter() - self.begun


def resumed_tally(runtime: RankRuntime, folder: Path, steps: int) -> Tally:
    """Return a tally with the losses of the first steps of a run; drop the lines of later steps from its metrics."""
    tally, path = Tally(meter=meter_of(runtime)), folder / METRICS
    if not path.is_file():
        return tally
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
    path.write_text("".join(lines), encoding="utf-8")
    for facts in map(json.loads, lines):
        if not facts["taken"]:
            tally.skipped.append(facts["step"])
        if "loss" not in facts:
            continue
        tally.losses.append(facts["loss"])
        if "validation" in facts:
            tally.validations.append((facts["step"], facts["validation"]))
        for name, loss in facts["losses"].items():
            tally.losses_by_module.setdefault(name, []).append(loss)
    return tally


class Progress:
    """Shows the steps that are done: as a bar on a terminal, elsewhere as a line every few seconds."""

    def __init__(self, start: int, steps: int) -> None:
        self._start = start
        self._steps = steps
        self._printed_at = time.monotonic()
        columns = [  # the text last: what a narrow terminal cuts off is the end of it
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        ]
        console = Console(stderr=True)
        self._bar = Bar(*columns, console=console, expand=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("training", completed=self._start, total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, facts: Mapping[str, Any]) -> None:
        """Show that so many steps are `done`, with the metrics of the last one."""
        now, text = time.monotonic(), progress_text(facts)
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif done in {self._start + 1, self._steps} or now - self._printed_at > PROGRESS_EVERY_S:
            if done - self._start > 1:  # the first step says nothing of the others
                text += f"  {(facts.get('step_s') or 0.0) * (self._steps - done):.0f} s left"
            print(f"{done}/{self._steps} steps  {text}", file=sys.stderr, flush=True)  # noqa: T201
            self._printed_at = now


@attrs.frozen(eq=False)
class MetricsWriter:
    """Writes a line per step, the curves of trackers with a point `every` so many steps, and progress."""

    lines: TextIO
    trackers: Trackers
    every: int
    progress: Progress

    def write(
        self,
        index: int,
        outcome: Outcome,
        tally: Tally,
        lagging: Sequence[Straggler] = (),
        validation: Mapping[str, float] = NONE,
    ) -> None:
        """Write a step, and the stragglers and the validation that came after it."""
        recent = tally.meter.recent if tally.meter else None
        facts: dict[str, Any] = {
            "step": index,
            "loss": outcome.loss,
            "losses": dict(outcome.losses),
            "taken": outcome.taken,
            "skipped": outcome.skipped,
            "loss_scale": outcome.loss_scale,
            "gradient_norm": outcome.gradient_norm,
            "learning_rate": outcome.learning_rate,
            **(attrs.asdict(recent) if recent else {}),
            "peak_bytes": max(outcome.peak_bytes, default=None),
        }
        if lagging:
            facts["stragglers"] = [_straggler_facts(straggler) for straggler in lagging]
        if validation:
            facts["validation"] = dict(validation)
        self.lines.write(json.dumps(facts) + "\n")
        if index % self.every == 0 or validation:
            self.trackers.log(index, dict(_curves(facts)))
        self.progress.show(index + 1, facts)

    def write_passed_over(self, index: int) -> None:
        """Write that a step was passed over because train.skip_steps lists it."""
        self.lines.write(json.dumps({"step": index, "taken": False, "skipped": "listed"}) + "\n")


def _curves(facts: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the points of curves: every number that is known but the step itself, and the loss of each module."""
    for name, value in facts.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield name, value
    for module, loss in facts["losses"].items():
        yield f"loss/{module}", loss
    for name, value in facts.get("validation", NONE).items():
        yield f"validation/{name}", value


def _straggler_facts(straggler: Straggler) -> dict[str, Any]:
    """Return a straggler as a line of metrics lists it."""
    step_times = straggler.step_times
    return {
        "rank": step_times.rank,
        "modules": straggler.modules,
        "stages": step_times.stages.split(),
        "busy_s": step_times.busy_s,
        "load_s": step_times.load_s,
        "expected_s": straggler.expected_s,
        "standard": straggler.standard,
        "cause": straggler.cause,
    }


@contextlib.contextmanager
def open_metrics(
    folder: Path, start: int, spec: JobSpec, warn: Callable[[str], None]
) -> Iterator[MetricsWriter]:
    """Open the files and trackers of a job's metrics, and the progress on the terminal from step `start` on.

    `warn` is told of a tracker that fails.
    """
    with (
        (folder / METRICS).open("a", encoding="utf-8", buffering=1) as lines,  # a resumed run reads them
        contextlib.closing(Trackers(spec.track.to, tracked(folder, spec), warn)) as trackers,
        Progress(start, spec.train.steps) as progress,
    ):
        yield MetricsWriter(lines, trackers, spec.track.every, progress)
