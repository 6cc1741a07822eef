"""Training: the loop over steps on one rank, and what a run leaves in its folder.

    report.json        layout, steps, losses, held-out accuracy, throughput, busy fractions, peak memory
    metrics.jsonl      one line a step
    weights.safetensors  the final weights, full tensors under names that do not depend on the layout
    trace.json         the measured timeline of the last step, for Perfetto
    predictions.png    held-out samples with the answer given and the true one
    logs/, tensorboard/

The first rank of the job writes all of it but the logs, which every rank keeps.
"""

import contextlib
import importlib.metadata
import json
import platform
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import structlog
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from mimogrid.core.draw import perfetto
from mimogrid.core.errors import PlanError, Problem
from mimogrid.core.roles import layout_of, role_of
from mimogrid.core.schedule.actions import Compute
from mimogrid.core.schedule.lower import plan_step
from mimogrid.core.steps import Step
from mimogrid.core.timeline import Event
from mimogrid.shell.evaluate import Answer, Examined, Questions, examine
from mimogrid.shell.execute import Timed
from mimogrid.shell.jobs import Job
from mimogrid.shell.log import open_log
from mimogrid.shell.pictures import draw_predictions
from mimogrid.shell.place import Place
from mimogrid.shell.progress import Progress
from mimogrid.shell.runs import REPORT, claim, report_of, write_json
from mimogrid.shell.session import Session, open_session
from mimogrid.shell.step import Crew, Outcome


READ_COUNT, OTHER_COUNT = 1280, 128
"""Held-out samples that the first task, and each further task, is examined on."""

SCALARS_EVERY = 10

REFUSED = "refused: "
"""Begins what rank 0 tells the others where there is no folder to run in."""


@attrs.define
class Tally:
    """What a rank has measured so far."""

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
        self.busy_ns += sum(
            timed.end_ns - timed.begin_ns for timed in outcome.timeline if isinstance(timed.action, Compute)
        )
        self.step_ns += outcome.timeline[-1].end_ns - outcome.timeline[0].begin_ns
        self.samples += len(step.samples)
        self.tokens += tokens_of(step)
        self.losses.append(outcome.loss)
        for name, loss in outcome.losses.items():
            self.losses_by_module.setdefault(name, []).append(loss)
        if not outcome.taken:
            self.skipped.append(index)
        self.last = outcome.timeline

    @property
    def seconds(self) -> float:
        """Time since the first step began."""
        return time.perf_counter() - self.begun


def in_world(
    place: Place, job: Job, transport: str | None, folder: str | None, resume: str | None = None
) -> dict[str, Any] | None:
    """Train a job on every rank of its world; the first rank of the job returns the report.

    Without a folder, rank 0 claims one and the others hear which. Raises PlanError where it cannot.
    """
    with open_session(place, job, transport=transport) as session:
        if folder is None:
            folder = session.world.first_decides("folder", lambda: _claim(job, resume))
        if folder.startswith(REFUSED):
            raise PlanError([Problem("train.run_dir", folder.removeprefix(REFUSED), "")])
        path = Path(folder)
        finished = report_of(path)
        if finished is not None or session.crew is None:
            return finished
        role = role_of(job.topology, place.rank)
        chief = place.rank == job.topology.ranks[0]
        with open_log(path / "logs", role, speaks=chief) as log:
            return _run(session, session.crew, path, log, chief=chief)


def _claim(job: Job, resume: str | None) -> str:
    try:
        return str(claim(job.path, job.spec.train.run_dir, resume))
    except PlanError as error:
        return REFUSED + "\n".join(f"{p.message} {p.remedy}" for p in error.problems)


def _run(
    session: Session,
    crew: Crew,
    folder: Path,
    log: structlog.typing.FilteringBoundLogger,
    *,
    chief: bool,
) -> dict[str, Any] | None:
    tally = _train(crew, folder, log, chief=chief)
    training_s = tally.seconds
    weights = crew.collect(crew.weights())
    if chief:
        save_file(dict(weights), folder / "weights.safetensors")
    examined = _examine(crew) if crew.job.spec.train.evaluate else {}
    ranks = _gather(crew, tally)
    if not chief:
        return None
    _draw(folder, crew.job, examined, ranks)
    report = _report(crew, tally, training_s, examined, ranks)
    write_json(folder / REPORT, report)
    log.info(
        "finished",
        steps=report["steps"],
        loss=f"{report['losses'][-1]:.4f}" if report["losses"] else "none",
        accuracy=report["accuracy"],
        folder=str(folder),
    )
    return report


def _train(crew: Crew, folder: Path, log: structlog.typing.FilteringBoundLogger, *, chief: bool) -> Tally:
    """Run all steps; the first rank keeps the metrics."""
    job, steps = crew.job, crew.job.spec.train.steps
    tally = Tally()
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(_keeper(folder, steps)) if chief else None
        following = job.step(0)
        for index in range(steps):
            step, following = following, job.step(index + 1)
            outcome = crew.run(index, step, following)
            tally.add(index, step, outcome)
            if not outcome.taken:
                log.warning("step skipped: a loss or gradient was not finite", step=index)
            if keeper:
                keeper.keep(index, outcome, tally)
    return tally


# -- metrics -----------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Keeper:
    """Writes metrics as they come: a line each, scalars now and then, progress on the terminal."""

    lines: Any
    scalars: SummaryWriter
    progress: Progress

    def keep(self, index: int, outcome: Outcome, tally: Tally) -> None:
        """Write one step."""
        facts = {
            "step": index,
            "loss": outcome.loss,
            "losses": dict(outcome.losses),
            "gradient_norm": outcome.gradient_norm,
            "learning_rate": outcome.learning_rate,
            "samples_per_s": tally.samples / tally.seconds,
            "tokens_per_s": tally.tokens / tally.seconds,
        }
        self.lines.write(json.dumps(facts) + "\n")
        if index % SCALARS_EVERY == 0:
            for name in ("loss", "gradient_norm", "learning_rate", "samples_per_s", "tokens_per_s"):
                self.scalars.add_scalar(name, facts[name], index)
        self.progress.show(index + 1, facts)


@contextlib.contextmanager
def _keeper(folder: Path, steps: int) -> Iterator[_Keeper]:
    with (
        (folder / "metrics.jsonl").open("a", encoding="utf-8") as lines,
        contextlib.closing(SummaryWriter(str(folder / "tensorboard"))) as scalars,
        Progress(steps) as progress,
    ):
        yield _Keeper(lines, scalars, progress)


def tokens_of(step: Step) -> int:
    """Return the positions in use of all language sequences of a step."""
    return sum(step.rows_start[name][-1] for name in step.topology.graph.texts)


# -- the end of a run --------------------------------------------------------------------------------------


def _examine(crew: Crew) -> dict[str, tuple[Questions, tuple[Answer, ...]]]:
    """Answer the held-out samples of every task of a source that has some."""
    source = crew.job.source
    if not isinstance(source, Examined) or not crew.topology.graph.texts:
        return {}
    examined = {}
    for i, task in enumerate(source.tasks):
        questions = source.held_out(task=task)
        answers = examine(crew, questions, OTHER_COUNT if i else READ_COUNT)
        examined[task] = (questions, answers)
    return examined


@attrs.frozen
class _OfRank:
    """What the report says of one rank."""

    rank: int
    busy_fraction: float
    peak_bytes: int
    events: tuple[Event, ...]


def _gather(crew: Crew, tally: Tally) -> list[_OfRank]:
    """Gather every rank's measurements on the first; the others get nothing."""
    mine = _OfRank(
        rank=crew.rank,
        busy_fraction=tally.busy_ns / tally.step_ns if tally.step_ns else 0.0,
        peak_bytes=_peak_bytes(crew.device.torch),
        events=tuple(
            Event(crew.rank, timed.action, timed.begin_ns / 1e9, timed.end_ns / 1e9) for timed in tally.last
        ),
    )
    return crew.hand_over(mine)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _draw(
    folder: Path,
    job: Job,
    examined: Mapping[str, tuple[Questions, tuple[Answer, ...]]],
    ranks: list[_OfRank],
) -> None:
    events = [event for of_rank in ranks for event in of_rank.events]
    stages = {
        rank: " ".join(str(info.stage) for info in job.topology.stages_of(rank))
        for rank in job.topology.ranks
    }
    program = plan_step(job.step(job.spec.train.steps - 1)) if events else None
    write_json(folder / "trace.json", perfetto(events, names=stages, program=program))
    for questions, answers in list(examined.values())[:1]:
        draw_predictions(folder / "predictions.png", questions, answers)


def _report(
    crew: Crew,
    tally: Tally,
    training_s: float,
    examined: Mapping[str, tuple[Questions, tuple[Answer, ...]]],
    ranks: list[_OfRank],
) -> dict[str, Any]:
    accuracy = {
        task: sum(answer.is_right for answer in answers) / len(answers)
        for task, (_, answers) in examined.items()
    }
    first, *others = accuracy.items() if accuracy else [(None, None)]
    return {
        "layout": layout_of(crew.topology).value,
        "world_size": crew.topology.world_size,
        "steps": len(tally.losses),
        "skipped_steps": tally.skipped,
        "losses": tally.losses,
        "losses_by_module": tally.losses_by_module,
        "accuracy": first[1],
        "accuracy_of": first[0],
        "accuracy_text_only": dict(others),
        "training_s": training_s,
        "samples_per_s": tally.samples / training_s if training_s else 0.0,
        "tokens_per_s": tally.tokens / training_s if training_s else 0.0,
        "busy_fraction": {str(of.rank): of.busy_fraction for of in ranks},
        "peak_bytes": {str(of.rank): of.peak_bytes for of in ranks},
        "machine": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": importlib.metadata.version("megatron-core"),
        },
    }
