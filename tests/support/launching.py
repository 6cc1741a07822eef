"""Launching: the command as a launcher starts it, in processes that are forked with everything imported."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from injection import injected
from mimogrid.shell.cli.main import main


METHOD = "forkserver"


def command(arguments: Sequence[str], said: Path, variables: Mapping[str, str], fault: str) -> None:
    """Run `mimogrid` as this process, with these variables; what it says as an error is added to a file.

    After a restart by a launcher the fault is over.
    """
    os.environ.update(variables)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), sys.stderr.fileno())
    with injected("" if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else fault):
        code = main(list(arguments))
    if code:
        sys.exit(code)


def started(arguments: Sequence[str], said: Path, variables: Mapping[str, str], *, fault: str) -> BaseProcess:
    """Start `mimogrid` in a process of its own, which suffers a fault."""
    context = multiprocessing.get_context(METHOD)
    process = context.Process(target=command, args=(arguments, said, variables, fault))
    process.start()
    return process


def under_torchrun(ranks: int, arguments: Sequence[str], said: Path, *, fault: str, restarts: int) -> None:
    """Run `mimogrid` on some ranks of this machine, as torchrun does.

    Raises ChildFailedError where it fails once more than it may be restarted.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=said.parent.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method=METHOD,
    )
    elastic_launch(config, command)(arguments, said, {}, fault)
