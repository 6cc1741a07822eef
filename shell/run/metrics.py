"""Metrics: what a rank counts over a run, and what its first rank writes down as steps are done."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import attrs
from torch.utils.tensorboard import SummaryWriter

from mimogrid.core.faults.stragglers import StepTimes, Straggler, mean, stragglers
from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.simulate import simulate
from mimogrid.core.step.step import Step
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.progress import Progress
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.execute import Timed


METRICS = "metrics.jsonl"
SCALARS_EVERY = 10
WINDOW = 64
"""Steps over which a rank's pace is judged."""
ABOVE = 1.5
"""How many times as long as its peers a rank must take to be told of."""


class Lag:
    """Paces of a window of steps, at the end of which it tells who straggles.

    One slow step says nothing: it may lie behind a checkpoint.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._predicted: Mapping[int, float] | None = None
        self._window: list[Sequence[StepTimes]] = []

    def after(self, step: Step, step_times: Sequence[StepTimes]) -> tuple[Straggler, ...]:
        """Add a step's paces; return the stragglers of a window that is full, and begin another."""
        self._window.append(step_times)
        if len(self._window) < WINDOW:
            return ()
        costs = self._job.spec.schedule.costs
        if costs is not None and self._predicted is None:  # A plan predicts the same of every step.
            self._predicted = simulate(plan_step(step, self._job.order), costs).busy_s
        steps, self._window = self._window, []
        return tuple(stragglers(list(mean(steps)), above=ABOVE, predicted=self._predicted))


@attrs.define
class Tally:
    """What a rank has counted so far; losses reach back over resumes, throughput does not.

    `busy_ns` and `step_ns` are of all steps but the `last`, with which a device may not be done yet.

    A step that was passed over (`train.skip_steps`) has no loss, and is among those skipped.
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
        """The part of all steps in which this rank computed."""
        busy_ns, step_ns = self._times()
        return busy_ns / step_ns if step_ns else 0.0

    def _times(self) -> tuple[int, int]:
        """Return the nanoseconds of computing and of steps, with those of the last."""
        busy_ns = sum(t.end_ns - t.begin_ns for t in self.last if isinstance(t.action, Compute))
        step_ns = self.last[-1].end_ns - self.last[0].begin_ns if self.last else 0
        return self.busy_ns + busy_ns, self.step_ns + step_ns

    @property
    def seconds(self) -> float:
        """Time since the first step began."""
        return time.perf_counter() - self.begun


def recall(folder: Path, steps: int) -> Tally:
    """Return a tally with the losses of the first steps of a run, and forget what its metrics say of later ones."""
    tally, path = Tally(), folder / METRICS
    if not path.is_file():
        return tally
    lines = path.read_text().splitlines(keepends=True)[:steps]
    path.write_text("".join(lines))
    for facts in map(json.loads, lines):
        if not facts["taken"]:
            tally.skipped.append(facts["step"])
        if "loss" not in facts:
            continue
        tally.losses.append(facts["loss"])
        for name, loss in facts["losses"].items():
            tally.losses_by_module.setdefault(name, []).append(loss)
    return tally


@attrs.frozen(eq=False)
class Keeper:
    """Writes metrics as they come: a line each, scalars now and then, progress on the terminal."""

    lines: TextIO
    scalars: SummaryWriter
    progress: Progress

    def keep(self, index: int, outcome: Outcome, tally: Tally, lagging: Sequence[Straggler] = ()) -> None:
        """Write one step, and who was found to straggle after it."""
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
            facts["stragglers"] = [_told(straggler) for straggler in lagging]
        self.lines.write(json.dumps(facts) + "\n")
        if index % SCALARS_EVERY == 0:
            for name in ("loss", "gradient_norm", "learning_rate", "samples_per_s", "tokens_per_s"):
                self.scalars.add_scalar(name, facts[name], index)
        self.progress.show(index + 1, facts)

    def pass_over(self, index: int) -> None:
        """Write that a step was passed over."""
        self.lines.write(json.dumps({"step": index, "taken": False, "skipped": "listed"}) + "\n")


def _told(straggler: Straggler) -> dict[str, Any]:
    """Return what a line of metrics says of a straggler."""
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
def open_keeper(folder: Path, steps: int) -> Iterator[Keeper]:
    """Open the files that metrics go to, and the progress on the terminal."""
    with (
        (folder / METRICS).open("a", encoding="utf-8", buffering=1) as lines,  # a checkpoint counts on them
        contextlib.closing(SummaryWriter(str(folder / "tensorboard"))) as scalars,
        Progress(steps) as progress,
    ):
        yield Keeper(lines, scalars, progress)
