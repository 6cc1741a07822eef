"""Arguments: what can be said to each command.

Each parser says by `command` which function runs (`commands`), and with `job` what is opened before.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mimogrid.core.pricing.machine import EFFICIENCY
from mimogrid.shell.cli import commands


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it gives has `command`, `job` and `json`, and the command's own."""
    made = _Parser(prog="mimogrid", description="Run `mimogrid` alone for an overview.")
    subparsers: Any = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
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
        added: argparse.ArgumentParser = subparsers.add_parser(
            name, help=text, description=text, parents=[common, *more]
        )
        added.set_defaults(command=command)
        return added

    _add_planning_commands(add, of_rank)
    _add_running_commands(add)
    _add_checkpoint_commands(subparsers)
    return made


def _add_planning_commands(
    add: Callable[..., argparse.ArgumentParser], of_rank: argparse.ArgumentParser
) -> None:
    """Add commands that need no torch and no world; `add` makes one that begins with a job."""
    add("check", commands.check, "parse and verify a job, without torch")
    roles_parser = add("roles", commands.roles, "who does what", of_rank)
    roles_parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the map of ranks into a file")
    add("show", commands.show, "the program of each rank", of_rank)
    verify_parser = add("verify", commands.prove, "prove a program sound, without torch")
    verify_parser.add_argument(
        "--program",
        type=Path,
        metavar="FILE",
        help="prove this one, as `show` prints it, instead of the job's own",
    )
    verify_parser.add_argument(
        "--strict", action="store_true", help="one serial queue per pair of ranks must do, too"
    )
    _add_simulate_options(add("simulate", commands.simulate, "the timeline of a step, without running it"))
    _add_plan_options(
        add("plan", commands.plan, "the fastest layout on so many GPUs, and why the others are not")
    )


def _add_running_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add commands that start a world of ranks, or join one; `add` makes one that begins with a job."""
    train_parser = add("train", commands.train, "train a job")
    train_parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run folder")
    _add_changed(train_parser)
    train_parser.add_argument(
        "--transport",
        choices=["host", "nccl"],
        help="move data through host memory, or give each local rank a GPU of its own",
    )
    probe_parser = add("probe", commands.probe, "measure what a job costs on this machine, as a costs file")
    probe_parser.add_argument("--out", type=Path, metavar="FILE", help="write the costs file there")
    probe_parser.add_argument("--repeat", type=int, default=3, metavar="N", help="steps to measure")
    probe_parser.add_argument(
        "--microbatch-sizes",
        type=_sizes,
        default=(),
        metavar="N,N,...",
        help="measure microbatches of so many samples, too",
    )
    parity_parser = add("parity", commands.parity, "compare a job's layout with one process")
    parity_parser.add_argument("--steps", type=int, default=1, metavar="K", help="steps to compare")


def _add_checkpoint_commands(subparsers: Any) -> None:
    """Add commands that begin with what a run has left, and not with a job."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run, or of a checkpoint")
    common.add_argument("--json", action="store_true", help="print one JSON value")
    text = "what is in checkpoints, and which layouts fit, without torch"
    inspect_parser = subparsers.add_parser("inspect", help=text, description=text, parents=[common])
    inspect_parser.add_argument("--job", type=Path, metavar="JOB", help="a job: can it go on from there?")
    inspect_parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    _add_changed(inspect_parser)
    inspect_parser.set_defaults(command=commands.inspect)
    text = "the weights of a run for others"
    export_parser = subparsers.add_parser("export", help=text, description=text, parents=[common])
    export_parser.add_argument("--to", choices=["safetensors", "dcp"], required=True, help="the format")
    export_parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; it must be new or empty")
    export_parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="X", help="cut larger modules into several files"
    )
    export_parser.set_defaults(command=commands.export, job=None)


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
    _add_efficiency(parser)
    parser.add_argument("--schedule", metavar="NAME", help="another schedule than the job's, or all")
    parser.add_argument(
        "--ragged", action="store_true", help="dp ranks take as long as what they have of the step's data"
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


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs that are allocated")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="their kind, such as h100 or a100")
    parser.add_argument("--memory-gb", type=float, metavar="X", help="memory of each; default: all it has")
    _add_efficiency(parser)
    parser.add_argument("--precision", metavar="P", help="price another precision than the job's")
    parser.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="how long the modules of the job took, as `probe` writes it",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the best one as a job file")


def _add_efficiency(parser: argparse.ArgumentParser) -> None:
    text = f"part of its peak that a GPU reaches; {EFFICIENCY}"
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, metavar="E", help=text)


def _sizes(text: str) -> tuple[int, ...]:
    """Read numbers with commas between them."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers, such as 1,2,4") from None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in our words."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n    See {self.prog} --help.\n")
