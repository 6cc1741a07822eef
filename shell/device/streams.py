"""Streams: in which order a device does what it is asked, and when.

A device that computes asynchronously does the work of a stream in order. There is one: modules compute on it, and
messages and sums are posted on it. What carries these begins when all is done that was asked for before, and goes on
beside what is asked for after. Who waits for it lets what is asked from there on happen after it; for that neither the
host nor the device stops. So everything happens as if it were done when it is asked for, and what is posted as if it
were done when it is waited for.

Memory that nobody holds any more is therefore free for whatever is asked for next, at once and on any device. What is
posted is held until it is waited for.

    posted     a message or a sum was posted; its `wait` lets what is asked for after it happen after it
    hear       the host goes on when all is done that was asked for so far
    mark       a moment in that order; when it was, is read later

`Streams` is what a CPU needs, which is nothing: there everything is done in order, when it is asked for.
"""

import contextlib
import datetime
import time
import weakref
from contextlib import AbstractContextManager
from typing import Protocol

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.base.errors import WorldError


POLL_S = 0.001


class Posted(Protocol):
    """A message on its way, or a sum."""

    def wait(self) -> object:
        """Let what is asked from here on happen after it."""


class Mark(Protocol):
    """A moment in the order of what was asked for."""

    @property
    def asked_ns(self) -> int:
        """When the host asked for it, in nanoseconds of the process's monotonic clock."""

    @property
    def ns(self) -> int:
        """When it was, by the same clock; waits for it."""


@attrs.frozen
class Past:
    """A moment that is over when it is asked for."""

    asked_ns: int

    @property
    def ns(self) -> int:
        """When it was."""
        return self.asked_ns


class Streams:
    """The streams of a device that does everything in order, when it is asked."""

    def hear(self) -> None:
        """Block the host until all is done that was asked for so far, and only that."""

    def mark(self) -> Mark:
        """Return the moment at which all is done that was asked for so far, which may be yet to come."""
        return Past(time.perf_counter_ns())

    def posted(self, work: Posted | None, tensor: torch.Tensor, *, arrives: bool) -> Posted:
        """Return what was just posted, which reads a tensor, or where its outcome `arrives` there writes it."""
        assert work is not None, "torch posts nothing where a rank is not in the group"
        return work

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return host memory that a stream can copy from and to by itself."""
        return torch.empty(shape, dtype=dtype)

    def named(self, name: str) -> AbstractContextManager[object]:
        """Let tools that skip state the device know what is asked for inside by a name."""
        del name
        return contextlib.nullcontext()

    def complete(self, work: dist.Work, timeout: datetime.timedelta, what: str) -> None:
        """Block the host until work is done. Raises WorldError, which names it, after the timeout."""
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise WorldError(_too_late(what, timeout)) from error


class CudaStreams(Streams):
    """The stream of a CUDA device that is current when this is made, and that messages and sums are posted on."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._clock = _Clock()

    def hear(self) -> None:
        """Block the host until all is done that was asked for so far, and only that."""
        self._stream.record_event().synchronize()

    def mark(self) -> Mark:
        """Return the moment at which all is done that was asked for so far, which may be yet to come."""
        asked_ns = time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return self._clock.of(event, asked_ns)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return pinned memory; torch keeps it until the copies that streams were asked for are done."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def named(self, name: str) -> AbstractContextManager[object]:
        """Let tools that skip state the device (NVTX) know what is asked for inside by a name."""
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


class _Clock:
    """Tells when events of a device were, by the clock of the process.

    A device tells only how far two of its events are apart. But an event never is before it was asked for, and is at
    that very moment where the device has nothing else to do, as when a step has just been agreed on. So all that have
    not been read are read at once, and the one that was soonest after it was asked for sets the clock.
    """

    def __init__(self) -> None:
        self._unread = weakref.WeakSet[_Awaited]()

    def of(self, event: torch.cuda.Event, asked_ns: int) -> Mark:
        """Return the moment of an event."""
        mark = _Awaited(asked_ns, event, self)
        self._unread.add(mark)
        return mark

    def read(self) -> None:
        """Wait for the last event that has not been read; then tell of all when they were."""
        marks = sorted(self._unread, key=lambda mark: mark.asked_ns)
        self._unread = weakref.WeakSet()
        events = [mark.event for mark in marks]
        events[-1].synchronize()
        since = [round(events[0].elapsed_time(event) * 1e6) for event in events]
        begin = max(mark.asked_ns - ns for mark, ns in zip(marks, since, strict=True))
        for mark, ns in zip(marks, since, strict=True):
            mark.was_ns = begin + ns


@attrs.define(eq=False)
class _Awaited:
    """The moment of an event."""

    asked_ns: int
    event: torch.cuda.Event
    clock: _Clock
    was_ns: int | None = None

    @property
    def ns(self) -> int:
        """When it was; waits for it."""
        if self.was_ns is None:
            self.clock.read()
        assert self.was_ns is not None
        return self.was_ns


def _too_late(what: str, timeout: datetime.timedelta) -> str:
    return f"{what}: not done in {timeout.total_seconds():g} s; some of its ranks have not come, or are gone."
