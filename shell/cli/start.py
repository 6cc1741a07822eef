"""Starting: `train`, `parity` and `probe` as commands, in a world that torchrun made or in one of local processes.

Nothing here imports torch: the processes that need it do, and a run folder is checked before any of them starts.
"""

import importlib.util
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.shell.cli.arguments import LaunchArgs, ParityArgs, ProbeArgs, TrainArgs
from mimogrid.shell.cli.output import print_json, unescaped, write
from mimogrid.shell.device.place import RankPlace, prepare, under_torchrun
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.job.published import origin_of
from mimogrid.shell.run import folders
from mimogrid.shell.run.trackers import missing_trackers
from mimogrid.shell.world import preflight
from mimogrid.shell.world.error_file import record_failure
from mimogrid.shell.world.launch import Pool
from mimogrid.shell.world.orphans import end_with_launcher
from mimogrid.shell.world.preemption import EXIT_CODE, SIGNALS, forwarding_signals


if TYPE_CHECKING:
    from mimogrid.shell.run.parity import ParityReport
    from mimogrid.shell.run.probe.results import Probed
    from mimogrid.shell.run.reference_parity import ReferenceReport


def train(job: Job, args: TrainArgs) -> int:
    """Train a job to its end, or until it is asked to stop. Returns the exit code."""
    place = under_torchrun()
    if problems := list(missing_trackers(job.spec)):
        raise PlanError(problems)
    if args.preflight:
        return _preflight(job, args) if place is None else _preflight_at(place, job, args)
    report = _train_here(job, args) if place is None else _train_at(place, job, args)
    if isinstance(report, folders.Stopped):
        text = f"{report}\n    To go on: {_command(job, report)}"
        record_failure(text)
        if place is None or place.rank == 0:
            print(text, file=sys.stderr)
        return EXIT_CODE
    if args.json and report is not None:
        print_json(report)
    return 0


def _train_here(job: Job, args: TrainArgs) -> Any:
    """Train in a world of local processes; return the report, or `Stopped`."""
    size, uses_cuda = job.topology.world_size, args.transport is not None
    resume = folders.resumed(job, args.resume)
    _check_machine(job, args, on_host=not uses_cuda, folder=folders.planned(job, resume))
    with folders.claimed(job, resume, args.changed) as folder:
        report = folders.finished_report(folder, job.spec.train.steps)
        if report is not None:
            print(f"run '{folder}' is finished: {report['steps']} steps.", file=sys.stderr)
            return report
        print(
            f"{size} ranks start; to look at them: mimogrid watch {shlex.quote(str(folder))}", file=sys.stderr
        )
        arguments = args.transport, str(folder), resume
        with (
            Pool(size, may_use_cuda=uses_cuda, speaks=True) as pool,
            forwarding_signals(pool.signal) as request,
        ):
            try:
                return _first(pool, size, "mimogrid.shell.run.train:in_world", job, *arguments)
            except WorldError as error:
                if request.is_received and _died_as_asked(error):
                    return folders.stopped(folder)
                raise


def _preflight(job: Job, args: TrainArgs) -> int:
    """Say whether this machine can run a job, line by line. Returns the exit code."""
    folder = folders.planned(job, args.resume)
    return _report_checks(
        [*preflight.checks(job.topology, on_host=args.transport is None, folder=folder)], args
    )


def _preflight_at(place: RankPlace, job: Job, args: TrainArgs) -> int:
    """Say, as one rank of torchrun's world, whether its hosts can run a job together. Returns the exit code."""
    end_with_launcher()
    prepare()
    from mimogrid.shell.world.rehearsal import rehearse  # noqa: PLC0415 -- imports torch

    job = open_job(job.path, job.overrides, ranks=place.size)
    found = rehearse(place, job, args.transport, folders.planned(job, args.resume))
    return _report_checks(found, args) if place.rank == 0 else 0


def _report_checks(found: list[preflight.Check], args: TrainArgs) -> int:
    """Print the checks of a preflight. Returns the exit code."""
    lacking = preflight.problems(found, force=args.force)
    if args.json:
        problems = [attrs.asdict(problem) for problem in lacking]
        print_json({"ok": not lacking, "problems": problems, "checks": [attrs.asdict(c) for c in found]})
    else:
        print(*preflight.table(found), sep="\n")
    return 2 if lacking else 0


def _check_machine(job: Job, args: LaunchArgs, *, on_host: bool = True, folder: Path | None = None) -> None:
    """Raise PlanError where this machine cannot run a job in local processes."""
    found = preflight.checks(job.topology, on_host=on_host, folder=folder)
    if lacking := preflight.problems(found, force=args.force):
        raise PlanError(lacking)


def _died_as_asked(error: WorldError) -> bool:
    """Whether a rank ended by a signal that asks it to stop: at that time it was not in the run yet, or it hung."""
    return any(f"killed by signal {number:d}" in str(error).partition("\n")[0] for number in SIGNALS)


def _command(job: Job, stopped: folders.Stopped) -> str:
    """Return the command that goes on with a run."""
    overrides = (word for override in job.overrides for word in ("--set", override))
    return shlex.join(["mimogrid", "train", str(job.path), *overrides, "--resume", stopped.folder])


def _train_at(place: RankPlace, job: Job, args: TrainArgs) -> Any:
    """Train as one rank of torchrun's world; return the report on the first rank of the job, or `Stopped`."""
    end_with_launcher()
    prepare()
    from mimogrid.shell.run.train import in_world  # noqa: PLC0415 -- imports torch

    # Again, now that sources that need torch can be opened, and that it is known how many ranks there are.
    job = open_job(job.path, job.overrides, ranks=place.size)
    resume = folders.resumed_by_launcher(job, args.resume)
    with unescaped():
        return in_world(place, job, args.transport, folder=None, resume=resume, changed=args.changed)


def parity(job: Job, args: ParityArgs) -> int:
    """Compare a job's layout with one process, or with transformers. Returns the exit code: 1 beyond the tolerance."""
    if problems := list(_reference_problems(job) if args.reference else ()):
        raise PlanError(problems)
    _check_machine(job, args)
    body = "reference_parity" if args.reference else "parity"
    report: ParityReport | ReferenceReport = _in_fresh_world(
        job, f"mimogrid.shell.run.{body}:in_world", args.steps, None, not args.json, speaks=not args.json
    )
    print_json(report.as_json()) if args.json else print(report)
    return 0 if report.passed else 1


def _reference_problems(job: Job) -> Iterator[Problem]:
    """Yield why a job cannot be compared with transformers."""
    if importlib.util.find_spec("transformers") is None:
        yield Problem("--reference", "transformers is not installed.", "Run: pip install 'mimogrid[hf]'.")
    if job.spec.precision not in {"fp32", "fp64"}:
        message = f"is {job.spec.precision}, in which transformers rounds elsewhere."
        yield Problem("precision", message, "Compare in another: --set precision=fp64, or fp32.")
    for name, module in job.topology.modules.items():
        if module.aux_loss:
            message = "is a loss that transformers computes otherwise."
            yield Problem(f"modules.{name}.options.aux_loss", message, "Compare without it: set it to 0.")
    origin_of({name: module.weights for name, module in job.spec.modules.items()})


def probe(job: Job, args: ProbeArgs) -> int:
    """Measure what a job costs on this machine, and for other sizes of its microbatches. Returns the exit code."""
    place = under_torchrun()
    problems = list(_probe_problems(job, args, alone=place is None))
    if problems:
        raise PlanError(problems)
    found = _probed_here(job, args) if place is None else _probed_at(place, job, args)
    if not found:  # another rank prints
        return 0
    from mimogrid.shell.run.probe.results import in_json, in_text  # noqa: PLC0415 -- imports torch

    own, *others = found
    text = in_text(own, job, others)
    if args.out:
        write(args.out, text)
    if args.json:
        print_json(in_json(own, others))
    elif not args.out:
        print(text, end="")
    return 0


def _probed_here(job: Job, args: ProbeArgs) -> "list[Probed]":
    """Measure in a world of local processes for each size of microbatches, the job's own first."""
    _check_machine(job, args)
    sizes = (f"batch.global_size={size * job.spec.batch.microbatches}" for size in args.microbatch_sizes)
    jobs = [job, *(open_job(job.path, (*job.overrides, size)) for size in sizes)]
    body = "mimogrid.shell.run.probe.measure:in_world"
    return [_in_fresh_world(one, body, args.repeat, not args.json, speaks=not args.json) for one in jobs]


def _probed_at(place: RankPlace, job: Job, args: ProbeArgs) -> "list[Probed]":
    """Measure as one rank of torchrun's world; only the first rank of the job gets the result."""
    end_with_launcher()
    prepare()
    from mimogrid.shell.run.probe.measure import in_world  # noqa: PLC0415 -- imports torch

    job = open_job(job.path, job.overrides, ranks=place.size)
    with unescaped():
        found = in_world(place, job, args.repeat, not args.json)
    return [] if found is None else [found]


def _probe_problems(job: Job, args: ProbeArgs, *, alone: bool) -> Iterator[Problem]:
    """Yield what is wrong with the options of `probe`, and why it cannot measure a job."""
    if job.topology.tokens_per_cell:
        message = (
            "gives steps different numbers of microbatches, and `probe` measures the same ones in all steps."
        )
        remedy = "Probe with a number: --set batch.tokens_per_microbatch=0 --set batch.microbatches=N."
        yield Problem("batch.tokens_per_microbatch", message, remedy)
    sizes, out = args.microbatch_sizes, args.out
    if args.repeat < 1:
        yield Problem("--repeat", f"is {args.repeat}.", "Use 1 or more.")
    if any(size < 1 for size in sizes):
        yield Problem("--microbatch-sizes", f"has {min(sizes)}.", "Use numbers of samples from 1 on.")
    if sizes and not alone:
        remedy = "Start it without torchrun, or once for each size with --set batch.global_size=N."
        yield Problem("--microbatch-sizes", "need a world for each size.", remedy)
    if out and not out.parent.is_dir():
        yield Problem(str(out), "cannot be written: no such folder.", "Name a file in a folder that exists.")


def _first(pool: Pool, size: int, function: str, *arguments: Any) -> Any:
    """Run a function in a world of local processes; return what the first rank of the job returns."""
    return next(r for r in pool.run(function, size, *arguments) if r is not None)


def _in_fresh_world(job: Job, function: str, *arguments: Any, speaks: bool) -> Any:
    """Run a function in a world that is for nothing else."""
    size = job.topology.world_size
    if speaks:
        print(f"{size} ranks start", file=sys.stderr)
    with Pool(size, speaks=speaks) as pool:
        return _first(pool, size, function, job, *arguments)
