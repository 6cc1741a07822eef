"""Streams: the order in which a device does what it is asked, and when it does it.

A device that computes asynchronously does the work of a stream in order. There is one stream: modules compute on it,
and messages and reductions are posted on it. A posted operation begins after all that was asked of the stream before,
and runs beside what is asked after. Waiting for it orders what is asked from there on after it; that stops neither the
host nor the device. So the results are the same as if everything ran when it is asked for, and a posted operation ran
when it is waited for.

So memory that nothing refers to any more is free at once for what is asked next, on any device. The tensor of a posted
operation is kept until it is waited for.

    posted       wraps a message or a reduction that was just posted; what is asked after its `wait` runs after it
    synchronize  the host waits for all that was asked so far
    mark         a moment in that order; its time is read later

`Streams` is for a CPU, which does everything in order when it is asked, so there is nothing to do.
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
    """A posted message or reduction."""

    def wait(self) -> object:
        """Order what is asked from here on after it."""


class Mark(Protocol):
    """A moment in the order of a stream."""

    @property
    def asked_ns(self) -> int:
        """When the host asked for the mark, in nanoseconds of the process's monotonic clock."""

    @property
    def ns(self) -> int:
        """When the device was there, by the same clock; waits for it."""


@attrs.frozen
class Past:
    """A moment of a device that does everything when it is asked."""

    asked_ns: int

    @property
    def ns(self) -> int:
        """When the device was there."""
        return self.asked_ns


class Streams:
    """The streams of a device that does everything in order when it is asked."""

    def synchronize(self) -> None:
        """Block the host until the device has done what was asked so far, and only that."""

    def mark(self) -> Mark:
        """Return the moment at which the device has done what was asked so far; it may be in the future."""
        return Past(time.perf_counter_ns())

    def posted(self, work: Posted | None, tensor: torch.Tensor, *, arrives: bool) -> Posted:
        """Return an operation that was just posted; it reads the tensor, or writes it where its result `arrives`."""
        assert work is not None, "torch posts nothing where a rank is not in the group"
        return work

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return host memory that a stream can copy from and to without the host."""
        return torch.empty(shape, dtype=dtype)

    def named(self, name: str) -> AbstractContextManager[object]:
        """Name what is asked inside, for tools that watch the device."""
        del name
        return contextlib.nullcontext()

    def complete(self, work: dist.Work, timeout: datetime.timedelta, what: str) -> None:
        """Block the host until work is done. Raises WorldError after the timeout; `what` names the work."""
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise WorldError(_too_late(what, timeout)) from error


class CudaStreams(Streams):
    """The stream that is current on a CUDA device when this is made; messages and reductions are posted on it, too."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._clock = _Clock()

    def synchronize(self) -> None:
        """Block the host until the device has done what was asked so far, and only that."""
        self._stream.record_event().synchronize()

    def mark(self) -> Mark:
        """Return the moment at which the device has done what was asked so far; it may be in the future."""
        asked_ns = time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return self._clock.of(event, asked_ns)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return pinned memory; torch keeps it until the copies that were asked for are done."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def named(self, name: str) -> AbstractContextManager[object]:
        """Name what is asked inside, for tools that watch the device (NVTX)."""
        nvtx: AbstractContextManager[object] = torch.cuda.nvtx.range(name)
        return nvtx

    def complete(self, work: dist.Work, timeout: datetime.timedelta, what: str) -> None:
        """Block the host until work is done. Raises WorldError after the timeout; `what` names the work."""
        # NCCL's own wait does not hold up the host, and so knows no timeout.
        deadline = time.monotonic() + timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise WorldError(_too_late(what, timeout))
            time.sleep(POLL_S)


class _Clock:
    """Converts the times of a device's events to the clock of the process.

    A device only measures how far two of its events are apart. No event is before the host asked for it. An event is at
    that very moment if the device has nothing else to do, as after a step was agreed on. So all unread events are read
    together, and the event with the smallest delay after it was asked for sets the clock.
    """

    def __init__(self) -> None:
        self._unread = weakref.WeakSet[_Awaited]()

    def of(self, event: torch.cuda.Event, asked_ns: int) -> Mark:
        """Return the moment of an event."""
        mark = _Awaited(asked_ns, event, self)
        self._unread.add(mark)
        return mark

    def read(self) -> None:
        """Wait for the last unread event; then set the times of all unread events."""
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
        """When the device was there; waits for it."""
        if self.was_ns is None:
            self.clock.read()
        assert self.was_ns is not None
        return self.was_ns


def _too_late(what: str, timeout: datetime.timedelta) -> str:
    return f"{what}: not done in {timeout.total_seconds():g} s; some of its ranks have not come, or are gone."
