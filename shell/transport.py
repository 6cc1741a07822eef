"""Transport: posts the messages of a transfer, and waits for them.

Shapes come from the plan, so nothing but data crosses the network: no shape, no handshake. A handle and its
tensor are kept until the transfer is waited for (gloo loses the message of a handle that is dropped). A
message of a rank to itself stays in memory.
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


@attrs.frozen(eq=False)
class Pending:
    """A message on its way: the tensor read or filled, and the handle (None: it stays on this rank)."""

    message: Message
    tensor: torch.Tensor
    work: dist.Work | None


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
        link, pending = link_of(self._topology, transfer), []
        for message, tensor in payload:
            peer = _peer(message, leaves=True, direction=transfer.direction)
            if peer == self._groups.rank:
                self._home[link, transfer.direction, message] = tensor
                pending.append(Pending(message, tensor, None))
                continue
            outgoing = tensor.cpu() if self._device.stages_through_host else tensor
            work = dist.isend(
                outgoing.contiguous(),
                dst=self._groups.outside[peer],
                group=self._groups.channel(self._groups.rank, peer),
                tag=self._tag(transfer),
            )
            pending.append(Pending(message, outgoing, work))
        self._pending[transfer] = pending

    def receive(
        self, transfer: Recv, shapes: Iterable[tuple[Message, tuple[int, ...]]], dtype: torch.dtype
    ) -> None:
        """Post a receive of a known shape from each peer of the transfer; returns at once."""
        pending = []
        place = torch.device("cpu") if self._device.stages_through_host else self._device.torch
        for message, shape in shapes:
            peer = _peer(message, leaves=False, direction=transfer.direction)
            buffer = torch.empty(0 if peer == self._groups.rank else shape, dtype=dtype, device=place)
            work = None
            if peer != self._groups.rank:
                work = dist.irecv(
                    buffer,
                    src=self._groups.outside[peer],
                    group=self._groups.channel(peer, self._groups.rank),
                    tag=self._tag(transfer),
                )
            pending.append(Pending(message, buffer, work))
        self._pending[transfer] = pending

    def wait(self, transfer: Transfer) -> list[tuple[Message, torch.Tensor]]:
        """Block until a transfer is complete; return its messages with what they carried."""
        link, done = link_of(self._topology, transfer), []
        for pending in self._pending.pop(transfer):
            tensor = pending.tensor
            if pending.work is not None:
                pending.work.wait()
            elif isinstance(transfer, Recv):
                tensor = self._home.pop((link, transfer.direction, pending.message))
            done.append((pending.message, tensor.to(self._device.torch)))
        return done

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
