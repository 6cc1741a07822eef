"""Reports: what a finished run leaves about itself, in numbers and pictures."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.draw import perfetto
from mimogrid.core.draw.dashboard import timeline_of, world_of
from mimogrid.core.draw.picture import above
from mimogrid.core.draw.svg import svg
from mimogrid.core.simulate.measured import mean_costs, measured
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.simulate.timeline import Event
from mimogrid.core.update.patience import best_of
from mimogrid.shell.checkpoint.versions import versions
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.evaluate import Answer, Examined, Generative, Questions, examine
from mimogrid.shell.run.folders import STEP
from mimogrid.shell.run.interruptions import interruptions_of
from mimogrid.shell.run.metrics import Tally
from mimogrid.shell.runtime.exchange import gather_objects
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.world.waiting import waiting


COLUMNS, ROWS = 5, 8
"""The size of the grid of held-out samples."""
RIGHT, WRONG = "#0072b2", "#d55e00"  # distinguishable without colour vision; wrong ones also say so
READ_COUNT, OTHER_COUNT = 1280, 128
"""How many held-out samples evaluate the first task, and each further task."""

Examination = Mapping[str, tuple[Questions, tuple[Answer, ...]]]
"""The held-out samples and answers of each task."""


def examine_tasks(runtime: RankRuntime, *, speaks: bool = False) -> Examination:
    """Answer the held-out samples of every task, if the source holds samples out; one rank `speaks` of it."""
    source = runtime.job.source
    if not isinstance(source, Examined) or not runtime.topology.graph.texts:
        return {}
    examined = {}
    for i, task in enumerate(source.tasks):
        questions = source.held_out(task=task)
        with waiting(f"answering held-out samples, task {task}", silent=not speaks, in_place=False) as shown:
            answers = examine(runtime, questions, OTHER_COUNT if i else READ_COUNT, shown.tell)
        examined[task] = (questions, answers)
    return examined


@attrs.frozen
class RankReport:
    """What the report says about one rank; `events` are those of the last step."""

    rank: int
    busy_fraction: float
    peak_bytes: int
    events: tuple[Event, ...]


def gather_ranks(runtime: RankRuntime, tally: Tally) -> list[RankReport]:
    """Gather every rank's measurements on the first; the others get nothing."""
    mine = RankReport(
        rank=runtime.rank,
        busy_fraction=tally.busy_fraction,
        peak_bytes=runtime.device.peak_bytes(),
        events=tuple(
            Event(runtime.rank, timed.action, timed.begin_ns / 1e9, timed.end_ns / 1e9)
            for timed in tally.last
        ),
    )
    return gather_objects(runtime, mine)


def draw(folder: Path, job: Job, last: int, examined: Examination, ranks: list[RankReport]) -> None:
    """Draw step `last`, its plan above what was measured, and answers to held-out samples."""
    events = [event for rank in ranks for event in rank.events]
    if events:
        _draw_step(folder, job, last, events)
    for questions, answers in list(examined.values())[:1]:
        draw_predictions(folder / "predictions.png", questions, answers)


def _draw_step(folder: Path, job: Job, last: int, events: list[Event]) -> None:
    """Draw a measured step below its plan, with the job's costs, or else with the mean times of its actions."""
    program = job.program_of(job.step(last))
    ran = measured(program, events)
    planned = simulate(program, job.spec.schedule.costs or mean_costs(events))
    with (folder / "trace.json").open("w", encoding="utf-8") as file:
        file.writelines(perfetto.lines(ran))
    costs = "the job's costs" if job.spec.schedule.costs else "the mean times of its actions"
    title = (
        f"step {last} (the last): {ran.step_s:.4g} s measured, {planned.step_s:.4g} s planned with {costs}"
    )
    picture = above(planned, ran, title)
    (folder / "timeline.svg").write_text(svg(picture), encoding="utf-8")
    step = {"world": world_of(job.topology), "timelines": [timeline_of(picture)]}
    (folder / STEP).write_text(json.dumps(step, separators=(",", ":")) + "\n", encoding="utf-8")


def draw_predictions(path: Path, questions: Questions, answers: Sequence[Answer]) -> None:
    """Draw a grid of samples with their answers; wrong ones come first and take at most half of it.

    Where something was generated, samples come in their order.
    """
    import matplotlib as mpl  # noqa: PLC0415 -- takes a second to import, and is used once a run

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    wrong = [answer for answer in answers if not answer.is_right]
    right = [answer for answer in answers if answer.is_right]
    ordered = answers if isinstance(questions, Generative) else [*wrong[: COLUMNS * ROWS // 2], *right]
    chosen = ordered[: COLUMNS * ROWS]
    pictures = [_picture(questions, answer) for answer in chosen]
    widest = max(picture.shape[1] for picture in pictures)
    height = 1.15 if isinstance(questions, Generative) else 0.95
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2.6 * COLUMNS, height * ROWS), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, answer, picture in zip(axes.flat, chosen, pictures, strict=False):
        axis.imshow(picture, cmap="gray_r", aspect="equal", vmin=0, vmax=1)
        axis.set_xlim(-0.5, widest - 0.5)  # one scale for all, however long
        predicted, true = questions.spell(answer.predicted), questions.spell(answer.true)
        title = predicted if answer.is_right else f"read {predicted or 'nothing'}, is {true}"
        colour = RIGHT if answer.is_right else WRONG
        if isinstance(questions, Generative):
            title = f"{questions.caption(answer.sample_id, answer.predictions)}\n{title}"
        axis.set_title(title, fontsize=9, color=colour, loc="left")
    shown = f"{len(answers)} held-out samples, {len(wrong)} misread"
    scores = [f"{name} {score:.3g}" for name, score in _generated(questions, answers).items()]
    figure.suptitle(", ".join([shown, *(scores or ["these first, with what they are"])]), fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _picture(questions: Questions, answer: Answer) -> Any:
    """Return what a question shows, with what was generated after its answer."""
    if isinstance(questions, Generative):
        return questions.picture(answer.sample_id, answer.predictions)
    return questions.image(answer.sample_id)


def _generated(questions: Questions, answers: Sequence[Answer]) -> dict[str, float]:
    """Return the means of the scores of what was generated."""
    if not isinstance(questions, Generative):
        return {}
    found: dict[str, list[float]] = {}
    for answer in answers:
        for name, score in questions.scores(answer.sample_id, answer.predictions).items():
            found.setdefault(name, []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def _best(runtime: RankRuntime, tally: Tally) -> int | None:
    """Return the step of the best validation; None where the job does not say which is the best."""
    spec = runtime.job.spec.validation
    known = [(step, values) for step, values in tally.validations if spec.best in values]
    best = best_of([values[spec.best] for _, values in known], highest=spec.highest)
    return None if best is None else known[best][0]


def compose(
    runtime: RankRuntime,
    tally: Tally,
    training_s: float,
    examined: Examination,
    ranks: list[RankReport],
    *,
    folder: Path,
) -> dict[str, Any]:
    """Return the report of a run."""
    accuracy = {
        task: sum(answer.is_right for answer in answers) / len(answers)
        for task, (_, answers) in examined.items()
    }
    steady = tally.meter.whole if tally.meter else None
    first, *others = accuracy.items() if accuracy else [(None, None)]
    return {
        "layout": runtime.role.layout.value,
        "world_size": runtime.topology.world_size,
        "steps": runtime.job.spec.train.steps,
        "skipped_steps": tally.skipped,
        "ended_early_after": tally.last_step + 1 if tally.ends_early else None,
        "validations": [{"step": step, **values} for step, values in tally.validations],
        "best_validation": _best(runtime, tally),
        "losses": tally.losses,
        "losses_by_module": tally.losses_by_module,
        "accuracy": first[1],
        "accuracy_of": first[0],
        "accuracy_text_only": dict(others),
        "generated": {task: _generated(*of_task) for task, of_task in examined.items()},
        "training_s": training_s,
        "interruptions": interruptions_of(folder),
        **(attrs.asdict(steady) if steady else {}),
        "waiting_for_data_by_rank": {
            str(rank): share for rank, share in (tally.meter.waiting_for_data if tally.meter else {}).items()
        },
        "busy_fraction": {str(rank.rank): rank.busy_fraction for rank in ranks},
        "peak_bytes": {str(rank.rank): rank.peak_bytes for rank in ranks},
        "machine": platform.platform(),
        "versions": versions(),
    }
