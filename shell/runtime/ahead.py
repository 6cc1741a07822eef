"""Loading ahead: workers load what a rank reads in its next microbatches, while it computes.

What will be read, and in which order, is known (`core.schedule.loads`). Workers take samples in that order, and the
rank reads them in that order, whichever worker was faster. Of each sample there is one copy, from when a worker takes
it until its last reader has it. No more is in memory than what the microbatch that computes reads, and those `ahead`.

A worker is a thread of this rank. It calls the source, or has a process of its own call it (`load_process`). Workers
change when a sample is loaded and nothing else: losses are bitwise those without them.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future

import attrs
import torch

from mimogrid.core.schedule.loads import SampleLoad
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.data import LoadError, Loads, load_sample
from mimogrid.shell.runtime.load_process import LoadProcess, start_server


Tensors = Mapping[str, torch.Tensor]
END_S = 1.0
"""How long to wait for a worker at the end; one that is within a load of the user's may take longer, and is left."""


@attrs.define(eq=False)
class _Pending:
    """A sample that is loading or loaded: by which forward it is read, and how many times still."""

    forward: int
    reads: int
    future: Future[Tensors] = attrs.field(factory=Future[Tensors])


class LoadsAhead:
    """A source whose samples are loaded before they are read. One thread reads."""

    def __init__(self, workers: Sequence[Loads], *, ahead: int, timeout_s: float) -> None:
        self._ahead, self._timeout_s = ahead, timeout_s
        self._planned: deque[tuple[SampleLoad, ...]] = deque()
        self._pending: dict[tuple[int, str], _Pending] = {}
        self._submitted = 0
        self._forward = -1
        self._tasks: queue.SimpleQueue[tuple[int, str, Future[Tensors]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"loading {number}", daemon=True)
            for number, worker in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    def expect(self, forwards: Iterable[tuple[SampleLoad, ...]]) -> None:
        """Add what the next forwards read to what will be loaded."""
        self._planned.extend(forwards)
        self._submit()

    def load(self, sample_id: int, module: str) -> Tensors:
        """Return a sample's tensors for a module as soon as they are loaded.

        Raises LoadError if loading failed, or takes longer than the timeout.
        """
        pending = self._pending.get((sample_id, module))
        if pending is None:  # nobody said that it would be read
            pending = self._begin(SampleLoad(sample_id, module, 1), self._forward)
        if pending.forward > self._forward:
            self._forward = pending.forward
            self._submit()
        try:
            tensors = pending.future.result(self._timeout_s)
        except TimeoutError:
            message = f"sample {sample_id}: loading it for module '{module}' takes longer than {self._timeout_s:g} s"
            raise LoadError(f"{message} (train.timeout_s).") from None
        pending.reads -= 1
        if not pending.reads:
            del self._pending[sample_id, module]
        return tensors

    def close(self) -> None:
        """Let workers end; what waits to be loaded is not."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(END_S)

    def _submit(self) -> None:
        """Have workers load what the next forwards read, as far ahead as is allowed."""
        while self._planned and self._submitted <= self._forward + self._ahead:
            for load in self._planned.popleft():
                self._begin(load, self._submitted)
            self._submitted += 1

    def _begin(self, load: SampleLoad, forward: int) -> _Pending:
        pending = self._pending[load.sample_id, load.module] = _Pending(forward, load.reads)
        self._tasks.put((load.sample_id, load.module, pending.future))
        return pending

    def _work(self, worker: Loads) -> None:
        while (task := self._tasks.get()) is not None:
            sample_id, module, future = task
            try:
                future.set_result(load_sample(worker, sample_id, module))
            except Exception as error:
                future.set_exception(error)


@contextlib.contextmanager
def open_ahead(job: Job, warn: Callable[[str], None]) -> Iterator[LoadsAhead | None]:
    """Open the workers of a rank, which load the samples of its job; None for a job without.

    `warn` is told of a process that died and was started again.
    """
    data, source = job.spec.data, job.source
    if not data.workers:
        yield None
        return
    assert source is not None
    with contextlib.ExitStack() as stack:
        workers: list[Loads] = [source] * data.workers
        if data.worker_kind == "process":
            start_server()
            workers = [
                stack.enter_context(contextlib.closing(LoadProcess(job, job.spec.train.threads, warn)))
                for _ in range(data.workers)
            ]
        ahead = LoadsAhead(workers, ahead=data.ahead, timeout_s=job.spec.train.timeout_s)
        try:
            yield ahead
        finally:
            stack.close()  # a process that is killed answers its thread
            ahead.close()
