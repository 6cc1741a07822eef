"""The command line: ``mimogrid COMMAND JOB``.

Exit codes: 0 done; 2 the job (or the command) is wrong, every problem listed; 1 a failure while running; 75 a run was
asked to stop, and can be resumed. With ``--json`` one value goes to standard output and nothing else does.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import attrs

from mimogrid.core.base.errors import EchoError, PlanError, Problem, WorldError
from mimogrid.shell.cli import commands
from mimogrid.shell.cli.arguments import parser
from mimogrid.shell.cli.output import print_json
from mimogrid.shell.device.place import under_torchrun
from mimogrid.shell.job.builders import PlanWarning
from mimogrid.shell.job.jobs import Job, open_job


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
        given = parser().parse_args(arguments)
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
    if given.command not in {commands.train, commands.parity, commands.probe}:
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
    return job


def _report(problems: Sequence[Problem], *, as_json: bool) -> None:
    """Print problems, one after the other or as one value."""
    if as_json:
        print_json({"ok": False, "problems": [attrs.asdict(problem) for problem in problems]})
        return
    for problem in problems:
        print(problem, file=sys.stderr)
