"""Launching: the command as a launcher starts it, in processes that are forked with everything imported."""

import contextlib
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


def command(variables: Mapping[str, str], arguments: Sequence[str], said: Path) -> None:
    """Run `mimogrid` as this process, with these variables; its errors are added to a file. A fault strikes once."""
    os.environ.update(variables)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), sys.stderr.fileno())
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    fault = variables.get("MIMOGRID_FAULT") if first else None
    with injected(fault) if fault else contextlib.nullcontext():
        code = main(list(arguments))
    if code:
        sys.exit(code)


def started(variables: Mapping[str, str], arguments: Sequence[str], said: Path) -> BaseProcess:
    """Start `mimogrid` in a process of its own."""
    process = multiprocessing.get_context(METHOD).Process(target=command, args=(variables, arguments, said))
    process.start()
    return process


def under_torchrun(
    ranks: int, variables: Mapping[str, str], arguments: Sequence[str], said: Path, *, restarts: int = 0
) -> None:
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
    elastic_launch(config, command)(variables, arguments, said)
