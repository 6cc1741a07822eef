"""Transport: posts the messages of a transfer, and waits for them.

Shapes come from the plan, so only data crosses the network: no shapes, no handshakes. A handle and its tensor are kept
until the transfer is waited for, because gloo loses the message of a handle that is dropped. A message of a rank to
itself stays in memory.

On a device that computes asynchronously a message is posted and waited for in the order of computing, as the program
has it (see `streams`). With NCCL that stops neither the host nor the device. Messages through host memory stop the
host: gloo reads a message when it is posted, so the copy must be complete, and only the host learns that a message has
come.
"""

import itertools
from collections.abc import Iterable, Mapping

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.program.lower import link_of
from mimogrid.core.schedule.actions import Direction, Recv, Send, Transfer
from mimogrid.core.step.routes import Message
from mimogrid.core.topology.topology import Link, Topology
from mimogrid.shell.device.device import Device
from mimogrid.shell.device.streams import Posted
from mimogrid.shell.world.groups import ProcessGroups


@attrs.frozen(eq=False)
class Pending:
    """A message that was posted: the tensor read or filled, and the handle; None where it stays on this rank."""

    message: Message
    tensor: torch.Tensor
    work: Posted | None


class Transport:
    """The messages of one rank that are posted and not yet waited for."""

    def __init__(self, topology: Topology, groups: ProcessGroups, device: Device) -> None:
        self._topology = topology
        self._groups = groups
        self._device = device
        self.streams = device.streams
        self._pending: dict[Transfer, list[Pending]] = {}
        self._local: dict[tuple[Link, Direction, Message], torch.Tensor] = {}
        self._tags = _tags(topology)

    def send(self, transfer: Send, payload: Iterable[tuple[Message, torch.Tensor]]) -> None:
        """Post a message to each peer of the transfer; returns at once."""
        link, pending = link_of(self._topology, transfer), []
        for message, tensor in payload:
            peer = _peer(message, leaves=True, direction=transfer.direction)
            if peer == self._groups.rank:
                self._local[link, transfer.direction, message] = tensor
                pending.append(Pending(message, tensor, None))
                continue
            outgoing = self._outgoing(tensor.contiguous())
            work = dist.isend(
                outgoing,
                dst=self._groups.outside[peer],
                group=self._groups.channel(self._groups.rank, peer),
                tag=self._tag(transfer),
            )
            posted = self.streams.posted(work, outgoing, arrives=False)
            pending.append(Pending(message, outgoing, posted))
        self._pending[transfer] = pending

    def receive(
        self, transfer: Recv, shapes: Iterable[tuple[Message, tuple[int, ...]]], dtype: torch.dtype
    ) -> None:
        """Post a receive of a known shape from each peer of the transfer; returns at once."""
        pending = []
        for message, shape in shapes:
            peer = _peer(message, leaves=False, direction=transfer.direction)
            if peer == self._groups.rank:
                pending.append(Pending(message, torch.empty(0), None))
                continue
            buffer = self._receive_buffer(shape, dtype)
            work = dist.irecv(
                buffer,
                src=self._groups.outside[peer],
                group=self._groups.channel(peer, self._groups.rank),
                tag=self._tag(transfer),
            )
            posted = self.streams.posted(work, buffer, arrives=True)
            pending.append(Pending(message, buffer, posted))
        self._pending[transfer] = pending

    def wait(self, transfer: Transfer) -> list[tuple[Message, torch.Tensor]]:
        """Let what follows happen after a transfer; return its messages with what they carried."""
        link, pending = link_of(self._topology, transfer), self._pending.pop(transfer)
        if isinstance(transfer, Send):
            for sent in pending:
                if sent.work is not None:
                    sent.work.wait()
            return [(sent.message, sent.tensor) for sent in pending]
        done = []
        for awaited in pending:
            if awaited.work is None:
                tensor = self._local.pop((link, transfer.direction, awaited.message))
            else:
                awaited.work.wait()
                tensor = self._arrived(awaited.tensor)
            done.append((awaited.message, tensor))
        return done

    # -- memory that messages leave from and arrive in -----------------------------------------------------

    def _outgoing(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what is posted for a tensor: the tensor, or a complete copy of it in host memory."""
        if not self._device.stages_through_host:
            return tensor
        copy = self.streams.host_buffer(tuple(tensor.shape), tensor.dtype)
        copy.copy_(tensor, non_blocking=True)
        self.streams.synchronize()
        return copy

    def _receive_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory for a message to arrive in."""
        if not self._device.stages_through_host:
            return torch.empty(shape, dtype=dtype, device=self._device.torch)
        return self.streams.host_buffer(shape, dtype)

    def _arrived(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return what has arrived, on the device."""
        if not self._device.stages_through_host:
            return buffer
        tensor = torch.empty(buffer.shape, dtype=buffer.dtype, device=self._device.torch)
        return tensor.copy_(buffer, non_blocking=True)

    def _tag(self, transfer: Transfer) -> int:
        link = link_of(self._topology, transfer)
        return self._tags[link, transfer.direction] + transfer.microbatch * len(self._tags)


def _peer(message: Message, *, leaves: bool, direction: Direction) -> int:
    forward = direction is Direction.FORWARD
    return message.rank_target if leaves == forward else message.rank_source


def _tags(topology: Topology) -> Mapping[tuple[Link, Direction], int]:
    """Return the tag of each link and direction in microbatch 0; those of later ones are as many apart as there are."""
    return {(link, d): i for i, (link, d) in enumerate(itertools.product(topology.links, Direction))}
