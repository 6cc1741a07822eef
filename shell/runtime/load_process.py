"""Load processes: a process that loads samples for one worker of a rank, and is started again when it dies.

The process opens the job as the rank did, so a source needs no support for pickling. It is forked from a server that
has imported torch, and that has no threads, no device and no connection to other ranks. It ends with its rank.

A question is a sample and a module. The answer is the names, dtypes and shapes of tensors, and then their bytes, which
go from one process's memory to the other's through a socket, without a copy between. Both ends notice when the other
is gone, whatever ended it.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import attrs
import torch

from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.data import LoadError, load_sample
from mimogrid.shell.world.orphans import end_with_launcher
from mimogrid.shell.world.preemption import SIGNALS


STARTS = 3
"""How many processes may die with one sample before it is taken for the cause."""
SERVER = "MIMOGRID_LOAD_SERVER"
"""The variable of the environment that is set while the server starts (`load_server`)."""
JOIN_S = 5.0
"""How long to wait for the end of a process whose connection is gone."""


@attrs.frozen
class Answer:
    """What was loaded: names, dtypes and shapes, whose bytes follow; or why it was not."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...] = ()
    failure: str = ""


def start_server() -> None:
    """Start the server from which processes are forked, if there is none; the main thread calls it.

    The server ends with the thread that started it.
    """
    multiprocessing.set_forkserver_preload(["mimogrid.shell.runtime.load_server"])
    os.environ[SERVER] = "1"
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ[SERVER]


class LoadProcess:
    """A source in a process of its own, which starts when the first sample is to be loaded. One thread uses it."""

    def __init__(self, job: Job, threads: int, warn: Callable[[str], None]) -> None:
        self._arguments = (os.getcwd(), pickle.dumps(job), threads)
        self._warn = warn
        self._running: tuple[BaseProcess, Connection] | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return a sample's tensors for a module; raises LoadError if it fails, or ends process after process."""
        for start in range(STARTS):
            try:
                return self._ask(sample_id, module)
            except (EOFError, OSError):
                how = self._end()
                what = f"the process that loaded it for module '{module}' {how}"
                if start + 1 < STARTS and not self._is_closed:
                    self._warn(f"sample {sample_id}: {what}, and is started again")
        remedy = "Memory may be short: lower data.workers or data.ahead; data.workers = 0 shows what the source does."
        raise LoadError(f"sample {sample_id}: {what}, {STARTS} times in a row. {remedy}")

    def close(self) -> None:
        """End the process, whatever it does."""
        with self._lock:
            self._is_closed = True
            if self._running is not None:
                self._running[0].kill()

    def _ask(self, sample_id: int, module: str) -> dict[str, torch.Tensor]:
        with self._lock:
            if self._is_closed:
                raise EOFError
            if self._running is None:
                self._running = self._start()
            connection = self._running[1]
        connection.send((sample_id, module))
        answer: Answer = connection.recv()
        if answer.failure:
            raise LoadError(answer.failure)
        tensors = {}
        for name, dtype, shape in answer.tensors:
            tensors[name] = torch.empty(shape, dtype=dtype)
            _receive(connection, tensors[name])
        return tensors

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *self._arguments))
        process.start()
        theirs.close()
        return process, ours

    def _end(self) -> str:
        """Forget a process whose connection is gone; return how it ended."""
        if self._running is None:
            return "did not start"
        (process, connection), self._running = self._running, None
        connection.close()
        process.join(JOIN_S)
        if process.exitcode is None:  # it has closed its end, and lives
            process.kill()
            process.join(JOIN_S)
        code = process.exitcode
        return f"was killed by signal {-code}" if code and code < 0 else f"exited with code {code}"


def serve(connection: Connection, folder: str, pickled: bytes, threads: int) -> None:
    """Open a job and load what is asked for, until the rank is gone."""
    # A terminal or a scheduler asks the ranks to stop, and they read on to the end of the step.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_launcher()
    os.chdir(folder)
    torch.set_num_threads(threads)
    source, failure = None, ""
    try:
        source = pickle.loads(pickled).source
    except Exception:
        failure = f"the job cannot be opened to load its samples:\n{traceback.format_exc()}"
    while True:
        try:
            sample_id, module = connection.recv()
        except (EOFError, OSError):
            return
        tensors: dict[str, torch.Tensor] = {}
        if source is not None:
            failure = ""
            try:
                tensors = {name: _plain(of) for name, of in load_sample(source, sample_id, module).items()}
            except Exception as error:
                failure = str(error)
        shapes = tuple((name, of.dtype, tuple(of.shape)) for name, of in tensors.items())
        connection.send(Answer(shapes, failure))
        for tensor in tensors.values():
            _send(connection, tensor)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose bytes lie in the memory of this process, in order."""
    return tensor.detach().cpu().contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _send(connection: Connection, tensor: torch.Tensor) -> None:
    left = _bytes_of(tensor)
    while left:
        left = left[os.write(connection.fileno(), left) :]


def _receive(connection: Connection, tensor: torch.Tensor) -> None:
    left = _bytes_of(tensor)
    while left:
        count = os.readv(connection.fileno(), [left])
        if not count:
            raise EOFError
        left = left[count:]
