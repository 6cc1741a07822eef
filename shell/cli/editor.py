"""For editors and shells: the schema of the job file, and the completion of the command line."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mimogrid.shell.cli.arguments import CompletionArgs, SchemaArgs, parser
from mimogrid.shell.cli.output import write
from mimogrid.shell.job.schema import header, job_schema


def schema(args: SchemaArgs) -> int:
    """Print the schema, or write it and say how a job file names it."""
    text = json.dumps(job_schema(), indent=None if args.json else 1) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        write(args.out, [text])
        print(
            f"Put this line at the top of a job file in that folder:\n{header(args.out.name)}",
            file=sys.stderr,
        )
    return 0


def completion(args: CompletionArgs) -> int:
    """Print the completion for a shell."""
    import shtab  # noqa: PLC0415 -- only what is used

    whole = parser()
    for action in _actions(whole):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell=args.shell))
    return 0


def _actions(of: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in of._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
