"""Reports: what a finished run says of itself, in numbers and pictures."""

import platform
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from mimogrid.core.draw import perfetto
from mimogrid.core.draw.picture import above
from mimogrid.core.draw.svg import svg
from mimogrid.core.program.lower import plan_step
from mimogrid.core.simulate import simulate
from mimogrid.core.simulate.measured import mean_costs, measured
from mimogrid.core.simulate.timeline import Event
from mimogrid.core.update.decision import is_passed_over
from mimogrid.shell.checkpoint.versions import versions
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.evaluate import Answer, Examined, Questions, examine
from mimogrid.shell.run.metrics import Tally
from mimogrid.shell.run.pictures import draw_predictions
from mimogrid.shell.runtime.rank import RankRuntime


READ_COUNT, OTHER_COUNT = 1280, 128
"""Held-out samples that the first task, and each further task, is examined on."""

Examination = Mapping[str, tuple[Questions, tuple[Answer, ...]]]
"""The answers to each task."""


def examine_tasks(runtime: RankRuntime) -> Examination:
    """Answer the held-out samples of every task of a source that has some."""
    source = runtime.job.source
    if not isinstance(source, Examined) or not runtime.topology.graph.texts:
        return {}
    examined = {}
    for i, task in enumerate(source.tasks):
        questions = source.held_out(task=task)
        answers = examine(runtime, questions, OTHER_COUNT if i else READ_COUNT)
        examined[task] = (questions, answers)
    return examined


@attrs.frozen
class OfRank:
    """What the report says of one rank."""

    rank: int
    busy_fraction: float
    peak_bytes: int
    events: tuple[Event, ...]


def gather_ranks(runtime: RankRuntime, tally: Tally) -> list[OfRank]:
    """Gather every rank's measurements on the first; the others get nothing."""
    mine = OfRank(
        rank=runtime.rank,
        busy_fraction=tally.busy_fraction,
        peak_bytes=_peak_bytes(runtime.device.torch),
        events=tuple(
            Event(runtime.rank, timed.action, timed.begin_ns / 1e9, timed.end_ns / 1e9)
            for timed in tally.last
        ),
    )
    return runtime.hand_over(mine)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw(
    folder: Path,
    job: Job,
    examined: Examination,
    ranks: list[OfRank],
) -> None:
    """Draw the last step that was run below its plan, and answers to held-out samples."""
    events = [event for of_rank in ranks for event in of_rank.events]
    if events:
        _draw_step(folder, job, events)
    for questions, answers in list(examined.values())[:1]:
        draw_predictions(folder / "predictions.png", questions, answers)


def _draw_step(folder: Path, job: Job, events: list[Event]) -> None:
    """Draw a measured step; its plan has the job's costs, or else the means of what was measured."""
    train = job.spec.train
    last = max(step for step in range(train.steps) if not is_passed_over(train, step))
    program = plan_step(job.step(last), job.order)
    ran = measured(program, events)
    planned = simulate(program, job.spec.schedule.costs or mean_costs(events))
    with (folder / "trace.json").open("w", encoding="utf-8") as file:
        file.writelines(perfetto.lines(ran))
    costs = "the job's costs" if job.spec.schedule.costs else "the mean times of its actions"
    title = f"step {last}: {ran.step_s:.4g} s measured, {planned.step_s:.4g} s planned with {costs}"
    (folder / "timeline.svg").write_text(svg(above(planned, ran, title)), encoding="utf-8")


def compose(
    runtime: RankRuntime,
    tally: Tally,
    training_s: float,
    examined: Examination,
    ranks: list[OfRank],
) -> dict[str, Any]:
    """Return the report of a run."""
    accuracy = {
        task: sum(answer.is_right for answer in answers) / len(answers)
        for task, (_, answers) in examined.items()
    }
    first, *others = accuracy.items() if accuracy else [(None, None)]
    return {
        "layout": runtime.topology.role(runtime.rank).layout.value,
        "world_size": runtime.topology.world_size,
        "steps": runtime.job.spec.train.steps,
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
        "versions": versions(),
    }
