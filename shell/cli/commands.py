"""Commands: which function runs for which arguments, and the short commands themselves.

Whatever takes long to import, or needs torch, is imported by the command that uses it.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.layouts import PLANNED, layouts_of
from mimogrid.core.program.verify import verify as faults_of
from mimogrid.core.simulate.fullest import Fullest
from mimogrid.core.step.step import Step
from mimogrid.core.step.traffic import EdgeTraffic, edge_traffic
from mimogrid.core.topology.roles import RankRole, role_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.cli import start
from mimogrid.shell.cli.arguments import (
    Args,
    AssumingArgs,
    CheckArgs,
    CompletionArgs,
    DataIndexArgs,
    DataShowArgs,
    DataStatsArgs,
    EnvArgs,
    ExportArgs,
    InitArgs,
    InspectArgs,
    JobArgs,
    ParityArgs,
    PlanArgs,
    PlanningArgs,
    ProbeArgs,
    ReportArgs,
    RolesArgs,
    SchemaArgs,
    ShowArgs,
    SimulateArgs,
    TrainArgs,
    VerifyArgs,
    WatchArgs,
)
from mimogrid.shell.cli.fit import fit_lines, fit_values, memory_of, microbatch_lines, microbatch_values
from mimogrid.shell.cli.opening import opened
from mimogrid.shell.cli.output import print_json, write
from mimogrid.shell.job import extras
from mimogrid.shell.job.builders import PlanWarning
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.world.waiting import waiting


def run(args: Args) -> int:  # noqa: PLR0911, PLR0912 -- a case for each command
    """Run a command; return its exit code. Raises PlanError and WorldError."""
    if isinstance(args, ProbeArgs | TrainArgs | ParityArgs | ExportArgs):
        extras.require("train", type(args).__name__.removesuffix("Args").lower())
    if isinstance(args, DataIndexArgs | DataShowArgs):
        extras.require("data", "data")
    with _extras_are_named():
        match args:
            case InitArgs():
                from mimogrid.shell.cli import init  # noqa: PLC0415 -- only what is used

                return init.run(args)
            case CheckArgs():
                return check(_opened(args), args)
            case RolesArgs():
                return roles(_opened(args), args)
            case ShowArgs():
                return show(_opened(args), args)
            case VerifyArgs():
                return verify(_opened(args), args)
            case SimulateArgs():
                from mimogrid.shell.cli import simulate  # noqa: PLC0415 -- only what is used

                return simulate.run(_opened(args), args)
            case PlanArgs():
                from mimogrid.shell.cli import plan  # noqa: PLC0415 -- only what is used

                return plan.run(_opened(args), args)
            case ProbeArgs():
                return start.probe(_opened(args), args)
            case TrainArgs():
                return start.train(_opened(args), args)
            case ParityArgs():
                return start.parity(_opened(args), args)
            case InspectArgs():
                from mimogrid.shell.cli import inspect  # noqa: PLC0415 -- only what is used

                return inspect.run(None if args.job is None else _opened(args), args)
            case ExportArgs():
                from mimogrid.shell.cli import export  # noqa: PLC0415 -- imports torch

                return export.run(args)
            case WatchArgs():
                from mimogrid.shell.cli import watch  # noqa: PLC0415 -- only what is used

                return watch.run(args)
            case ReportArgs():
                from mimogrid.shell.cli import report  # noqa: PLC0415 -- only what is used

                return report.run(args)
            case EnvArgs():
                from mimogrid.shell.cli import env  # noqa: PLC0415 -- only what is used

                return env.run(args)
            case SchemaArgs():
                from mimogrid.shell.cli import editor  # noqa: PLC0415 -- only what is used

                return editor.schema(args)
            case CompletionArgs():
                from mimogrid.shell.cli import editor  # noqa: PLC0415 -- only what is used

                return editor.completion(args)
            case DataIndexArgs() | DataShowArgs() | DataStatsArgs():
                from mimogrid.shell.cli import data  # noqa: PLC0415 -- imports pyarrow

                return data.run(args)
            case _:
                raise AssertionError(args)


@contextlib.contextmanager
def _extras_are_named() -> Iterator[None]:
    """Say how to get what a command needs and is not installed. Raises PlanError."""
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, packages in extras.EXTRAS.items():
            if error.name in {name.partition(".")[0] for name in packages.values()}:
                raise PlanError([extras.lack("this command", [str(error.name)], extra)]) from None
        raise


def _opened(args: JobArgs | InspectArgs) -> Job:
    """Open the job of a command. One with ranks is silent: they check what cannot be checked without torch."""
    assert args.job is not None
    if isinstance(args, PlanningArgs | InspectArgs):
        overrides = (*args.overrides, *args.assumed) if isinstance(args, AssumingArgs) else args.overrides
        return opened(args.job, overrides, run_code=not args.no_code, silent=args.json)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        return open_job(args.job, args.overrides)


def check(job: Job, args: CheckArgs) -> int:
    """Verify the program of step 0; print what it needs, the layout and what crosses the edges."""
    edges: tuple[EdgeTraffic, ...] = ()
    memory: dict[str, Fullest] = {}
    step = None if job.source is None else job.step(0)
    many = step is not None and _work(step) > CHECKED_MOST
    if many:
        print(
            "note: this is too much to verify in seconds; `mimogrid verify` takes its time.", file=sys.stderr
        )
    if step is not None and not many:
        faults = faults_of(job.program_of(step))
        if faults:
            remedy = "This is a fault of mimogrid, not of the job: please report it with the job file."
            raise PlanError(Problem("program", fault, remedy) for fault in faults)
        edges, memory = edge_traffic(step), memory_of(step, job.orders)
    sizes = _layout_sizes(job)
    if args.json:
        found: dict[str, Any] = {"ok": True, "problems": [], "edges": [attrs.asdict(edge) for edge in edges]}
        found |= {"layouts": sizes}
        print_json(found | fit_values(job.spec, memory) | microbatch_values(job.topology, step))
    else:
        print(*fit_lines(job.spec, memory), *microbatch_lines(job.topology, step), sep="\n")
        from mimogrid.shell.cli.roles import print_layout  # noqa: PLC0415 -- rich is slow to import

        print_layout(job.topology, edges)
        if job.is_elastic:
            others = ", ".join(map(str, sizes)) or "planned for the ranks that there are"
            print(f"Layouts: {others}. To see another: --set world_size=RANKS.")
    return 0


def _layout_sizes(job: Job) -> list[int]:
    """Return the numbers of ranks for which the job file has layouts."""
    return [] if job.written.layouts == PLANNED else sorted(each.ranks for each in layouts_of(job.written))


CHECKED_MOST = 150_000
"""`check` verifies a step of so much work in about ten seconds."""


def _work(step: Step) -> int:
    """Return how much a step is to verify: forwards of all ranks, and the samples as far as each module counts them."""
    topology, samples = step.topology, len(step.samples)
    forwards = sum(
        m.grid.size * m.microbatches * len(m.stages) // m.grid.extent("pp") for m in topology.modules.values()
    )
    return forwards + samples * len(topology.modules) // 10


def roles(job: Job, args: RolesArgs) -> int:
    """Print the role of each rank."""
    topology = job.topology
    chosen = [role_of(topology, rank) for rank in _ranks(topology, args.rank)]
    if args.svg:
        from mimogrid.core.draw.ranks import rank_map_svg  # noqa: PLC0415 -- only what is used

        write(args.svg, [rank_map_svg(topology)])
    if args.json:
        print_json({"world_size": topology.world_size, "ranks": [_role_values(role) for role in chosen]})
    else:
        from mimogrid.shell.cli.roles import print_roles  # noqa: PLC0415 -- rich is slow to import

        print_roles(topology, chosen)
    return 0


def _role_values(role: RankRole) -> dict[str, Any]:
    """Return a role for a script."""
    return {
        "rank": role.rank,
        "layout": role.layout.value,
        "stages": [
            {
                "module": info.module,
                "pp": info.pp,
                "first": info.is_first_stage,
                "last": info.is_last_stage,
                "position": dict(info.position),
            }
            for info in role.modules.values()
        ],
    }


def show(job: Job, args: ShowArgs) -> int:
    """Print the program of step 0."""
    program = job.program_of(job.step(0))
    programs = {
        rank: [str(action) for action in program.of(rank)] for rank in _ranks(job.topology, args.rank)
    }
    if args.json:
        print_json({"programs": programs})
        return 0
    for rank, actions in programs.items():
        hosted = ", ".join(str(info.stage) for info in job.topology.role(rank).stages)
        print(f"rank {rank}    # {hosted or 'idle: in no grid'}")
        for action in actions:
            print(f"    {action}")
    return 0


def verify(job: Job, args: VerifyArgs) -> int:
    """Verify the program of step 0, or one from a file; print what is in it."""
    from mimogrid.shell.cli.verify import report_on  # noqa: PLC0415 -- only what is used

    with waiting("verifying the program of a step", silent=args.json):
        report = report_on(job.program_of(job.step(0)), args.program, strict=args.strict)
    if report.problems and not args.json:
        raise PlanError(report.problems)
    print_json(report.as_json()) if args.json else print(report)
    return 2 if report.problems else 0


def _ranks(topology: Topology, rank: int | None) -> Sequence[int]:
    """Return all ranks, or the one that was asked for. Raises PlanError where there is no such rank."""
    world = range(topology.world_size)
    if rank is None:
        return world
    if rank not in world:
        message = f"rank {rank} is not in the world of {len(world)} ranks."
        raise PlanError([Problem("--rank", message, f"Use 0 to {len(world) - 1}.")])
    return (rank,)
