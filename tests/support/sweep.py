"""The sweep: a run is interrupted in every step, and in every moment of a save, and must end as if it never had been.

Two jobs: the digits, and random samples whose epoch ends in the middle of a step, with dropout. An interruption is

    one     a rank is killed at an action of its program that is drawn for the step
    all     all ranks are killed as the step begins
    term    a rank gets SIGTERM in the step: all stop after it, and save
    again   every run is killed one step after the one before got to: progress is one step at a time
    MOMENT  in a save, a rank is killed there, or its disk is full or no longer writable (`SAVES`)
"""

import errno
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs

import harm
from layouts import job as written
from mimogrid.core.base.errors import WorldError
from mimogrid.core.base.hashing import draw_integer
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.spec import JobSpec, SourceFacts, TrainSpec
from mimogrid.shell.checkpoint import manifest, saving
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.job.sources.synthetic import Synthetic, synthetic
from mimogrid.shell.run import train
from mimogrid.shell.run.folders import Stopped
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world import preemption
from mimogrid.shell.world.launch import Pool
from scale import nightly_only


if TYPE_CHECKING:
    import torch


DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "job.toml"
STEPS, EVERY, SAVED = 6, 2, 4
EPOCH = 30
"""Samples of an epoch; a step takes 12, so an epoch ends in the third."""


# -- jobs --------------------------------------------------------------------------------------------------


@attrs.frozen
class Epochs:
    """A data set of `EPOCH` random samples, in another order in every epoch."""

    inner: Synthetic
    known: SourceFacts

    def facts(self) -> SourceFacts:
        """What the plan needs."""
        return self.known

    def _within(self, sample_id: int) -> int:
        """Which of the data set: epochs are shifted, and every other is turned around."""
        epoch, place = divmod(sample_id, EPOCH)
        shifted = (place + draw_integer(self.inner.seed, epoch, "shift", 0, EPOCH - 1)) % EPOCH
        return EPOCH - 1 - shifted if epoch % 2 else shifted

    def describe(self, sample_id: int) -> Sample:
        """Describe."""
        return attrs.evolve(self.inner.describe(self._within(sample_id)), id=sample_id)

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Load."""
        return self.inner.load(self._within(sample_id), module)


def epochs(*, graph: ModuleGraph, models: Mapping[str, Any], seed: int, **options: Any) -> Epochs:
    """Open the data set; options are those of `synthetic`."""
    made, facts, problems = synthetic(graph=graph, models=models, seed=seed, options=options)
    assert made is not None, problems
    return Epochs(made, facts)


def _limits(*, beside: bool, every: int = EVERY) -> TrainSpec:
    return TrainSpec(
        steps=STEPS, checkpoint_every=every, checkpoint_async=beside, evaluate=False, timeout_s=20.0
    )


def _epochs_job() -> JobSpec:
    dropout = {"options": {"dropout": 0.1}}
    spec = written("enc(1,1,2)@0 lm(1,2,1)@2", samples=3, changes={"enc": dropout, "lm": dropout})
    return attrs.evolve(spec, data=attrs.evolve(spec.data, source="sweep:epochs"))


def opened(name: str, folder: Path, *, beside: bool, every: int = EVERY) -> Job:
    """Open one of the two jobs by its name; its file is put into a folder."""
    spec = jobfile.load(DIGITS) if name == "digits" else _epochs_job()
    path = folder / f"{name}-{every}-{beside}.toml"
    path.write_text(jobfile.dump(attrs.evolve(spec, train=_limits(beside=beside, every=every))))
    return open_job(path)


# -- interruptions -----------------------------------------------------------------------------------------


@attrs.frozen
class Case:
    """An interruption of a job: how, in which step, or in the save of step `SAVED` on which rank, by which harm."""

    job: str
    beside: bool
    way: str
    step: int = SAVED
    rank: int = 0
    harm: str = "kill"

    def __str__(self) -> str:
        how = "beside training" if self.beside else "waited for"
        where = f"{self.harm} on rank {self.rank} where " if self.way in SAVES else ""
        return f"{self.job}, saves {how}: {where}{self.way}, step {self.step}"


SAVES = {
    "half of a shard is written": (0, 3),
    "a shard is written": (0, 3),
    "the manifest is written": (0,),
    "the checkpoint has its name": (0,),
    "half of an old one is removed": (0,),
}
"""Moments of a save, and the ranks that come there."""
HARMS = {"full": errno.ENOSPC, "read-only": errno.EROFS}


def cases() -> Iterator[Case]:
    """Yield every case: each step of each job under both ways of saving, then the moments of a save."""
    for job in ("digits", "epochs"):
        for beside in (False, True):
            for way in ("one", "all", "term"):
                for step in range(STEPS):
                    rank = draw_integer(STEPS, step, f"{job} {beside} {way}", 0, 3)
                    yield Case(job, beside, way, step, rank)
        yield Case(job, beside=False, way="again", step=0)
    for beside in (False, True):
        for way, ranks in SAVES.items():
            for rank in ranks:
                for harm_ in ("kill", *HARMS):
                    yield Case("epochs", beside, way, SAVED, rank, harm_)


def some() -> list[Case]:
    """Return a few cases of the job that takes less time, drawn, one of each kind."""
    every = [case for case in cases() if case.job == "epochs" and case.beside]
    kinds = (
        [case for case in every if case.way == "one"],
        [case for case in every if case.way in SAVES],
        *nightly_only([[case for case in every if case.way == "term"]]),
    )
    return [kind[draw_integer(STEPS, i, "kind", 0, len(kind) - 1)] for i, kind in enumerate(kinds)]


# -- in a world --------------------------------------------------------------------------------------------


def in_world(place: RankPlace, job: Job, folder: str, resume: str | None, case: Case) -> Any:
    """Train with an interruption."""
    struck = case.rank == place.rank or case.way in {"all", "again"}
    with ExitStack() as stack:
        if struck and case.way in SAVES:
            for owner, name, instead in _striking(case):
                stack.enter_context(patch.object(owner, name, instead))
        elif struck and case.way != "one":
            stack.enter_context(patch.object(train, "train_step", _signalled(case)))
        fault = _fault(job, case) if case.way == "one" else ""
        return harm.in_world(place, job, folder, resume, fault)


def _fault(job: Job, case: Case) -> str:
    actions = job.program_of(job.step(case.step)).of(case.rank)
    action = actions[draw_integer(STEPS, case.step, f"action {case}", 0, len(actions) - 1)]
    return f"kill rank {case.rank} step {case.step} at {action}"


def _signalled(case: Case) -> Callable[..., Any]:
    def signalled(runtime: RankRuntime, index: int, *arguments: Any, **named: Any) -> Any:
        if index == case.step:
            os.kill(os.getpid(), signal.SIGTERM if case.way == "term" else signal.SIGKILL)
        return train_step(runtime, index, *arguments, **named)

    return signalled


def _striking(case: Case) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is put in place of functions so that a save comes to harm at one moment."""
    wanted = f"step-{case.step:08}"
    write_shard, sync_names = saving.write_shard, manifest._sync_names

    def strike(path: Path) -> None:
        if case.harm == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(HARMS[case.harm], os.strerror(HARMS[case.harm]), str(path))

    def writes(path: Path, *arguments: Any) -> dict[str, Any]:
        if wanted not in str(path):
            return write_shard(path, *arguments)
        written = write_shard(path, *arguments)
        if case.way.startswith("half"):
            os.truncate(path, written["bytes"] // 2)
        strike(path)
        return written

    def syncs(folder: Path) -> None:
        sync_names(folder)
        named = (folder / wanted).is_dir() and not (folder / f"{wanted}{manifest.PARTIAL}").exists()
        if (case.way == "the manifest is written" and wanted in folder.name) or (
            case.way == "the checkpoint has its name" and named
        ):
            strike(folder)

    def removes(folder: Path, **_: Any) -> None:
        next(Path(folder).glob("shard-*")).unlink()
        strike(folder)

    match case.way:
        case "half of a shard is written" | "a shard is written":
            yield saving, "write_shard", writes
        case "half of an old one is removed":
            yield manifest.shutil, "rmtree", removes
        case _:
            yield manifest, "_sync_names", syncs


# -- judging -----------------------------------------------------------------------------------------------


def judge(pool: Pool, case: Case, folder: Path, whole: Path) -> None:
    """Interrupt a run, go on, and compare with one that was not. Raises AssertionError where they differ."""
    job = opened(case.job, folder, beside=case.beside, every=1 if case.way == "again" else EVERY)
    run = folder / "run"
    run.mkdir()
    tries = range(1, STEPS) if case.way == "again" else [case.step]
    for i, step in enumerate(tries):
        _interrupt(pool, job, run, attrs.evolve(case, step=step), resume=i > 0)
        for checkpoint in manifest.published(run / manifest.CHECKPOINTS):
            assert not list(manifest.damage(checkpoint)), checkpoint
    ended = harm.run(pool, job, run, resume=True)
    assert not ended.report, ended.report
    assert left(whole) == left(run)
    assert not list((run / manifest.CHECKPOINTS).glob(f"*{manifest.PARTIAL}"))


def _interrupt(pool: Pool, job: Job, run: Path, case: Case, *, resume: bool) -> None:
    said, failure = [], ""
    try:
        said = pool.run("sweep:in_world", 4, job, str(run), str(run) if resume else None, case)
    except WorldError as error:
        failure = str(error)
    if case.way == "term":
        assert not failure, failure
        if case.step + 1 < STEPS:  # After the last step there is nothing to stop.
            assert [Stopped(str(run), case.step + 1)] * 4 == said
    elif case.harm == "kill":
        assert "was killed by signal 9" in failure, failure or said
    else:
        assert os.strerror(HARMS[case.harm]) in failure, failure or said
        assert f"--resume {run}" in failure, failure


def left(run: Path) -> tuple[bytes, list[float], dict[str, bytes]]:
    """Return what a run leaves: weights and losses, and all tensors of its last checkpoint."""
    last = manifest.folder_of(run / manifest.CHECKPOINTS, STEPS)
    return (*harm.left(run), {path.name: path.read_bytes() for path in last.glob("shard-*")})


def uninterrupted(pool: Pool, name: str, folder: Path) -> Path:
    """Run a job to its end."""
    run = folder / f"whole-{name}"
    ended = harm.run(pool, opened(name, folder, beside=True), run)
    assert not ended.report, ended.report
    return run


# -- asked twice -------------------------------------------------------------------------------------------


def asked_twice(place: RankPlace, job: Job, folder: str, during_the_save: bool) -> Any:
    """Train; rank 0 gets SIGTERM in step 2, and again: at once, or while it saves. No two signals are one here."""
    write_shard = saving.write_shard

    def stepping(runtime: RankRuntime, index: int, *arguments: Any, **named: Any) -> Any:
        if (runtime.rank, index) == (0, 2):
            for _ in range(1 if during_the_save else 2):
                os.kill(os.getpid(), signal.SIGTERM)
        return train_step(runtime, index, *arguments, **named)

    def writing(path: Path, *arguments: Any) -> dict[str, Any]:
        if "step-00000003" in str(path):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return write_shard(path, *arguments)

    with (
        patch.object(preemption, "SECOND_S", -1.0),
        patch.object(train, "train_step", stepping),
        patch.object(saving, "write_shard", writing),
    ):
        return train.in_world(place, job, None, folder)
