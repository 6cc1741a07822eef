"""Trackers: programs that keep the curves of runs, and show and compare them.

The job names those that a run writes to. All keep what they get on this machine, in the folder of the run, unless the
environment that a tracker reads itself says otherwise: `TRACKIO_DIR`, `WANDB_MODE` and `WANDB_DIR`,
`MLFLOW_TRACKING_URI`. A run goes on without a tracker that fails, and says so once.
"""

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.changes import flat
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job import extras


TENSORBOARD = "tensorboard"
PARAMS, PARAM_LENGTH = 100, 6000
"""How many keys of a job MLflow takes at once, and how long each may be."""
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""How long MLflow tries to reach a server: by itself four minutes, for which all ranks would wait."""
DIGITS = 16
"""The length of the name by which a tracker knows a run that is resumed."""


class Tracker(Protocol):
    """What keeps the curves of one run."""

    def log(self, step: int, curves: Mapping[str, float]) -> None:
        """Add the point of a step to each curve."""
        ...

    def close(self) -> None:
        """Keep all points."""
        ...


@attrs.frozen
class TrackedRun:
    """The run as trackers know it: its folder, the project that it is one of, and the keys of its job."""

    folder: Path
    project: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name for people."""
        return self.folder.resolve().name

    @property
    def id(self) -> str:
        """A name that no other run has; the same after a resume."""
        return hashlib.blake2b(str(self.folder.resolve()).encode()).hexdigest()[:DIGITS]


def tracked(folder: Path, spec: JobSpec) -> TrackedRun:
    """Return a run of a job as trackers know it."""
    return TrackedRun(folder, spec.track.project, flat(attrs.asdict(spec)))


class TensorBoard:
    """Event files in ``tensorboard/``, for ``tensorboard --logdir``."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- only if a job names it

        self._writer = SummaryWriter(str(run.folder / TENSORBOARD))

    def log(self, step: int, curves: Mapping[str, float]) -> None:
        """Add the point of a step to each curve."""
        for name, value in curves.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Keep all points."""
        self._writer.close()


class Trackio:
    """A SQLite file in ``trackio/``, for ``trackio show``."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run.folder / "trackio").resolve()))
        import trackio  # noqa: PLC0415 -- reads the environment

        self._run = trackio.init(
            project=run.project, name=run.name, config=dict(run.config), resume="allow", embed=False
        )

    def log(self, step: int, curves: Mapping[str, float]) -> None:
        """Add the point of a step to each curve."""
        self._run.log(dict(curves), step=step)

    def close(self) -> None:
        """Keep all points."""
        self._run.finish()


class Wandb:
    """Files in ``wandb/``, for ``wandb sync``; with `WANDB_MODE=online` a server gets them at once."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # noqa: PLC0415 -- starts a service

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, step: int, curves: Mapping[str, float]) -> None:
        """Add the point of a step to each curve."""
        self._run.log(dict(curves), step=step)

    def close(self) -> None:
        """Keep all points."""
        self._run.finish()


class Mlflow:
    """A SQLite file ``mlflow.db``, for ``mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db``."""

    def __init__(self, run: TrackedRun) -> None:
        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Metric, Param  # noqa: PLC0415 -- takes seconds
        from mlflow.tracking import MlflowClient  # noqa: PLC0415

        default = f"sqlite:///{(run.folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", default))
        found = self._client.get_experiment_by_name(run.project)
        where = found.experiment_id if found else self._client.create_experiment(run.project)
        known = self._client.search_runs([where], f"tags.mimogrid_run = '{run.id}'")
        tags = {"mimogrid_run": run.id}
        self._run = known[0] if known else self._client.create_run(where, run_name=run.name, tags=tags)
        self._metric = Metric
        if not known:
            params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in run.config.items()]
            for start in range(0, len(params), PARAMS):
                self._client.log_batch(self._run.info.run_id, params=params[start : start + PARAMS])

    def log(self, step: int, curves: Mapping[str, float]) -> None:
        """Add the point of a step to each curve."""
        points = [self._metric(name, value, 0, step) for name, value in curves.items()]
        self._client.log_batch(self._run.info.run_id, metrics=points)

    def close(self) -> None:
        """Keep all points."""
        self._client.set_terminated(self._run.info.run_id)


TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    TENSORBOARD: TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


class Trackers:
    """The trackers of a run. One that fails is left out from then on, after one warning."""

    def __init__(self, names: tuple[str, ...], run: TrackedRun, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            self._safely(name, functools.partial(self._start, name, run))

    def log(self, step: int, curves: Mapping[str, float]) -> None:
        """Add the point of a step to each curve of each tracker."""
        for name, tracker in list(self._open.items()):
            self._safely(name, functools.partial(tracker.log, step, curves))

    def close(self) -> None:
        """Let each tracker keep all points."""
        for name, tracker in list(self._open.items()):
            self._safely(name, tracker.close)

    def _start(self, name: str, run: TrackedRun) -> None:
        self._open[name] = TRACKERS[name](run)

    def _safely(self, name: str, call: Callable[[], None]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # trackers print, and so may the command: JSON
                call()
        except Exception as error:  # whatever the libraries of others raise
            self._open.pop(name, None)
            self._warn(f"the run goes on without the tracker {name}: {type(error).__name__}: {error}")


def missing_trackers(spec: JobSpec) -> Iterator[Problem]:
    """Yield which trackers of a job are not installed."""
    for name in spec.track.to:
        if lacking := extras.missing(name) if name in extras.EXTRAS else []:
            yield extras.lack("track.to", lacking, name)
