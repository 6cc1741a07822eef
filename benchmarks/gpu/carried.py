"""Carried: the messages of megatron-core's schedule, over the transport of the job.

Megatron's communicators call torch.distributed with tensors of the device. gloo takes none of CUDA's from one rank
to another, so here these calls do with them what `mimogrid.shell.runtime.transport` does with ours: a message
leaves from a copy in pinned host memory, which the host waits for and for nothing else; and arrives in pinned
memory, from where it is copied when somebody waits for it. On the CPU both send tensors as they are.

Only those files of Megatron that talk see other names, and only while `carried` is open:

- ``isend``, ``irecv``, ``send``, ``recv``, ``P2POp`` and ``batch_isend_irecv`` stage, as said; what is in a batch is
  posted one after the other, as torch does with gloo.
- ``broadcast`` and ``all_reduce`` in a group of one do nothing; gloo would take the tensor to the host and back.
- On the CPU the current CUDA device is the CPU, and waiting for CUDA does nothing.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from mimogrid.shell.device.device import Device
from mimogrid.shell.device.streams import Posted


@attrs.frozen(eq=False)
class Sent:
    """A message on its way; gloo loses one whose tensor is gone."""

    work: Posted
    outgoing: Tensor

    def wait(self) -> None:
        """Return when it has been received."""
        self.work.wait()


@attrs.frozen(eq=False)
class Coming:
    """A message that is awaited in host memory, and the tensor of the device that it is for."""

    work: Posted
    buffer: Tensor
    tensor: Tensor

    def wait(self) -> None:
        """Return when it is there; what is computed from here on finds it in the tensor."""
        self.work.wait()
        self.tensor.detach().copy_(self.buffer, non_blocking=True)


@attrs.frozen
class Staged:
    """Torch's calls for messages between two ranks, whose tensors are on a device."""

    device: Device

    def isend(self, tensor: Tensor, dst: int, group: dist.ProcessGroup) -> Posted:
        """Post a message; its tensor can be changed at once."""
        streams = self.device.streams
        outgoing = streams.host_buffer(tuple(tensor.shape), tensor.dtype)
        outgoing.copy_(tensor.detach(), non_blocking=True)
        streams.synchronize()
        return Sent(_posted(dist.isend(outgoing, dst=dst, group=group)), outgoing)

    def irecv(self, tensor: Tensor, src: int, group: dist.ProcessGroup) -> Posted:
        """Post a receive."""
        buffer = self.device.streams.host_buffer(tuple(tensor.shape), tensor.dtype)
        return Coming(_posted(dist.irecv(buffer, src=src, group=group)), buffer, tensor)


@attrs.frozen
class Plain:
    """The same calls, of tensors in host memory."""

    def isend(self, tensor: Tensor, dst: int, group: dist.ProcessGroup) -> Posted:
        """Post a message."""
        return Sent(_posted(dist.isend(tensor, dst=dst, group=group)), tensor)

    def irecv(self, tensor: Tensor, src: int, group: dist.ProcessGroup) -> Posted:
        """Post a receive."""
        return _posted(dist.irecv(tensor, src=src, group=group))


def _posted(work: Posted | None) -> Posted:
    assert work is not None, "torch posts nothing where a rank is not in the group"
    return work


def _calls(posts: Staged | Plain) -> dict[str, Any]:
    """Return what Megatron calls, by its name in torch.distributed."""

    def send(tensor: Tensor, dst: int, group: dist.ProcessGroup) -> None:
        posts.isend(tensor, dst, group).wait()

    def recv(tensor: Tensor, src: int, group: dist.ProcessGroup) -> None:
        posts.irecv(tensor, src, group).wait()

    def operation(op: Any, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> SimpleNamespace:
        return SimpleNamespace(post=lambda: op(tensor, peer, group))

    def batch(operations: Sequence[SimpleNamespace]) -> list[Posted]:
        return [operation.post() for operation in operations]

    def among_several(collective: Any) -> Any:
        def call(tensor: Tensor, *, group: dist.ProcessGroup, **how: Any) -> None:
            if group.size() > 1:
                collective(tensor, group=group, **how)

        return call

    return {
        "isend": posts.isend,
        "irecv": posts.irecv,
        "send": send,
        "recv": recv,
        "P2POp": operation,
        "batch_isend_irecv": batch,
        "broadcast": among_several(dist.broadcast),
        "all_reduce": among_several(dist.all_reduce),
    }


@contextlib.contextmanager
def carried(device: Device) -> Iterator[None]:
    """Let Megatron's schedule talk over the transport of a device while open."""
    from megatron.core.pipeline_parallel import (  # noqa: PLC0415 -- older ones have not all of them
        bridge_communicator,
        p2p_communication,
        schedules,
    )
    from megatron.core.tensor_parallel import cross_entropy  # noqa: PLC0415

    calls = _calls(Staged(device) if device.stages_through_host else Plain())
    talking = _copy_of(dist, **calls)
    stand_in = _copy_of(torch, distributed=talking, **({} if device.is_asynchronous else _without_cuda()))
    with contextlib.ExitStack() as stack:
        for module in (bridge_communicator, cross_entropy, p2p_communication, schedules):
            stack.enter_context(patch.object(module, "torch", stand_in))
        for module in (bridge_communicator, p2p_communication):
            stack.enter_context(patch.object(module, "dist", talking))
        yield


def _without_cuda() -> dict[str, Any]:
    """Return what of torch is another on the CPU."""
    cpu = torch.device("cpu")
    cuda = _copy_of(torch.cuda, current_device=lambda: cpu, synchronize=lambda: None)
    return {"cuda": cuda, "zeros": lambda *size, device=None, **more: torch.zeros(*size, device=cpu, **more)}


def _copy_of(module: ModuleType, **names: Any) -> ModuleType:
    """Return a module with the same contents, but for some names."""
    copy = ModuleType(module.__name__, module.__doc__)
    copy.__dict__.update(vars(module) | names)
    return copy
