"""Transport: posts the messages of a transfer, and waits for them.

Shapes come from the plan, so nothing but data crosses the network: no shape, no handshake. A handle and its
tensor are kept until the transfer is waited for (gloo loses the message of a handle that is dropped). A
message of a rank to itself stays in memory.

What is sent was computed on one stream and leaves on a second; what is received arrives on a third and is computed
with on the first. Here stand the waits and the keeping of memory that this takes (see `streams`). With NCCL none of
them stops the host or the device. Through host memory two do: gloo reads a message when it is posted, so the host
waits until its copy is complete (for this copy, not for the device); and gloo says only to the host that a
message has come.
"""

from collections.abc import Iterable, Mapping

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.routes import Message
from mimogrid.core.schedule.actions import Direction, Recv, Send, Transfer
from mimogrid.core.schedule.lower import link_of
from mimogrid.core.topology import Link, Topology
from mimogrid.shell.device import Device
from mimogrid.shell.groups import Groups
from mimogrid.shell.streams import Posted, Stream


@attrs.frozen(eq=False)
class Pending:
    """A message on its way: the tensor read or filled, and the handle (None: it stays on this rank)."""

    message: Message
    tensor: torch.Tensor
    work: Posted | None


class Transport:
    """The messages of one rank that are on their way."""

    def __init__(self, topology: Topology, groups: Groups, device: Device) -> None:
        self._topology = topology
        self._groups = groups
        self._device = device
        self._pending: dict[Transfer, list[Pending]] = {}
        self._home: dict[tuple[Link, Direction, Message], torch.Tensor] = {}
        self._tags = _tags(topology)

    def send(self, transfer: Send, payload: Iterable[tuple[Message, torch.Tensor]]) -> None:
        """Post a message to each peer of the transfer; returns at once."""
        streams, link, pending = self._device.streams, link_of(self._topology, transfer), []
        messages = [(message, tensor.contiguous()) for message, tensor in payload]
        streams.follow(Stream.SEND, after=Stream.COMPUTE)
        for message, tensor in messages:
            peer = _peer(message, leaves=True, direction=transfer.direction)
            if peer == self._groups.rank:
                self._home[link, transfer.direction, message] = tensor
                pending.append(Pending(message, tensor, None))
                continue
            with streams.on(Stream.SEND):
                outgoing = self._loaded(tensor)
                work = dist.isend(
                    outgoing,
                    dst=self._groups.outside[peer],
                    group=self._groups.channel(self._groups.rank, peer),
                    tag=self._tag(transfer),
                )
                posted = streams.posted(work, outgoing, arrives=False)
            streams.keep(tensor, until=Stream.SEND)
            pending.append(Pending(message, outgoing, posted))
        self._pending[transfer] = pending

    def receive(
        self, transfer: Recv, shapes: Iterable[tuple[Message, tuple[int, ...]]], dtype: torch.dtype
    ) -> None:
        """Post a receive of a known shape from each peer of the transfer; returns at once."""
        streams, pending = self._device.streams, []
        for message, shape in shapes:
            peer = _peer(message, leaves=False, direction=transfer.direction)
            if peer == self._groups.rank:
                pending.append(Pending(message, torch.empty(0), None))
                continue
            with streams.on(Stream.RECEIVE):
                buffer = self._room(shape, dtype)
                work = dist.irecv(
                    buffer,
                    src=self._groups.outside[peer],
                    group=self._groups.channel(peer, self._groups.rank),
                    tag=self._tag(transfer),
                )
                posted = streams.posted(work, buffer, arrives=True)
            pending.append(Pending(message, buffer, posted))
        self._pending[transfer] = pending

    def wait(self, transfer: Transfer) -> list[tuple[Message, torch.Tensor]]:
        """Let what follows happen after a transfer; return its messages with what they carried.

        What follows is on the stream of the transfer, and after a receive also what is computed.
        """
        streams, link, pending = (
            self._device.streams,
            link_of(self._topology, transfer),
            self._pending.pop(transfer),
        )
        if isinstance(transfer, Send):
            for sent in pending:
                if sent.work is not None:
                    with streams.on(Stream.SEND):
                        sent.work.wait()
            return [(sent.message, sent.tensor) for sent in pending]
        done = []
        for awaited in pending:
            if awaited.work is None:
                tensor = self._home.pop((link, transfer.direction, awaited.message))
            else:
                with streams.on(Stream.RECEIVE):
                    awaited.work.wait()
                    tensor = self._unloaded(awaited.tensor)
                streams.keep(tensor, until=Stream.COMPUTE)
            done.append((awaited.message, tensor))
        streams.follow(Stream.COMPUTE, after=Stream.RECEIVE)
        return done

    # -- memory that messages leave from and arrive in -----------------------------------------------------

    def _loaded(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what is posted of a tensor: itself, or a complete copy in host memory."""
        if not self._device.stages_through_host:
            return tensor
        copy = self._device.streams.host_buffer(tuple(tensor.shape), tensor.dtype)
        copy.copy_(tensor, non_blocking=True)
        self._device.streams.hear(Stream.SEND)
        return copy

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory for a message to arrive in."""
        if not self._device.stages_through_host:
            return torch.empty(shape, dtype=dtype, device=self._device.torch)
        return self._device.streams.host_buffer(shape, dtype)

    def _unloaded(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return what has arrived, on the device."""
        if not self._device.stages_through_host:
            return buffer
        tensor = torch.empty(buffer.shape, dtype=buffer.dtype, device=self._device.torch)
        return tensor.copy_(buffer, non_blocking=True)

    def _tag(self, transfer: Transfer) -> int:
        return self._tags[link_of(self._topology, transfer), transfer.direction] + transfer.microbatch


def _peer(message: Message, *, leaves: bool, direction: Direction) -> int:
    forward = direction is Direction.FORWARD
    return message.rank_target if leaves == forward else message.rank_source


def _tags(topology: Topology) -> Mapping[tuple[Link, Direction], int]:
    """The first tag of each link and direction; microbatches count up from it."""
    room = max(module.microbatches for module in topology.modules.values())
    uses = [(link, direction) for link in topology.links for direction in Direction]
    return {use: i * room for i, use in enumerate(uses)}
