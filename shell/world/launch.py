"""Launch: worlds of local processes, on loopback, without torchrun.

A pool keeps its processes between worlds. They are forked from a server that has imported torch and megatron-core, so a
world starts in milliseconds. Each world meets over a file in a temporary folder.

Processes that may use CUDA import both themselves. Importing megatron-core asks the CUDA driver for GPUs, and to a
process that is forked after that the driver shows none.

If a process raises, dies, or is found to be stopped, all processes are ended at once, and a `WorldError` carries the
first failure. All processes end with this one (`orphans`). They listen on loopback only.
"""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import EchoError, PlanError, WorldError
from mimogrid.core.faults.diagnosis import DiagnosedError, Diagnosis
from mimogrid.shell.device.place import RankPlace, prepare
from mimogrid.shell.world import heartbeat
from mimogrid.shell.world.orphans import end_with_launcher
from mimogrid.shell.world.temporary import temporary_folder
from mimogrid.shell.world.waiting import waiting


GRACE_S = 1.0
"""How long after the first failure others may still report, so that the cause is known from what follows from it."""
NO_SERVER = (
    "no rank can be started: the process that forks them has ended. What it said stands above. Mostly a package that "
    "it imports is broken (`mimogrid env` names it), or the machine has run out of memory."
)


@attrs.frozen
class Task:
    """A function of this rank's place in a world: ``function(place, *arguments)``."""

    function: str
    place: RankPlace
    arguments: tuple[Any, ...]


@attrs.frozen
class Report:
    """What a process reports at the end of a task: its result, or its failure; or how it `died`."""

    result: Any = None
    failure: str | None = None
    error: PlanError | DiagnosedError | None = None
    is_echo: bool = False
    died: str | None = None


class Pool:
    """Processes that run worlds, one at a time, of up to `size` ranks; `may_use_cuda`: on GPUs, too.

    If it `speaks`, it says so where ranks take long to start.
    """

    def __init__(self, size: int, *, may_use_cuda: bool = False, speaks: bool = False) -> None:
        self._size = size
        self._speaks = speaks
        self._context: ForkServerContext | SpawnContext
        if may_use_cuda:
            self._context = multiprocessing.get_context("spawn")
        else:
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(["mimogrid.shell.run.preload"])
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: str, size: int, *arguments: Any) -> list[Any]:
        """Run ``package.module:function`` on each rank of a fresh world; return the results by rank.

        Raises PlanError or WorldError for the first failure; the pool can be used again after it.
        """
        assert size <= self._size, f"a pool of {self._size} cannot run {size} ranks"
        with temporary_folder() as folder, waiting(_starting(folder, size), silent=not self._speaks):
            while len(self._workers) < size:
                self._workers.append(self._start())
            meeting = str(folder / "meeting")
            try:
                for rank in range(size):
                    task = Task(function, RankPlace(rank, size, meeting, local_rank=rank), arguments)
                    self._workers[rank][1].send(task)
                return self._collect(self._workers[:size], folder)
            except BaseException:
                self.close()
                raise

    def signal(self, number: int) -> None:
        """Send a signal to every process of the pool."""
        for process, _ in self._workers:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def close(self) -> None:
        """End every process of the pool; SIGKILL also ends those that are stopped."""
        for process, connection in self._workers:
            process.kill()
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, os.getcwd()))
        try:
            process.start()
        except (EOFError, ConnectionError) as error:
            raise WorldError(NO_SERVER) from error
        theirs.close()
        return process, ours

    def _collect(self, workers: list[tuple[BaseProcess, Connection]], folder: Path) -> list[Any]:
        reports: dict[int, Report] = {}
        deadline: float | None = None
        while len(reports) < len(workers):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            waiting = {worker[1]: rank for rank, worker in enumerate(workers) if rank not in reports}
            for connection in multiprocessing.connection.wait(list(waiting), timeout=left):
                rank = waiting[connection]  # type: ignore[index]
                reports[rank] = _received(rank, *workers[rank])
                if reports[rank].failure and deadline is None:
                    deadline = time.monotonic() + GRACE_S
        _raise_first_failure(reports, folder)
        return [reports[rank].result for rank in range(len(workers))]


def _starting(folder: Path, size: int) -> Callable[[], str | None]:
    """Return what says that ranks start, until one has a heartbeat in a folder: from then on ranks speak."""
    started = False

    def subject() -> str | None:
        nonlocal started
        started = started or any(folder.glob("rank-*"))
        return None if started else f"starting {size} processes, which import torch"

    return subject


def _received(rank: int, process: BaseProcess, connection: Connection) -> Report:
    try:
        report: Report = connection.recv()
    except EOFError:
        process.join(timeout=GRACE_S)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code and code < 0 else f"exited with code {code}"
        return Report(failure=f"rank {rank} {how}", died=how)
    return report


def _raise_first_failure(reports: dict[int, Report], folder: Path) -> None:
    """Raise the first failure, not one that follows from it, such as a closed connection.

    A process that dies cannot report. The first rank that notices reports which process died, but not how. If no rank
    has noticed, the heartbeat of the dead rank is in `folder`.
    """
    failed = {rank: report for rank, report in reports.items() if report.failure}
    if not failed:
        return
    rank, first = min(failed.items(), key=lambda item: (item[1].died is None, item[1].is_echo))
    if first.died is None:
        raise first.error or WorldError(first.failure)
    errors = [report.error for report in failed.values() if isinstance(report.error, DiagnosedError)]
    if noticed := [error for error in errors if error.diagnosis.faulty.rank == rank]:
        raise noticed[0].with_cause(rank, first.died)
    record = heartbeat.read(folder).get(rank)
    raise DiagnosedError(Diagnosis(record, first.died, time.time())) if record else WorldError(first.failure)


def _work(connection: Connection, folder: str) -> None:
    """Run tasks as they come, until the pool is gone."""
    end_with_launcher()
    # A terminal's Ctrl-C also comes to the ranks; the launcher says what becomes of them.
    signal.signal(signal.SIGINT, lambda *_: None)
    os.chdir(folder)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    prepare()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task: Task = connection.recv()
            connection.send(_run(task))


def _run(task: Task) -> Report:
    module, function = task.function.split(":")
    try:
        return Report(getattr(importlib.import_module(module), function)(task.place, *task.arguments))
    except (PlanError, DiagnosedError) as error:
        return Report(failure=str(error), error=error)
    except Exception as error:
        text = f"rank {task.place.rank} failed:\n{traceback.format_exc()}"
        return Report(failure=text, is_echo=isinstance(error, EchoError))
