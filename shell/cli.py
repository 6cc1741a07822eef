"""The command line: ``mimogrid COMMAND JOB``.

Exit codes: 0 done; 2 the job (or the command) is wrong, every problem listed; 1 a failure while running; 75 a run was
asked to stop, and can be resumed. With ``--json`` one value goes to standard output and nothing else does.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs

from mimogrid.core.errors import EchoError, PlanError, Problem, WorldError
from mimogrid.core.roles import RankRole, role_of
from mimogrid.core.schedule.lower import Program, plan_step
from mimogrid.core.topology import Topology
from mimogrid.core.traffic import EdgeTraffic, edge_traffic
from mimogrid.core.verify import verify
from mimogrid.shell import start
from mimogrid.shell.builders import PlanWarning
from mimogrid.shell.jobs import Job, open_job
from mimogrid.shell.output import print_json, write
from mimogrid.shell.place import under_torchrun


WELCOME = """\
mimogrid trains multimodal models with every module on its own grid of ranks.

    mimogrid check JOB     is the job right? what will run where? (needs no torch)
    mimogrid roles JOB     who does what: a table and a map of the ranks
    mimogrid show JOB      everything that each rank will do in a step, action by action
    mimogrid verify JOB    the proof that this can be done: complete, in order, free of deadlock
    mimogrid simulate JOB  how long a step takes, who idles and why, as text or as a picture
    mimogrid plan JOB      the fastest layout on so many GPUs, and why the others are not
    mimogrid probe JOB     what its stages and edges cost on this machine, as a costs file for simulate
    mimogrid train JOB     train it, here or under torchrun
    mimogrid parity JOB    compare it with the same model on one process
    mimogrid inspect RUN   what is in its checkpoints, are they whole, which layouts fit?
    mimogrid export RUN    its weights as safetensors, or as torch's distributed checkpoint

JOB is a TOML file; begin with one from examples/. Any key can be overridden: --set train.steps=20.
`mimogrid COMMAND --help` says more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments in (["-h"], ["--help"], ["help"]):
        print(WELCOME, end="")
        return 0
    try:
        given = _parser().parse_args(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    try:
        return _run(given)
    except KeyboardInterrupt:
        print("mimogrid: interrupted", file=sys.stderr)
        return 130  # what shells give for SIGINT
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- until the interpreter ends
        return 0


def _run(given: argparse.Namespace) -> int:
    """Run a command; tell what is wrong in words, and end with the code that says of which kind it is."""
    try:
        return int(given.command(_opened(given), given))
    except PlanError as error:
        place = under_torchrun()
        if place is None or place.rank == 0:  # all ranks find the same problems: one tells
            _report(error.problems, as_json=given.json)
        return 2
    except EchoError:
        return 1
    except WorldError as error:
        print(f"mimogrid: {error}", file=sys.stderr)
        return 1


def _opened(given: argparse.Namespace) -> Job | None:
    """Open the job, if the command has one, before anything starts.

    What is not checked without torch is noted, unless it will be.
    """
    if given.job is None:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PlanWarning)
        job = open_job(given.job, given.overrides)
    if given.command not in {train, parity, probe}:
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
    return job


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mimogrid", description="Run `mimogrid` alone for an overview.")
    commands: Any = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("job", type=Path, metavar="JOB", help="the job file")
    common.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the job file, such as train.steps=20; repeatable",
    )
    common.add_argument("--json", action="store_true", help="print one JSON value")
    of_rank = argparse.ArgumentParser(add_help=False)
    of_rank.add_argument("--rank", type=int, metavar="R", help="only this rank")

    def add(name: str, command: Callable[..., int], text: str, *more: Any) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, parents=[common, *more]
        )
        added.set_defaults(command=command)
        return added

    _add_planning_commands(add, of_rank)
    _add_running_commands(add)
    _add_checkpoint_commands(commands)
    return parser


def _add_planning_commands(
    add: Callable[..., argparse.ArgumentParser], of_rank: argparse.ArgumentParser
) -> None:
    """Commands that need no torch and no world; `add` makes one that begins with a job."""
    add("check", check, "parse and verify a job, without torch")
    roles_parser = add("roles", roles, "who does what", of_rank)
    roles_parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the map of ranks into a file")
    add("show", show, "the program of each rank", of_rank)
    verify_parser = add("verify", prove, "prove a program sound, without torch")
    verify_parser.add_argument(
        "--program",
        type=Path,
        metavar="FILE",
        help="prove this one, as `show` prints it, instead of the job's own",
    )
    verify_parser.add_argument(
        "--strict", action="store_true", help="one serial queue per pair of ranks must do, too"
    )
    _add_simulate_options(add("simulate", simulate, "the timeline of a step, without running it"))
    plan_parser = add("plan", plan, "the fastest layout on so many GPUs, and why the others are not")
    plan_parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs that are allocated")
    plan_parser.add_argument("--gpu", required=True, metavar="NAME", help="their kind, such as h100 or a100")
    plan_parser.add_argument(
        "--memory-gb", type=float, metavar="X", help="memory of each; default: all it has"
    )
    plan_parser.add_argument(
        "--efficiency", type=float, default=0.5, metavar="E", help="part of its peak that a GPU reaches; 0.5"
    )
    plan_parser.add_argument("--precision", metavar="P", help="price another precision than the job's")
    plan_parser.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="how long the modules of the job took, as `probe` writes it",
    )
    plan_parser.add_argument("--out", type=Path, metavar="FILE", help="write the best one as a job file")


def _add_running_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Commands that start a world of ranks, or join one; `add` makes one that begins with a job."""
    train_parser = add("train", train, "train a job")
    train_parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run folder")
    _add_changed(train_parser)
    train_parser.add_argument(
        "--transport",
        choices=["host", "nccl"],
        help="move data through host memory, or give each local rank a GPU of its own",
    )
    probe_parser = add("probe", probe, "measure what a job costs on this machine, as a costs file")
    probe_parser.add_argument("--out", type=Path, metavar="FILE", help="write the costs file there")
    probe_parser.add_argument("--repeat", type=int, default=3, metavar="N", help="steps to measure")
    probe_parser.add_argument(
        "--microbatch-sizes",
        type=_sizes,
        default=(),
        metavar="N,N,...",
        help="measure microbatches of so many samples, too",
    )
    parity_parser = add("parity", parity, "compare a job's layout with one process")
    parity_parser.add_argument("--steps", type=int, default=1, metavar="K", help="steps to compare")


def _add_checkpoint_commands(commands: Any) -> None:
    """Commands that begin with what a run has left, and not with a job."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run, or of a checkpoint")
    common.add_argument("--json", action="store_true", help="print one JSON value")
    text = "what is in checkpoints, and which layouts fit, without torch"
    inspect_parser = commands.add_parser("inspect", help=text, description=text, parents=[common])
    inspect_parser.add_argument("--job", type=Path, metavar="JOB", help="a job: can it go on from there?")
    inspect_parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    _add_changed(inspect_parser)
    inspect_parser.set_defaults(command=inspect)
    text = "the weights of a run for others"
    export_parser = commands.add_parser("export", help=text, description=text, parents=[common])
    export_parser.add_argument("--to", choices=["safetensors", "dcp"], required=True, help="the format")
    export_parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; it must be new or empty")
    export_parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="X", help="cut larger modules into several files"
    )
    export_parser.set_defaults(command=export, job=None)


def _add_changed(parser: argparse.ArgumentParser) -> None:
    text = "this key of the job may differ from that of the run: it is meant; repeatable"
    parser.add_argument("--changed", action="append", default=[], metavar="KEY", help=text)


def _add_simulate_options(parser: argparse.ArgumentParser) -> None:
    files = {
        "--svg": "draw the timeline into a file",
        "--trace": "write a trace for Perfetto",
        "--compare": "another job, simulated beside this one; --set is for JOB alone",
    }
    for option, text in files.items():
        parser.add_argument(option, type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--costs",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="seconds of stages and edges; a second one is for --compare",
    )
    parser.add_argument("--gpu", metavar="NAME", help="price FLOPs and bytes by an accelerator, such as h100")
    parser.add_argument(
        "--efficiency", type=float, default=0.5, metavar="E", help="part of its peak that a GPU reaches; 0.5"
    )
    parser.add_argument("--schedule", metavar="NAME", help="another schedule than the job's, or all")
    parser.add_argument(
        "--ragged", action="store_true", help="lanes take as long as what they have of the step's data"
    )
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="every compute action takes longer or shorter: the standard deviation of the logarithm",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="what the jitter is drawn from")
    parser.add_argument("--step", type=int, default=0, metavar="K", help="the step whose samples are taken")
    parser.add_argument(
        "--draws", type=int, default=1, metavar="N", help="as many seeds, and steps if ragged"
    )


def _sizes(text: str) -> tuple[int, ...]:
    """Read numbers with commas between them."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers, such as 1,2,4") from None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in our words."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\n    See {self.prog} --help.", file=sys.stderr)
        raise SystemExit(2)


# -- commands ----------------------------------------------------------------------------------------------


def check(job: Job, given: argparse.Namespace) -> int:
    """Verify the program of step 0, and say what runs where and what crosses the edges."""
    edges: tuple[EdgeTraffic, ...] = ()
    if job.source is not None:
        step = job.step(0)
        faults = verify(plan_step(step))
        if faults:
            remedy = "This is a fault of mimogrid, not of the job: please report it with the job file."
            raise PlanError(Problem("program", fault, remedy) for fault in faults)
        edges = edge_traffic(step)
    if given.json:
        print_json({"ok": True, "problems": [], "edges": [attrs.asdict(edge) for edge in edges]})
    else:
        from mimogrid.shell import banner  # noqa: PLC0415 -- rich takes longer to import than to check a job

        banner.print_layout(job.topology, edges)
    return 0


def roles(job: Job, given: argparse.Namespace) -> int:
    """Say who does what."""
    topology = job.topology
    chosen = [role_of(topology, rank) for rank in _ranks(topology, given.rank)]
    if given.svg:
        from mimogrid.core.draw.ranks import rank_map_svg  # noqa: PLC0415 -- only what is used

        write(given.svg, [rank_map_svg(topology)])
    if given.json:
        print_json({"world_size": topology.world_size, "ranks": [_role_values(role) for role in chosen]})
    else:
        from mimogrid.shell import banner  # noqa: PLC0415

        banner.print_roles(topology, chosen)
    return 0


def _role_values(role: RankRole) -> dict[str, Any]:
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


def show(job: Job, given: argparse.Namespace) -> int:
    """Print the program of step 0."""
    program = _first_program(job)
    programs = {
        rank: [str(action) for action in program.of(rank)] for rank in _ranks(job.topology, given.rank)
    }
    if given.json:
        print_json({"programs": programs})
        return 0
    for rank, actions in programs.items():
        hosted = ", ".join(str(info.stage) for info in job.topology.stages_of(rank))
        print(f"rank {rank}    # {hosted or 'idles: it is in no grid'}")
        for action in actions:
            print(f"    {action}")
    return 0


def prove(job: Job, given: argparse.Namespace) -> int:
    """Verify the program of step 0, or one from a file, and say what is in it."""
    from mimogrid.shell.verdict import verdict  # noqa: PLC0415 -- only what is used

    found = verdict(_first_program(job), given.program, strict=given.strict)
    if found.problems and not given.json:
        raise PlanError(found.problems)
    if found.problems:
        problems = [attrs.asdict(problem) for problem in found.problems]
        print_json({"ok": False, "strict": found.strict, "problems": problems})
        return 2
    if given.json:
        print_json({"ok": True, **attrs.asdict(found)})
    else:
        print(found)
    return 0


def simulate(job: Job, given: argparse.Namespace) -> int:
    """Simulate a step."""
    from mimogrid.shell import simulation  # noqa: PLC0415 -- only what is used

    return simulation.run(job, given)


def plan(job: Job, given: argparse.Namespace) -> int:
    """Search for the fastest layout."""
    from mimogrid.shell import planning  # noqa: PLC0415 -- only what is used

    return planning.run(job, given)


def train(job: Job, given: argparse.Namespace) -> int:
    """Train the job."""
    with _torch_is_needed():
        return start.train(
            job,
            resume=given.resume,
            changed=given.changed,
            transport=given.transport,
            as_json=given.json,
        )


def probe(job: Job, given: argparse.Namespace) -> int:
    """Measure what the job costs on this machine."""
    sizes = given.microbatch_sizes
    with _torch_is_needed():
        return start.probe(job, repeat=given.repeat, sizes=sizes, out=given.out, as_json=given.json)


def parity(job: Job, given: argparse.Namespace) -> int:
    """Compare the job's layout with the same model on one process."""
    with _torch_is_needed():
        return start.parity(job, steps=given.steps, as_json=given.json)


def inspect(job: Job | None, given: argparse.Namespace) -> int:
    """Say what is in checkpoints."""
    from mimogrid.shell import inspection  # noqa: PLC0415 -- only what is used

    return inspection.run(job, given)


def export(_: None, given: argparse.Namespace) -> int:
    """Write the weights of a checkpoint for others."""
    with _torch_is_needed():
        from mimogrid.shell import export as exporting  # noqa: PLC0415 -- imports torch

        return exporting.run(given)


@contextlib.contextmanager
def _torch_is_needed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "megatron"}:
            raise
        message = f"this command needs {error.name}: pip install 'mimogrid[train]'"
        raise WorldError(message) from None


# -- small talk --------------------------------------------------------------------------------------------


def _ranks(topology: Topology, rank: int | None) -> Sequence[int]:
    world = range(topology.world_size)
    if rank is None:
        return world
    if rank not in world:
        message = f"rank {rank} is not in the world of {len(world)} ranks."
        raise PlanError([Problem("--rank", message, f"Use 0 to {len(world) - 1}.")])
    return (rank,)


def _first_program(job: Job) -> Program:
    """The program of step 0. Raises PlanError where its samples are not known."""
    return plan_step(job.step(0))


def _report(problems: Sequence[Problem], *, as_json: bool) -> None:
    if as_json:
        print_json({"ok": False, "problems": [attrs.asdict(problem) for problem in problems]})
        return
    for problem in problems:
        print(problem, file=sys.stderr)
