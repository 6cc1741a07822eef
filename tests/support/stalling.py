"""Stalling: runs whose saving is slow, fails or is killed, at a moment that a test names."""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mimogrid.core.base.errors import EchoError
from mimogrid.shell.checkpoint import saving
from mimogrid.shell.checkpoint.saving import Saver
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run import train
from mimogrid.shell.run.train import in_world
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.train_step import train_step


def killed(  # noqa: PLR0917 -- a body is called by position
    place: RankPlace, job: Job, folder: str, ranks: tuple[int, ...], step: int, stalled: str
) -> None:
    """Train, until these ranks die as a step begins; the checkpoint named `stalled` never gets beyond half a file."""

    def write(path: Path, *_: Any) -> dict[str, Any]:
        path.write_bytes(b"half of a file")
        threading.Event().wait()
        raise AssertionError

    def die(index: int) -> None:
        if index == step and place.rank in ranks:
            os.kill(os.getpid(), signal.SIGKILL)

    with _writing(lambda path: stalled in str(path), write), _before_steps(die):
        in_world(place, job, None, folder)


def slow(place: RankPlace, job: Job, folder: str) -> Any:
    """Train; what is being saved is written only when it is waited for."""
    wanted = threading.Event()
    wait_for_save, write_shard = Saver.wait_for_save, saving.write_shard

    def write(*arguments: Any) -> dict[str, Any]:
        wanted.wait()
        wanted.clear()
        return write_shard(*arguments)

    def waiting(saver: Saver) -> Path | None:
        if not saver.is_ready:
            wanted.set()
        return wait_for_save(saver)

    with _writing(lambda _: True, write), patch.object(Saver, "wait_for_save", waiting):
        return in_world(place, job, None, folder)


def full(place: RankPlace, job: Job, folder: str, rank: int, limit: int) -> tuple[bool, str]:
    """Train where one rank may write no file of more bytes than a limit; tell how it failed."""
    if place.rank == rank:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    return told(place, job, folder)


def told(place: RankPlace, job: Job, folder: str) -> tuple[bool, str]:
    """Train until it fails; return whether it was an echo, and the error."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        in_world(place, job, None, folder)
    except Exception as error:
        return isinstance(error, EchoError), str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    raise AssertionError("it did not fail")


@contextmanager
def _writing(concerned: Callable[[Path], bool], instead: Callable[..., dict[str, Any]]) -> Iterator[None]:
    write_shard = saving.write_shard

    def write(path: Path, *arguments: Any) -> dict[str, Any]:
        return (instead if concerned(path) else write_shard)(path, *arguments)

    with patch.object(saving, "write_shard", write):
        yield


@contextmanager
def _before_steps(act: Callable[[int], None]) -> Iterator[None]:
    def acting(runtime: RankRuntime, index: int, *arguments: Any, **named: Any) -> Any:
        act(index)
        return train_step(runtime, index, *arguments, **named)

    with patch.object(train, "train_step", acting):
        yield
