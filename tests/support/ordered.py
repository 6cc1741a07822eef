"""A stand-in for the stream of a GPU, on a CPU: it does everything at once, and checks that it need not have.

Whatever torch is asked for is noted as read and written memory. The host, the stream and each message or sum that is
posted are parties, and of each it is known what must have happened before (a vector clock: Lamport 1978, Mattern 1989).
What is posted begins after all that the stream was asked for, and is over for the stream when that waited for it; in
memory of the host's, which only gloo uses, it begins after the host, and lets the host wait.

Something is wrong where memory is read or written by somebody who does not know that whoever wrote or read it before
is done; and where memory goes back to the stream, which would take it again, while somebody of whom the stream does not
know may still use it. Memory of the host goes back to the host; torch itself keeps that for the copies of the stream.
What is wrong is told at the end: other ranks wait for what comes after it.

With `without`, a place in the code that orders something, the stand-in does as if that were missing.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mimogrid.shell.device.streams import Posted, Streams


HOST, COMPUTE = "host", "compute"
Clock = dict[str, int]
Access = tuple[str, int]
"""Somebody, and the how many-th of the things that they did."""


@attrs.define(eq=False)
class Memory:
    """What was done with a piece of memory: who took it, who wrote it last, and who has read it since."""

    owner: str
    ref: StorageWeakRef
    written: Access | None = None
    reads: dict[str, int] = attrs.field(factory=dict[str, int])

    def accesses(self) -> Iterator[Access]:
        """Yield everything that must be over before the memory is used for something else."""
        yield from self.reads.items()
        if self.written:
            yield self.written


class OrderedStreams(Streams):
    """Streams that check; open `watching` around what is to be checked.

    `places` are those in the code that were called to order something, `wrong` is what is not ordered.
    """

    def __init__(self, *, without: str | None = None) -> None:
        self.places: dict[str, None] = {}
        self.wrong: dict[str, None] = {}
        self._without = without
        self._clocks: dict[str, Clock] = {party: {party: 0} for party in (HOST, COMPUTE)}
        self._memory: dict[int, Memory] = {}
        self._messages = 0
        self._is_watching = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note and check all that torch is asked for in this thread."""
        self._is_watching = True
        with _Watch(self._note):
            yield
        self._returned()
        self._is_watching = False

    # -- what the transport calls --------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Let the host know all that the stream does."""
        if self._is_called():
            self._learn(HOST, COMPUTE)

    def posted(self, work: Any, tensor: torch.Tensor, *, arrives: bool) -> Posted:
        """Return a message that tells who waits for it that it is over."""
        self._messages += 1
        name = f"message {self._messages}"
        self._clocks[name] = {name: 0}
        is_of_host = self._of(tensor).owner == HOST
        self._learn(name, HOST if is_of_host else COMPUTE)
        self._access(name, [] if arrives else [tensor], [tensor] if arrives else [])
        return _Message(self, name, work, is_of_host)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the host's."""
        buffer = super().host_buffer(shape, dtype)
        self._of(buffer).owner = HOST
        return buffer

    def arrived(self, name: str, *, is_of_host: bool) -> None:
        """Let who waits for a message know that it is over."""
        if self._is_called():
            self._learn(HOST if is_of_host else COMPUTE, name)

    # -- who knows what ------------------------------------------------------------------------------------

    def _is_called(self) -> bool:
        """Note which place called for an order, and say whether it is not to be missing."""
        place = _caller()
        if self._is_watching:
            self.places[place] = None
        return place != self._without

    def _learn(self, party: str, other: str) -> None:
        self._returned()  # Whoever knows more from here on knew less when memory was given back.
        mine = self._clocks[party]
        for who, count in self._clocks[other].items():
            mine[who] = max(mine.get(who, 0), count)

    def _knows(self, party: str, access: Access) -> bool:
        who, count = access
        return self._clocks[party].get(who, 0) >= count

    def _note(self, reads: list[torch.Tensor], writes: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """Note something that the stream was asked for; it begins after what the host knows."""
        for tensor in made:
            self._of(tensor)
        self._learn(COMPUTE, HOST)
        self._access(COMPUTE, reads, writes)

    def _access(self, party: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        clock = self._clocks[party]
        clock[party] += 1
        for tensor in reads:
            memory = self._of(tensor)
            if memory.written and not self._knows(party, memory.written):
                self.wrong[f"{party} reads what {memory.written[0]} may not have written yet"] = None
            memory.reads[party] = clock[party]
        for tensor in writes:
            memory = self._of(tensor)
            for access in memory.accesses():
                if not self._knows(party, access):
                    self.wrong[f"{party} writes over what {access[0]} may still use"] = None
            memory.reads.clear()
            memory.written = party, clock[party]

    def _of(self, tensor: torch.Tensor) -> Memory:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        return self._memory.setdefault(ref.cdata, Memory(COMPUTE, ref))

    def _returned(self) -> None:
        """Check the memory that nobody holds any more; whoever took it may take it again for something else."""
        for key in [key for key, memory in self._memory.items() if memory.ref.expired()]:
            memory = self._memory.pop(key)
            for access in memory.accesses():
                if not any(self._knows(party, access) for party in (HOST, COMPUTE)):
                    self.wrong[f"{memory.owner} takes again what {access[0]} may still use"] = None


@attrs.frozen(eq=False)
class _Message:
    streams: OrderedStreams
    name: str
    work: Any
    is_of_host: bool

    def wait(self) -> None:
        """Wait for the message, and know that it is over; gloo copies the results of some inside the wait."""
        with _disable_current_modes():
            self.work.wait()
        self.streams.arrived(self.name, is_of_host=self.is_of_host)


class _Watch(TorchDispatchMode):
    """Tells which memory each of torch's operations reads, writes and takes."""

    def __init__(
        self, note: Callable[[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]], None]
    ) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func in {torch.ops.c10d.send.default, torch.ops.c10d.recv_.default}:
            return result
        given, got = _tensors((args, kwargs)), _tensors(result)
        old = {tensor.untyped_storage()._cdata for tensor in given}
        made = [tensor for tensor in got if tensor.untyped_storage()._cdata not in old]
        if func.namespace == "c10d":
            written = given
        else:
            schema = func._schema.arguments
            named = [(argument, value) for argument, value in zip(schema, args, strict=False)]
            named += [(argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs]
            changed = [v for argument, v in named if argument.alias_info and argument.alias_info.is_write]
            written = _tensors(changed)
        is_empty = func.__name__.startswith(("empty", "new_empty"))
        self._note(given, [*written, *([] if is_empty else made)], made)
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.numel()]


def _caller() -> str:
    """Return where in the shell the call to order something stands."""
    frame: FrameType | None = sys._getframe(1)
    while frame and "/shell/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "a test"
    file = Path(frame.f_code.co_filename).stem
    return f"{file}.{frame.f_code.co_name}:{frame.f_lineno - frame.f_code.co_firstlineno}"
