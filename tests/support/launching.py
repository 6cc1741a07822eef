"""Launching: the command as a launcher starts it, in processes that are forked with everything imported.

Its ranks are forked by the same server, as by one of its own that would import everything again.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from injection import injected
from mimogrid.shell.cli.main import main
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.run import train
from mimogrid.shell.world.launch import Pool


METHOD: Literal["forkserver"] = "forkserver"


def command(arguments: Sequence[str], said: Path, variables: Mapping[str, str], fault: str) -> None:
    """Run `mimogrid` as this process, with these variables; what it says as an error is added to a file.

    After a restart by a launcher the fault is over.
    """
    os.environ.update(variables)
    speak_into(said)
    with _suffering("" if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else fault, said):
        code = main(list(arguments))
    if code:
        sys.exit(code)


def speak_into(said: Path) -> None:
    """Add what this process says as an error to a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), sys.stderr.fileno())


@contextlib.contextmanager
def _suffering(fault: str, said: Path) -> Iterator[None]:
    """Let this rank suffer a fault, or the ranks of the local world that this process starts."""
    run = Pool.run

    def run_with_fault(pool: Pool, _: str, size: int, *arguments: Any) -> list[Any]:
        return run(pool, "launching:train_with_fault", size, said, fault, *arguments)

    with injected(fault), patch.object(Pool, "run", run_with_fault):
        yield


def train_with_fault(place: RankPlace, said: Path, fault: str, *arguments: Any) -> Any:
    """Train on a rank of a local world with a fault."""
    speak_into(said)
    with injected(fault):
        return train.in_world(place, *arguments)


def holders(folder: Path) -> set[int]:
    """The processes that hold the lock of a run folder: its launcher and its ranks."""
    return {int(link.parts[2]) for link in Path("/proc").glob("[0-9]*/fd/*") if _is_lock(link, folder)}


def _is_lock(link: Path, folder: Path) -> bool:
    try:
        return link.readlink() == folder.resolve() / "run.lock"
    except OSError:  # of a process that has ended
        return False


def await_that(holds: Callable[[], bool], limit_s: float) -> float:
    """Wait until something holds; return the seconds that it took. Raises AssertionError after the limit."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < limit_s, f"not within {limit_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - begun


def process(target: Callable[..., None], *arguments: Any, **named: Any) -> BaseProcess:
    """A process that has everything imported, and whose processes have."""
    forkserver.ensure_running()
    address = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    return multiprocessing.get_context(METHOD).Process(
        target=_of_server, args=(address, target, arguments, named)
    )


def _of_server(
    address: str, target: Callable[..., None], arguments: Sequence[Any], named: Mapping[str, Any]
) -> None:
    """Call a function; the server that this process was forked by forks its processes, too."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server.ensure_running = address, lambda: None
    target(*arguments, **named)


def started(
    arguments: Sequence[str], said: Path, variables: Mapping[str, str] | None = None, *, fault: str = ""
) -> BaseProcess:
    """Start `mimogrid` in a process of its own, which suffers a fault, or whose ranks do."""
    launcher = process(command, arguments, said, variables or {}, fault)
    launcher.start()
    return launcher


def under_torchrun(
    ranks: int, arguments: Sequence[str], said: Path, *, fault: str, restarts: int = 0
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
    elastic_launch(config, command)(arguments, said, {}, fault)
