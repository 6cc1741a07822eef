"""The command line: ``mimogrid COMMAND JOB``.

Exit codes: 0 done; 2 the job or the command is wrong, with every problem listed; 1 a failure while running; 75 a run
was asked to stop, and can be resumed. With ``--json`` standard output gets one value and nothing else.
"""

import os
import sys
import traceback
from collections.abc import Sequence

import attrs

from mimogrid.core.base.errors import EchoError, PlanError, Problem, WorldError
from mimogrid.core.base.text import printable
from mimogrid.shell.cli import commands
from mimogrid.shell.cli.arguments import Args, overview, parse
from mimogrid.shell.cli.output import encode_plainly, escaped, print_json
from mimogrid.shell.device.place import under_torchrun
from mimogrid.shell.world.error_file import record_failure
from mimogrid.shell.world.secrets import without_secrets


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    encode_plainly()
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words in (["-h"], ["--help"], ["help"]):
        print(overview(), end="")
        return 0
    if words[0] == "help":
        words = [*words[1:], "--help"]
    try:
        with escaped():
            args = parse(words)
    except SystemExit as error:
        return int(error.code or 0)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("mimogrid: interrupted", file=sys.stderr)
        return 130  # what shells give for SIGINT
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- until the interpreter ends
        return 0


def _run(args: Args) -> int:
    """Run a command; turn errors into words and an exit code, and under torchrun into its error file."""
    try:
        with escaped():
            return commands.run(args)
    except BrokenPipeError:
        raise
    except Exception as error:
        is_expected = isinstance(error, PlanError | WorldError | OSError)
        text = str(error) if is_expected else traceback.format_exc()
        record_failure(_shown(text), is_echo=isinstance(error, EchoError))
        if not is_expected:
            raise
        return _reported(error, as_json=args.json)


def _reported(error: Exception, *, as_json: bool) -> int:
    """Print an error where it is not another rank's to print; return the exit code."""
    if isinstance(error, PlanError):
        place = under_torchrun()
        if place is None or place.rank == 0:  # all ranks find the same problems: one prints them
            _report(error.problems, as_json=as_json)
        return 2
    if not isinstance(
        error, EchoError
    ):  # an OSError is a full disk, a file system that is gone, no descriptors
        print(_shown(f"mimogrid: {error}"), file=sys.stderr)
    return 1


def _report(problems: Sequence[Problem], *, as_json: bool) -> None:
    """Print problems, one after the other or as one value."""
    if as_json:
        print_json({"ok": False, "problems": [attrs.asdict(problem) for problem in problems]})
        return
    for problem in problems:
        print(_shown(str(problem)), file=sys.stderr)


def _shown(text: str) -> str:
    """Return a text as it may stand on a terminal, and in a log of it."""
    return printable(without_secrets(text))
