"""Training: the loop over steps on one rank, and what a run leaves in its folder.

    report.json          layout, steps, losses, held-out accuracy, throughput, busy fractions, peak memory
    metrics.jsonl        one line a step
    weights.safetensors  the final weights in the job's precision, full tensors under layout-independent names
    timeline.svg         the measured timeline of the last step, below its plan
    trace.json           the measured timeline, for Perfetto
    predictions.png      held-out samples with the answer given and the true one
    profiles/            what torch did in the steps that the job wants profiled (`profiles`)
    checkpoints/, logs/, tensorboard/, and under a launcher heartbeats/ (`heartbeat`)

The first rank of the job writes all of it but checkpoints and logs, to which every rank adds its own.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from safetensors.torch import save_file
from structlog.typing import FilteringBoundLogger

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.faults.stragglers import Straggler
from mimogrid.core.job.changes import changes
from mimogrid.core.step.step import Step
from mimogrid.core.topology.roles import role_of
from mimogrid.core.update.decision import is_passed_over
from mimogrid.shell.checkpoint import files as checkpoint
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.manifest import CHECKPOINTS
from mimogrid.shell.checkpoint.saving import Saver, open_saver
from mimogrid.shell.checkpoint.state import manifest_of, pieces_to_load, pieces_to_save, restore
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run import report
from mimogrid.shell.run.folders import REPORT, Stopped, claimed, report_of, write_json
from mimogrid.shell.run.log import open_log
from mimogrid.shell.run.metrics import Keeper, Lag, Tally, open_keeper, recall
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.execute import Executor
from mimogrid.shell.runtime.pieces import full_tensors, weights_of
from mimogrid.shell.runtime.profiles import executor_of
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.phases import BETWEEN, COLLECTING, FINISHING, LOADING
from mimogrid.shell.world.preemption import receiving_signals


HEARTBEATS = "heartbeats"
PROFILES = "profiles"
REFUSED = "refused: "
"""Begins what rank 0 tells the others where a run cannot begin."""


def in_world(  # noqa: PLR0917 -- a body is called by position
    place: RankPlace,
    job: Job,
    transport: str | None,
    folder: str | None,
    resume: str | None = None,
    changed: Sequence[str] = (),
) -> dict[str, Any] | Stopped | None:
    """Train a job on every rank of its world; the first rank of the job returns the report.

    Without a folder, rank 0 claims one and the others hear which; likewise for the checkpoint to resume from, from
    which the keys `changed` may differ. A run that is asked to stop saves, and every rank returns `Stopped`.
    Raises PlanError where there is no folder, or only a damaged checkpoint.
    """
    with contextlib.ExitStack() as held, open_session(place, job, transport=transport) as session:
        path = Path(
            folder or _hear(session, "folder", lambda: held.enter_context(claimed(job, resume, changed)))
        )
        saved = _hear(session, "checkpoint", lambda: manifest.newest(path / CHECKPOINTS) or "")
        finished = report_of(path)
        if finished is not None or session.runtime is None:
            return finished
        chief = place.rank == job.topology.ranks[0]
        if place.meeting is None:
            session.heartbeat.keep_in(path / HEARTBEATS)
        role, settings = role_of(job.topology, place.rank), job.spec.train
        with (
            open_log(path / "logs", role, speaks=chief) as log,
            receiving_signals(session.stop_request),
            open_saver(
                path / CHECKPOINTS,
                session.runtime.group,
                keep=settings.keep_checkpoints,
                keep_every=settings.keep_every,
                at=session.heartbeat.enter,
                waits=session.heartbeat.wait_for_others,
            ) as saver,
        ):
            if session.device.is_asynchronous:  # a CPU has no choice
                _tell_layers(session.runtime, log)
            run = Run(session, session.runtime, path, log, saver, chief)
            start = run.resume(saved) if resume is not None else 0
            tally = run.train(start)
            return tally if isinstance(tally, Stopped) else run.finish(tally)


def _tell_layers(runtime: RankRuntime, log: FilteringBoundLogger) -> None:
    """Say in one line whose layers the stages of this rank have."""
    choices = {stage.module: runner.network.layers_by for stage, runner in runtime.stages.items()}
    told = {
        name: f"{choice.engine} {choice.version}".strip() + (f" ({choice.reason})" if choice.reason else "")
        for name, choice in choices.items()
        if choice
    }
    if told:
        log.info("layers", **told)


def _hear(session: Session, key: str, decide: Callable[[], Path | str]) -> str:
    """Let rank 0 decide; raise the PlanError that it met on every rank."""

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
    """A run on this rank."""

    session: Session
    runtime: RankRuntime
    folder: Path
    log: FilteringBoundLogger
    saver: Saver
    chief: bool

    def resume(self, saved: str) -> int:
        """Load a checkpoint; return the step to go on with, 0 where there was none."""
        if not saved:
            self.log.warning("no whole checkpoint in this run: beginning at step 0", folder=str(self.folder))
            return 0
        self.session.heartbeat.enter(LOADING)
        facts = manifest.read_manifest(Path(saved))
        checkpoint.load(Path(saved), pieces_to_load(self.runtime, facts), self.runtime.group)
        restore(self.runtime, facts)
        before = jobfile.recorded(facts["job"], Path(saved, manifest.MANIFEST))
        keys = [change.key for change in changes(before, self.runtime.job.spec)]
        self.log.info("resuming", step=facts["step"], checkpoint=saved, changed=", ".join(keys) or "nothing")
        return int(facts["step"])

    def train(self, start: int) -> Tally | Stopped:
        """Run the steps from `start`, until the last or a request to stop; the first rank keeps the metrics."""
        job = self.runtime.job
        steps, every = job.spec.train.steps, job.spec.train.checkpoint_every
        tally = recall(self.folder, start) if self.chief else Tally()
        lag = Lag(job.spec.schedule.costs)
        with contextlib.ExitStack() as stack:
            keeper = stack.enter_context(open_keeper(self.folder, steps)) if self.chief else None
            following = job.step(self._next(start))
            for index in range(start, steps):
                stops = False
                if is_passed_over(job.spec.train, index):
                    self._pass_over(index, tally, keeper)
                else:
                    step, following = following, job.step(self._next(index + 1))
                    outcome = self._step(index, step, following)
                    tally.add(index, step, outcome)
                    lagging = lag.after(step, outcome.step_times) if self.chief else ()
                    self._warn(index, outcome, lagging)
                    if keeper:
                        keeper.keep(index, outcome, tally, lagging)
                    stops = outcome.stops and index + 1 < steps
                if stops:
                    self.session.stop_request.accept()
                if stops or index + 1 == steps or (every and (index + 1) % every == 0):
                    self.save(index + 1)
                if stops:
                    return self._stopped(index + 1)
            self.saver.settle()
        return tally

    def _step(self, index: int, step: Step, following: Step) -> Outcome:
        """Run a step, and let the save in flight go on where all ranks have come as far."""
        self.runtime.has_saved = self.saver.is_ready
        outcome = train_step(self.runtime, index, step, following, executor=self._executor(index))
        if outcome.all_saved:
            self.saver.advance()
            self.session.heartbeat.enter(BETWEEN)
        return outcome

    def _pass_over(self, index: int, tally: Tally, keeper: Keeper | None) -> None:
        tally.skipped.append(index)
        self.log.info("step passed over: it is in train.skip_steps", step=index)
        if keeper:
            keeper.pass_over(index)

    def _warn(self, index: int, outcome: Outcome, lagging: Sequence[Straggler]) -> None:
        for straggler in lagging:
            self.log.warning(f"straggler: {straggler}", step=index)
        if not outcome.taken:
            self.log.warning(f"step skipped: {outcome.skipped}", step=index)

    def _stopped(self, step: int) -> Stopped:
        """Wait for the last checkpoint, from which `step` is the next."""
        self.saver.settle()
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
        """Begin to write a checkpoint from which step `step` is the next."""
        if not self.saver.is_ready:
            self.log.warning("waiting for the checkpoint before, which is still being written", step=step)
        self.saver.begin(pieces_to_save(self.runtime), manifest_of(self.runtime, step))
        if not self.runtime.job.spec.train.checkpoint_async:
            self.saver.settle()
        self.session.heartbeat.enter(BETWEEN)

    def finish(self, tally: Tally) -> dict[str, Any] | None:
        """Write the final weights, examine the model, and report."""
        self.session.heartbeat.enter(FINISHING)
        self.session.heartbeat.enter(COLLECTING)
        runtime, folder, training_s = self.runtime, self.folder, tally.seconds
        weights = full_tensors(runtime, weights_of(runtime))
        if self.chief:
            save_file(weights, folder / "weights.safetensors")
        examined = report.examine_tasks(runtime) if runtime.job.spec.train.evaluate else {}
        ranks = report.gather_ranks(runtime, tally)
        if not self.chief:
            return None
        whole = report.compose(runtime, tally, training_s, examined, ranks)
        write_json(folder / REPORT, whole)
        self._draw(examined, ranks)
        facts = {"steps": whole["steps"]}
        if whole["losses"]:
            facts["loss"] = f"{whole['losses'][-1]:.4f}"
        if examined:
            facts |= {"accuracy": whole["accuracy"], **whole["accuracy_text_only"]}
        self.log.info("finished", **facts, folder=str(self.folder))
        return whole

    def _draw(self, examined: report.Examination, ranks: list[report.OfRank]) -> None:
        """Draw what was measured. The run is over and reported, so a picture that cannot be drawn is only told."""
        try:
            report.draw(self.folder, self.runtime.job, examined, ranks)
        except Exception as error:
            self.log.warning(f"the pictures are not complete: {error!r}", folder=str(self.folder))
