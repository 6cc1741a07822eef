"""Starting: `train`, `parity` and `probe` as commands, in a world that torchrun made or in one of local processes.

Nothing here imports torch: the processes that need it do, and a run folder is judged before any is started.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.validation import parity_problems
from mimogrid.shell.cli.output import print_json, write
from mimogrid.shell.device.place import prepare, under_torchrun
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run import folders as runs
from mimogrid.shell.world.launch import Pool
from mimogrid.shell.world.preemption import EXIT_CODE, forwarding_signals


if TYPE_CHECKING:
    from mimogrid.shell.run.parity import Verdict


def train(
    job: Job, *, resume: str | None, changed: Sequence[str], transport: str | None, as_json: bool
) -> int:
    """Train a job to its end, or until it is asked to stop. Returns the exit code."""
    place = under_torchrun()
    if place is not None:
        prepare()
        from mimogrid.shell.run.train import in_world  # noqa: PLC0415 -- imports torch

        job = open_job(job.path, job.overrides)  # again, now that sources that need torch can be opened
        begun = runs.resumed_by_launcher(job.spec, resume)
        report = in_world(place, job, transport, folder=None, resume=begun, changed=changed)
    else:
        with runs.claimed(job, resume, changed) as folder:
            report = runs.report_of(folder)
            if report is not None:
                print(f"run '{folder}' is finished: {report['steps']} steps.", file=sys.stderr)
            else:
                body, arguments = "mimogrid.shell.run.train:in_world", (transport, str(folder), resume)
                report = _first(job, body, *arguments, may_use_cuda=transport is not None)
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
    verdict: Verdict = _first(job, "mimogrid.shell.run.parity:in_world", steps)
    print(json.dumps(verdict.as_json()) if as_json else verdict.in_words())
    return 0 if verdict.passed else 1


def probe(job: Job, *, repeat: int, sizes: Sequence[int], out: Path | None, as_json: bool) -> int:
    """Measure what a job costs on this machine, and for other sizes of its microbatches. Returns the exit code."""
    place = under_torchrun()
    problems = list(_unmeasurable(repeat, sizes, out, alone=place is None))
    if problems:
        raise PlanError(problems)
    if place is not None:
        prepare()
        from mimogrid.shell.run.probe import in_world  # noqa: PLC0415 -- imports torch

        mine = in_world(place, open_job(job.path, job.overrides), repeat)
        if mine is None:  # another rank tells
            return 0
        found = [mine]
    else:
        jobs = [job, *(open_job(job.path, (*job.overrides, _of_size(job, size))) for size in sizes)]
        found = [_first(one, "mimogrid.shell.run.probe:in_world", repeat) for one in jobs]
    from mimogrid.shell.run.probe.results import in_json, in_text  # noqa: PLC0415 -- imports torch

    own, *others = found
    text = in_text(own, job, others)
    if out:
        write(out, text)
    if as_json:
        print_json(in_json(own, others))
    elif not out:
        print(text, end="")
    return 0


def _of_size(job: Job, size: int) -> str:
    """Return what makes the microbatches of a job have so many samples."""
    return f"batch.global_size={size * job.spec.batch.microbatches}"


def _unmeasurable(repeat: int, sizes: Sequence[int], out: Path | None, *, alone: bool) -> Iterator[Problem]:
    """Yield what is wrong with the options of `probe`."""
    if repeat < 1:
        yield Problem("--repeat", f"is {repeat}.", "Use 1 or more.")
    if any(size < 1 for size in sizes):
        yield Problem("--microbatch-sizes", f"has {min(sizes)}.", "Use numbers of samples from 1 on.")
    if sizes and not alone:
        remedy = "Start it without torchrun, or once for each size with --set batch.global_size=N."
        yield Problem("--microbatch-sizes", "need a world for each size.", remedy)
    if out and not out.parent.is_dir():
        yield Problem(str(out), "cannot be written: no such folder.", "Name a file in a folder that exists.")


def _first(job: Job, function: str, *arguments: Any, may_use_cuda: bool = False) -> Any:
    """Run a function on a world of local processes; return what the first rank of the job says."""
    size = job.topology.world_size
    with Pool(size, may_use_cuda=may_use_cuda) as pool, forwarding_signals(pool.signal):
        return next(r for r in pool.run(function, size, job, *arguments) if r is not None)
