"""Training: the loop over steps on one rank, and what a run leaves in its folder.

    report.json          layout, steps, losses, held-out accuracy, throughput, busy fractions, peak memory
    metrics.jsonl        a line per step
    weights.safetensors  the final weights in the job's precision, full tensors under layout-independent names
    best.safetensors     likewise the weights of the best validation, if the job says which is the best (`validation`)
    timeline.svg         the measured timeline of the last step, below its plan
    trace.json           the measured timeline, for Perfetto
    predictions.png      held-out samples with their predicted and true answers
    profiles/            what torch did in the steps that the job profiles (`profiles`)
    interruptions.jsonl  what the run lost each time that it ended and went on
    flight-recorder/     torch's record of the last operations of the ranks that failed (`flight_recorder`)
    checkpoints/, logs/, what trackers keep (`trackers`), and under a launcher heartbeats/ (`heartbeat`)

The first rank of the job writes all of this but checkpoints and logs, of which every rank writes its own part.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from structlog.typing import FilteringBoundLogger

from mimogrid.core.base.errors import EchoError, PlanError, Problem
from mimogrid.core.faults.stragglers import Straggler
from mimogrid.core.job.changes import changes
from mimogrid.core.schedule.loads import loads_of
from mimogrid.core.step.step import Step
from mimogrid.core.update.decision import is_passed_over
from mimogrid.core.update.trained import trained_lines
from mimogrid.shell.checkpoint import files, manifest
from mimogrid.shell.checkpoint.index import read_index
from mimogrid.shell.checkpoint.manifest import CHECKPOINTS
from mimogrid.shell.checkpoint.saving import Saver, open_saver
from mimogrid.shell.checkpoint.state import beginning, manifest_of, restore, slices_to_load, slices_to_save
from mimogrid.shell.checkpoint.versions import differences
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run import report, run_lock
from mimogrid.shell.run.evaluate import Examined
from mimogrid.shell.run.folders import (
    HEARTBEATS,
    REPORT,
    Stopped,
    claimed,
    finished_report,
    showing_heartbeats,
    stopped,
    write_json,
)
from mimogrid.shell.run.interruptions import ending_at_once, going_on, noting_failure
from mimogrid.shell.run.log import open_log
from mimogrid.shell.run.metrics import MetricsWriter, StragglerWatch, Tally, open_metrics, resumed_tally
from mimogrid.shell.run.validation import NOT_VALIDATED, Functions, Validated, validate
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.ahead import LoadsAhead, open_ahead
from mimogrid.shell.runtime.execute import Executor
from mimogrid.shell.runtime.profiles import executor_of
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.tensor_slices import full_tensors, weights_of
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.flight_recorder import leaving_record
from mimogrid.shell.world.phases import BETWEEN, COLLECTING, FINISHING, LOADING
from mimogrid.shell.world.preemption import StopRequest, receiving_signals
from mimogrid.shell.world.waiting import waiting
from mimogrid.shell.world.world import FAILED


PROFILES = "profiles"
BEST = "best.safetensors"
ENDED = "ended"
"""The mark of a run that has ended, for ranks that idle."""
IDLE_S, LEAVING_S, STOPPING_S = 0.2, 5.0, 20.0
"""How often an idle rank looks; how long others wait for it to leave; how long it waits for them when it is asked to
stop, where torchrun gives it 30 s."""
REFUSED = "refused: "
"""The prefix of what rank 0 answers the others if a run cannot begin."""


def in_world(  # noqa: PLR0917 -- a body is called by position
    place: RankPlace,
    job: Job,
    transport: str | None,
    folder: str | None,
    resume: Path | str | None = None,
    changed: Sequence[str] = (),
) -> dict[str, Any] | Stopped | None:
    """Train a job, on every rank of its world; the first rank of the job returns the report.

    Without a `folder`, rank 0 claims one. Rank 0 also chooses the checkpoint to resume from; keys that are `changed`
    may differ from it. A run that is asked to stop saves its state, and every rank returns `Stopped`. Raises PlanError
    where no folder can be used, or the newest checkpoint is damaged.
    """
    stop_request = StopRequest()
    with (
        receiving_signals(stop_request),
        noting_failure() as note,
        contextlib.ExitStack() as held,
        open_session(place, job, transport=transport, stop_request=stop_request, speaks=True) as session,
    ):
        path = Path(
            folder
            or _decided_by_rank_0(
                session, "folder", lambda: held.enter_context(claimed(job, resume, changed))
            )
        )
        held.enter_context(run_lock.shared(path))
        note.folder = path
        saved = _decided_by_rank_0(session, "checkpoint", lambda: manifest.newest(path / CHECKPOINTS) or "")
        finished = finished_report(path, job.spec.train.steps)
        if finished is not None:
            return finished
        if session.runtime is None:
            return _idle(session, job, path)
        if place.meeting is None:
            session.heartbeat.keep_in(path / HEARTBEATS)
        elif place.rank == 0:
            held.enter_context(showing_heartbeats(path, Path(place.meeting).parent))
        with (
            leaving_record(path, place.rank, backend=session.device.backend),
            ending_at_once(stop_request, path),
        ):
            report = _trained(session, session.runtime, path, saved if resume is not None else None)
        if session.runtime.rank == job.topology.ranks[0]:
            session.world.mark(ENDED)
        _await_idle(session, job)
        return report


def _await_idle(session: Session, job: Job) -> None:
    """Let idle ranks learn that the run has ended, on the rank that may keep the store in which they read it."""
    idle = set(range(1, session.world.size)) - set(job.topology.ranks)
    deadline = time.monotonic() + LEAVING_S
    while session.world.rank == 0 and time.monotonic() < deadline:
        if all(session.world.is_marked(f"{ENDED}/{rank}") for rank in idle):
            break
        time.sleep(IDLE_S)


def _idle(session: Session, job: Job, folder: Path) -> Stopped | None:
    """Wait on a rank that is in no grid until the run has ended.

    A launcher takes a rank that ends for one whose part is done: torchrun would neither restart it with the others, nor
    use it in a larger layout. Raises EchoError where another rank fails.
    """
    asked_s: float | None = None
    while not session.world.is_marked(ENDED):
        if session.world.is_marked(FAILED):
            raise EchoError(f"rank {session.world.rank} idled, and another rank failed")
        if session.stop_request.is_received:
            asked_s = asked_s or time.monotonic()
            if time.monotonic() - asked_s > STOPPING_S:
                break
        time.sleep(IDLE_S)
    session.world.mark(f"{ENDED}/{session.world.rank}")
    _await_idle(session, job)
    return stopped(folder) if session.stop_request.is_received else None


def _trained(
    session: Session, runtime: RankRuntime, folder: Path, saved: str | None
) -> dict[str, Any] | Stopped | None:
    """Train in a folder from the start, or from what was `saved` ("": nothing yet)."""
    job = runtime.job
    settings = job.spec.train
    is_first = runtime.rank == job.topology.ranks[0]
    with (
        open_log(folder / "logs", runtime.role, speaks=is_first) as log,
        open_saver(
            folder / CHECKPOINTS,
            runtime.group,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            timeout_s=settings.timeout_s,
            on_phase=session.heartbeat.enter,
            on_wait=session.heartbeat.wait_for_others,
        ) as saver,
        open_ahead(job, log.warning) as ahead,
    ):
        if session.device.is_asynchronous:  # a CPU has no choice
            _log_layers(runtime, log)
        if job.is_elastic:
            log.info("layout", ranks=len(job.topology.ranks), of=session.world.size)
        if is_first:
            for line in trained_lines(job.topology):
                log.info(line)
        if ahead:
            runtime.source.source = ahead
        functions = Functions.of(job.spec.validation) if is_first and job.tasks else Functions()
        run = Run(session, runtime, folder, log, saver, is_first, ahead, functions)
        tally = run.train(0 if saved is None else run.resume(saved))
        return tally if isinstance(tally, Stopped) else run.finish(tally)


def _log_layers(runtime: RankRuntime, log: FilteringBoundLogger) -> None:
    """Log in one line whose layers the stages of this rank use."""
    choices = {stage.module: runner.network.layers_by for stage, runner in runtime.stages.items()}
    engines = {
        name: f"{choice.engine} {choice.version}".strip() + (f" ({choice.reason})" if choice.reason else "")
        for name, choice in choices.items()
        if choice
    }
    if engines:
        log.info("layers", **engines)


def _decided_by_rank_0(session: Session, key: str, decide: Callable[[], Path | str]) -> str:
    """Return on every rank what rank 0 decides; its PlanError is raised on every rank, too."""

    def decided() -> str:
        try:
            return str(decide())
        except PlanError as error:
            return REFUSED + json.dumps([attrs.astuple(problem) for problem in error.problems])

    answer = session.world.first_decides(key, decided)
    if answer.startswith(REFUSED):
        raise PlanError(Problem(*problem) for problem in json.loads(answer.removeprefix(REFUSED)))
    return answer


@attrs.frozen(eq=False)
class Run:
    """A run on this rank; the first rank of the job keeps its metrics and its report."""

    session: Session
    runtime: RankRuntime
    folder: Path
    log: FilteringBoundLogger
    saver: Saver
    is_first: bool
    ahead: LoadsAhead | None = None
    functions: Functions = attrs.field(factory=Functions)

    def resume(self, saved: str) -> int:
        """Load a checkpoint; return the step that is next, 0 where there is no checkpoint."""
        if not saved:
            self.log.warning("no whole checkpoint in this run: beginning at step 0", folder=str(self.folder))
            return 0
        self.session.heartbeat.enter(LOADING)
        facts = manifest.read_manifest(Path(saved))
        with beginning(self.runtime, read_index(Path(saved)).keys()) as is_loaded:
            slices = slices_to_load(self.runtime, facts)
            wanted = {name: of for name, of in slices.items() if is_loaded(name)}
            files.load(Path(saved), wanted, self.runtime.group)
        restore(self.runtime, facts)
        before = jobfile.recorded(facts["job"], Path(saved, manifest.MANIFEST))
        keys = [change.key for change in changes(before, self.runtime.job.spec)]
        if differing := differences(facts, self.runtime.device.torch):
            message = (
                f"resuming with another kind of machine or torch, so not bitwise: {', '.join(differing)}"
            )
            self.log.warning(message, checkpoint=saved)
        self.log.info("resuming", step=facts["step"], checkpoint=saved, changed=", ".join(keys) or "nothing")
        return int(facts["step"])

    def train(self, start: int) -> Tally | Stopped:
        """Run the steps from `start` to the last, or until a request to stop."""
        job = self.runtime.job
        steps, every = job.spec.train.steps, job.spec.train.checkpoint_every
        again = going_on(self.folder, start) if self.is_first else None
        tally = resumed_tally(self.runtime, self.folder, start) if self.is_first else Tally()
        watch = StragglerWatch(job)
        with contextlib.ExitStack() as stack:
            metrics = None
            if self.is_first:
                opening = open_metrics(self.folder, start, job.spec, self.log.warning)
                metrics = stack.enter_context(opening)
            following = job.step(self._next(start))
            self._expect(following)
            for index in range(start, steps):
                stops = False
                if is_passed_over(job.spec.train, index):
                    self._pass_over(index, tally, metrics)
                else:
                    step, following = following, job.step(self._next(index + 1))
                    if index + 1 < steps:
                        self._expect(following)
                    outcome = self._step(index, step, following)
                    tally.add(index, step, outcome)
                    lagging = watch.after(step, outcome.step_times) if self.is_first else ()
                    self._warn(index, outcome, lagging)
                    validated = self._validated(index, tally)
                    if metrics:
                        metrics.write(index, outcome, tally, lagging, validated.values)
                    tally.ends_early = validated.ends and index + 1 < steps
                    stops = outcome.stops and index + 1 < steps and not tally.ends_early
                if again and (interruption := again.after(index + 1)):
                    self.log.info(str(interruption))
                    again = None
                if stops:
                    self.session.stop_request.accept()
                ends = tally.ends_early or index + 1 == steps
                if stops or ends or (every and (index + 1) % every == 0):
                    self.save(index + 1)
                if stops:
                    return self._stopped(index + 1)
                if ends:
                    break
            self.saver.wait_for_save()
        return tally

    def _expect(self, step: Step) -> None:
        """Let workers load what this rank reads in a step, when they come to it."""
        if self.ahead:
            self.ahead.expect(loads_of(step, self.runtime.job.order_of(step), self.runtime.role))

    def _step(self, index: int, step: Step, following: Step) -> Outcome:
        """Run a step; begin the next phase of the pending save if all ranks are ready for it."""
        self.runtime.has_saved = self.saver.is_ready
        outcome = train_step(self.runtime, index, step, following, executor=self._executor(index))
        if outcome.all_saved:
            self.saver.advance()
            self.session.heartbeat.enter(BETWEEN)
        return outcome

    def _validated(self, index: int, tally: Tally) -> Validated:
        """Validate the model after a step after which the job wants it; keep the best weights."""
        runtime, done = self.runtime, index + 1
        spec, steps = runtime.job.spec.validation, runtime.job.spec.train.steps
        if not spec.every or (done % spec.every and done != steps):
            return NOT_VALIDATED
        before = [values for _, values in tally.validations]
        with waiting("validating", silent=not self.is_first, in_place=False) as shown:
            found = validate(runtime, self.functions, before, shown.tell)
        if self.is_first:
            tally.validations.append((index, found.values))
            self.log.info(
                "validation", **{name: f"{value:.4f}" for name, value in found.values.items()}, step=index
            )
        if found.is_best:
            weights = full_tensors(runtime, weights_of(runtime))
            if self.is_first:
                files.write_file(self.folder / BEST, weights)
        if found.ends:
            self.log.info(
                f"training ends: the last {spec.patience} validations were not the best", step=index
            )
        if tally.meter:
            tally.meter.leave_out()
        self.session.heartbeat.enter(BETWEEN)
        return found

    def _pass_over(self, index: int, tally: Tally, metrics: MetricsWriter | None) -> None:
        """Record a step that train.skip_steps lists."""
        tally.skipped.append(index)
        self.log.info("step passed over: it is in train.skip_steps", step=index)
        if metrics:
            metrics.write_passed_over(index)

    def _warn(self, index: int, outcome: Outcome, lagging: Sequence[Straggler]) -> None:
        """Log stragglers, and a step that was skipped."""
        for straggler in lagging:
            self.log.warning(f"straggler: {straggler}", step=index)
        if not outcome.taken:
            self.log.warning(f"step skipped: {outcome.skipped}", step=index)

    def _stopped(self, step: int) -> Stopped:
        """Wait for the last checkpoint, after which `step` is next."""
        self.saver.wait_for_save()
        self.log.warning("asked to stop: saved", step=step)
        return Stopped(str(self.folder), step)

    def _executor(self, index: int) -> Executor:
        """Return what runs the program of a step."""
        runtime, wanted = self.runtime, self.runtime.job.spec.train.profile
        return executor_of(wanted, self.folder / PROFILES, runtime.device, step=index, rank=runtime.rank)

    def _next(self, index: int) -> int:
        """Return the first step from `index` on that is not passed over."""
        train = self.runtime.job.spec.train
        return next(step for step in itertools.count(index) if not is_passed_over(train, step))

    def save(self, step: int) -> None:
        """Begin to write a checkpoint after which `step` is next."""
        if not self.saver.is_ready:
            self.log.warning("waiting for the previous checkpoint, which is still being written", step=step)
        self.saver.begin(slices_to_save(self.runtime), manifest_of(self.runtime, step))
        if not self.runtime.job.spec.train.checkpoint_async:
            self.saver.wait_for_save()
        self.session.heartbeat.enter(BETWEEN)

    def finish(self, tally: Tally) -> dict[str, Any] | None:
        """Write the final weights, evaluate the model, and write the report, which the first rank returns."""
        self.session.heartbeat.enter(FINISHING)
        self.session.heartbeat.enter(COLLECTING)
        runtime, folder, training_s = self.runtime, self.folder, tally.seconds
        weights = full_tensors(runtime, weights_of(runtime))
        if self.is_first:
            files.write_file(folder / "weights.safetensors", weights)
        if runtime.job.spec.train.evaluate and isinstance(runtime.job.source, Examined):
            self.log.info("answering held-out samples", tasks=", ".join(runtime.job.source.tasks))
        wanted = runtime.job.spec.train.evaluate
        examined = report.examine_tasks(runtime, speaks=self.is_first) if wanted else {}
        ranks = report.gather_ranks(runtime, tally)
        if not self.is_first:
            return None
        whole = report.compose(runtime, tally, training_s, examined, ranks, folder=folder)
        write_json(folder / REPORT, whole)
        self._draw(tally.last_step, examined, ranks)
        facts = {"steps": whole["steps"]}
        if whole["losses"]:
            facts["loss"] = f"{whole['losses'][-1]:.4f}"
        if examined:
            facts |= {"accuracy": whole["accuracy"], **whole["accuracy_text_only"]}
            facts |= whole["generated"][whole["accuracy_of"]]
        self.log.info("finished", **facts, folder=str(self.folder))
        return whole

    def _draw(self, last: int, examined: report.Examination, ranks: list[report.RankReport]) -> None:
        """Draw what was measured. The report is written already, so a picture that fails is only logged."""
        try:
            report.draw(self.folder, self.runtime.job, last, examined, ranks)
        except Exception as error:
            self.log.warning(f"the pictures are not complete: {error!r}", folder=str(self.folder))
