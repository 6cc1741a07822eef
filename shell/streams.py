"""Streams: in which order a device does what it is asked, and who may use whose memory.

A device that computes asynchronously does the work of one stream in order, and different streams side by side.
Modules compute on one stream; messages leave on a second and arrive on a third, so that neither holds up the other.
What one stream makes and another uses is ordered by an event, recorded on the one and waited for by the other; for
that neither the device nor the host stops.

Memory goes back to the stream that it was taken on as soon as its last tensor is gone, though another stream may not
have come to use it yet. So a tensor that crosses over is *kept* for the other stream: its memory is not taken again
before what that stream had been asked for by then is done.

    on         what is asked inside is asked of a stream
    follow     one stream goes on when another has done all that it was asked for so far
    keep       memory lasts as long as a stream needs it
    hear       the host goes on when a stream has done all that it was asked for so far
    posted     a message or a sum was posted; its `wait` lets the stream that it is called on go on after it

`Streams` is what a CPU needs, which is nothing: there everything is done in order, when it is asked for.
"""

import contextlib
import datetime
import enum
import time
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist

from mimogrid.core.errors import WorldError


POLL_S = 0.001


class Stream(enum.Enum):
    """What is asked of a device in order: computing, sending, receiving."""

    COMPUTE = "compute"
    SEND = "send"
    RECEIVE = "receive"


class Posted(Protocol):
    """A message on its way, or a sum."""

    def wait(self) -> object:
        """Let what is asked from here on happen after it."""


class Streams:
    """The streams of a device that does everything in order, when it is asked."""

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Ask a stream for what is asked for inside."""
        del stream
        return contextlib.nullcontext()

    def follow(self, stream: Stream, *, after: Stream) -> None:
        """Let a stream go on when another has done all that it was asked for so far."""

    def keep(self, tensor: torch.Tensor, *, until: Stream) -> None:
        """Let a tensor's memory last until a stream has done what it is asked for before the tensor is gone."""

    def hear(self, stream: Stream) -> None:
        """Block the host until a stream has done all that it was asked for so far, and only that."""

    def posted(self, work: Posted | None, tensor: torch.Tensor, *, arrives: bool) -> Posted:
        """Return what was just posted, which reads a tensor, or where its outcome `arrives` there writes it."""
        assert work is not None, "torch posts nothing where a rank is not in the group"
        return work

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return host memory that a stream can copy from and to by itself."""
        return torch.empty(shape, dtype=dtype)

    def named(self, name: str) -> AbstractContextManager[object]:
        """Let tools that watch the device know what is asked for inside by a name."""
        del name
        return contextlib.nullcontext()

    def complete(self, work: dist.Work, timeout: datetime.timedelta, what: str) -> None:
        """Block the host until work is done. Raises WorldError, which names it, after the timeout."""
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise WorldError(_too_late(what, timeout)) from error


class CudaStreams(Streams):
    """The streams of a CUDA device; modules compute on the one that is current when this is made.

    Streams are torch's: it has a few of each device, lends them in turns, and keeps them as long as the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams = {
            Stream.COMPUTE: torch.cuda.current_stream(device),
            Stream.SEND: torch.cuda.Stream(device),
            Stream.RECEIVE: torch.cuda.Stream(device),
        }

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Ask a stream for what is asked for inside."""
        return torch.cuda.stream(self._streams[stream])

    def follow(self, stream: Stream, *, after: Stream) -> None:
        """Let a stream go on when another has done all that it was asked for so far."""
        self._streams[stream].wait_stream(self._streams[after])

    def keep(self, tensor: torch.Tensor, *, until: Stream) -> None:
        """Let a tensor's memory last until a stream has done what it is asked for before the tensor is gone."""
        tensor.record_stream(self._streams[until])

    def hear(self, stream: Stream) -> None:
        """Block the host until a stream has done all that it was asked for so far, and only that."""
        self._streams[stream].record_event().synchronize()

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return pinned memory; torch keeps it until the copies that streams were asked for are done."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def named(self, name: str) -> AbstractContextManager[object]:
        """Let tools that watch the device (NVTX) know what is asked for inside by a name."""
        nvtx: AbstractContextManager[object] = torch.cuda.nvtx.range(name)
        return nvtx

    def complete(self, work: dist.Work, timeout: datetime.timedelta, what: str) -> None:
        """Block the host until work is done. Raises WorldError, which names it, after the timeout."""
        # NCCL's own wait does not hold up the host, and so knows no timeout.
        deadline = time.monotonic() + timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise WorldError(_too_late(what, timeout))
            time.sleep(POLL_S)


def _too_late(what: str, timeout: datetime.timedelta) -> str:
    return f"{what}: not done in {timeout.total_seconds():g} s; some of its ranks have not come, or are gone."
