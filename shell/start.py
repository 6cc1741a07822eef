"""Starting: `train` and `parity` as commands, in a world that torchrun made or in one of local processes.

Nothing here imports torch: the processes that need it do, and a run folder is judged before any is started.
"""

import json
import sys
from typing import TYPE_CHECKING, Any

from mimogrid.core.errors import PlanError
from mimogrid.core.legality import parity_problems
from mimogrid.shell import runs
from mimogrid.shell.jobs import Job, open_job
from mimogrid.shell.launch import Pool
from mimogrid.shell.place import under_torchrun
from mimogrid.shell.preemption import EXIT_CODE, passing_on


if TYPE_CHECKING:
    from mimogrid.shell.parity import Verdict


def train(job: Job, *, resume: str | None, transport: str | None, as_json: bool) -> int:
    """Train a job to its end, or until it is asked to stop. Returns the exit code."""
    place = under_torchrun()
    if place is not None:
        from mimogrid.shell.train import in_world  # noqa: PLC0415 -- imports torch

        job = open_job(job.path, job.overrides)  # again, now that sources that need torch can be opened
        report = in_world(
            place, job, transport, folder=None, resume=runs.resumed_by_launcher(job.spec, resume)
        )
    else:
        folder = runs.claim(job.path, job.spec.train.run_dir, resume)
        report = runs.report_of(folder)
        if report is not None:
            print(f"run '{folder}' is finished: {report['steps']} steps.", file=sys.stderr)
        else:
            report = _first(job, "mimogrid.shell.train:in_world", transport, str(folder), resume)
    if isinstance(report, runs.Stopped):
        if place is None or place.rank == job.topology.ranks[0]:
            print(report, file=sys.stderr)
        return EXIT_CODE
    if as_json and report is not None:
        print(json.dumps(report))
    return 0


def parity(job: Job, *, steps: int, as_json: bool) -> int:
    """Compare a job's layout with one process. Returns the exit code: 1 beyond the tolerance."""
    problems = parity_problems(job.spec)
    if problems:
        raise PlanError(problems)
    verdict: Verdict = _first(job, "mimogrid.shell.parity:in_world", steps)
    print(json.dumps(verdict.as_json()) if as_json else verdict.in_words())
    return 0 if verdict.passed else 1


def _first(job: Job, function: str, *arguments: Any) -> Any:
    """Run a function on a world of local processes; return what the first rank of the job says."""
    size = job.topology.world_size
    with Pool(size) as pool, passing_on(pool.signal):
        return next(r for r in pool.run(function, size, job, *arguments) if r is not None)
