"""Metrics: what a rank counts over a run, and what the first rank writes and shows after each step.

``metrics.jsonl`` has a line per step; `step` is its index, counted from 0 as everywhere else.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import attrs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.utils.tensorboard import SummaryWriter

from mimogrid.core.faults.stragglers import StepTimes, Straggler, mean, stragglers
from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.step.step import Step
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.execute import Timed


METRICS = "metrics.jsonl"
SCALARS_EVERY = 10
"""Steps from one point of the curves in TensorBoard to the next."""
PROGRESS_EVERY_S = 10.0
"""Seconds from one line of progress to the next, where there is no terminal."""
WINDOW = 64
"""Steps over which step times are averaged before stragglers are named."""
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
            self._predicted = simulate(plan_step(step, self._job.order), costs).busy_s
        steps, self._window = self._window, []
        return tuple(stragglers(list(mean(steps)), above=ABOVE, predicted=self._predicted))


@attrs.define
class Tally:
    """What a rank has counted so far. Losses include those before a resume, throughput does not.

    `busy_ns` and `step_ns` are of all steps but the `last`, which a device may not have finished yet. A step in
    `train.skip_steps` has no loss, and is among the `skipped`.
    """

    begun: float = attrs.field(factory=time.perf_counter)
    busy_ns: int = 0
    step_ns: int = 0
    samples: int = 0
    tokens: int = 0
    losses: list[float] = attrs.field(factory=list[float])
    losses_by_module: dict[str, list[float]] = attrs.field(factory=dict[str, list[float]])
    skipped: list[int] = attrs.field(factory=list[int])
    last: tuple[Timed, ...] = ()

    def add(self, index: int, step: Step, outcome: Outcome) -> None:
        """Count a step."""
        self.busy_ns, self.step_ns = self._times()
        self.samples += len(step.samples)
        self.tokens += step.tokens
        self.losses.append(outcome.loss)
        for name, loss in outcome.losses.items():
            self.losses_by_module.setdefault(name, []).append(loss)
        if not outcome.taken:
            self.skipped.append(index)
        self.last = outcome.timeline

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


def resumed_tally(folder: Path, steps: int) -> Tally:
    """Return a tally with the losses of the first steps of a run; drop the lines of later steps from its metrics."""
    tally, path = Tally(), folder / METRICS
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
        for name, loss in facts["losses"].items():
            tally.losses_by_module.setdefault(name, []).append(loss)
    return tally


class Progress:
    """Shows the steps that are done: as a bar on a terminal, elsewhere as a line every few seconds."""

    def __init__(self, start: int, steps: int) -> None:
        self._start = start
        self._steps = steps
        self._printed_at = self._begun = time.monotonic()
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        console = Console(stderr=True)
        self._bar = Bar(*columns, console=console) if sys.stderr.isatty() else None

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
        now = time.monotonic()
        text = (
            f"loss {facts['loss']:.4f}  {facts['samples_per_s']:.0f} samples/s  "
            f"{facts['tokens_per_s']:.0f} tokens/s"
        )
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif done in {self._start + 1, self._steps} or now - self._printed_at > PROGRESS_EVERY_S:
            left = (now - self._begun) / (done - self._start) * (self._steps - done)
            print(f"{done}/{self._steps} steps  {text}  {left:.0f} s left", file=sys.stderr, flush=True)  # noqa: T201
            self._printed_at = now


@attrs.frozen(eq=False)
class MetricsWriter:
    """Writes a line per step, scalars for TensorBoard, and progress on the terminal."""

    lines: TextIO
    scalars: SummaryWriter
    progress: Progress

    def write(self, index: int, outcome: Outcome, tally: Tally, lagging: Sequence[Straggler] = ()) -> None:
        """Write a step, and the stragglers that were found after it."""
        facts: dict[str, Any] = {
            "step": index,
            "loss": outcome.loss,
            "losses": dict(outcome.losses),
            "taken": outcome.taken,
            "skipped": outcome.skipped,
            "loss_scale": outcome.loss_scale,
            "gradient_norm": outcome.gradient_norm,
            "learning_rate": outcome.learning_rate,
            "samples_per_s": tally.samples / tally.seconds,
            "tokens_per_s": tally.tokens / tally.seconds,
        }
        if lagging:
            facts["stragglers"] = [_straggler_facts(straggler) for straggler in lagging]
        self.lines.write(json.dumps(facts) + "\n")
        if index % SCALARS_EVERY == 0:
            for name in ("loss", "gradient_norm", "learning_rate", "samples_per_s", "tokens_per_s"):
                self.scalars.add_scalar(name, facts[name], index)
        self.progress.show(index + 1, facts)

    def write_passed_over(self, index: int) -> None:
        """Write that a step was passed over because train.skip_steps lists it."""
        self.lines.write(json.dumps({"step": index, "taken": False, "skipped": "listed"}) + "\n")


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
def open_metrics(folder: Path, start: int, steps: int) -> Iterator[MetricsWriter]:
    """Open the files of the metrics, and the progress on the terminal from step `start` on."""
    with (
        (folder / METRICS).open("a", encoding="utf-8", buffering=1) as lines,  # a resumed run reads them
        contextlib.closing(SummaryWriter(str(folder / "tensorboard"))) as scalars,
        Progress(start, steps) as progress,
    ):
        yield MetricsWriter(lines, scalars, progress)
