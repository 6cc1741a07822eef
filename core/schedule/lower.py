"""Lowering: from the order of compute actions to everything that a rank does.

Around each compute action stand the transfers that feed it and those that it feeds:

    language.0 RECV_F1 <- vision.0         the next receive is posted one compute action ahead
    language.0 WAIT_RECV_F0 <- vision.0    what this action reads must be there
    language.0 F0
    language.0 SEND_F0 -> language.1

Receives are posted in the order in which their data is made, which is the order in which any one peer sends:
NCCL matches by order and knows no tags. A send is waited for only where it must have ended: after the receive
of an answer that the peer could give only with the data in hand. So no wait relies on a transport that
buffers. Where no answer comes (nothing trains upstream), the wait stands where the order has let the peer
consume the data, and bounds the queue.

A lane without rows in a microbatch has no actions for it at all: absence is decided here, not by the executor.
"""

import functools
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.routes import Message, Routes, overlapping
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Kind,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Transfer,
    Update,
    Wait,
)
from mimogrid.core.schedule.orders import Order, order_of
from mimogrid.core.steps import Step
from mimogrid.core.topology import Link, Topology


@attrs.frozen(eq=False)
class Program:
    """Everything that every rank does in a step; `of` expands one rank when it is asked for."""

    order: Order
    routes: Routes

    @property
    def topology(self) -> Topology:
        """The topology that the program runs on."""
        return self.routes.step.topology

    def of(self, rank: int) -> tuple[Action, ...]:
        """Return the program of one rank; a rank in no grid has none."""
        if rank not in self.topology.ranks:
            return ()
        return (*_Lowering(self, rank).actions(), *self.finish(rank))

    def messages(self, transfer: Transfer) -> tuple[Message, ...]:
        """Return all messages that a transfer stands for, whichever rank posts them."""
        return self.routes.messages(link_of(self.topology, transfer), transfer.microbatch)

    def messages_of(self, rank: int, transfer: Transfer) -> tuple[Message, ...]:
        """Return the messages that a rank posts for a transfer, in order of rows."""
        link = link_of(self.topology, transfer)
        leaves = isinstance(transfer, Send) == (transfer.direction is Direction.FORWARD)
        side = self.routes.sent_by if leaves else self.routes.sent_to
        return side(rank, link, transfer.microbatch)

    def joint(self, rank: int, action: Action) -> tuple[int, ...]:
        """Return the ranks that an action starts together with; a lone rank for most."""
        modules = self.topology.modules
        match action:
            case Compute(stage=stage):
                module = modules[stage.module]
                lanes = module.closure(module.grid.position(rank)["dp"])
                return tuple(r for lane in lanes for r in module.holders(stage, lane))
            case Reduce(stage=stage):
                return modules[stage.module].grid.group_of(rank, modules[stage.module].summed_over)
            case Tie(stage=stage):
                pipeline = modules[stage.module].grid.group_of(rank, "pp")
                return (pipeline[0], pipeline[-1])
            case Norm():
                return self.topology.ranks
            case _:
                return (rank,)

    def finish(self, rank: int) -> Iterator[Action]:
        """Yield reductions, agreement and update, which end a program that trains."""
        if not self.order.training:
            return
        for info in self.topology.stages_of(rank):
            if info.trainable and len(self.joint(rank, Reduce(info.stage))) > 1:
                yield Reduce(info.stage)
        for info in self.topology.stages_of(rank):
            if (info.first or info.last) and not (info.first and info.last):
                if any(p.copy and p.name in info.trainable for p in info.parameters):
                    yield Tie(info.stage)
        yield Norm()
        yield Update()


@functools.lru_cache(maxsize=8)
def orders(topology: Topology) -> Mapping[bool, Order]:
    """Return the orders of a job by whether they train; they are the same in every step."""
    return {training: order_of(topology, training=training) for training in (True, False)}


def plan_step(step: Step, *, training: bool = True) -> Program:
    """Return the program of one step."""
    return Program(orders(step.topology)[training], Routes(step))


def link_of(topology: Topology, transfer: Transfer) -> Link:
    """Return the link that a transfer is on."""
    if isinstance(transfer, Send) == (transfer.direction is Direction.FORWARD):
        return topology.link_between[transfer.stage, transfer.peer]
    return topology.link_between[transfer.peer, transfer.stage]


@attrs.frozen(eq=False)
class _Lowering:
    """One rank's lowering: the compute actions it takes part in, and what surrounds each."""

    program: Program
    rank: int

    @functools.cached_property
    def computes(self) -> tuple[Compute, ...]:
        """What this rank computes, in order."""
        topology, step = self.program.topology, self.program.routes.step
        lanes = {
            info.stage: topology.modules[info.stage.module].grid.position(self.rank)["dp"]
            for info in topology.stages_of(self.rank)
        }
        return tuple(
            action
            for action in self.program.order.actions
            if action.stage in lanes and step.is_active(action.stage, lanes[action.stage], action.microbatch)
        )

    def actions(self) -> Iterator[Action]:
        """Yield the rank's actions up to the last wait."""
        posts, needs = self._receives()
        sends = [tuple(self._sends(action)) for action in self.computes]
        ends = self._ends(sends, needs)
        for i, action in enumerate(self.computes):
            yield from posts[i]
            yield from (Wait(recv) for recv in needs[i])
            yield from (Wait(send) for send in ends[i])
            yield action
            yield from sends[i]
        yield from (Wait(send) for send in ends[len(self.computes)])

    def _receives(self) -> tuple[list[list[Recv]], list[list[Recv]]]:
        """Return, per compute action, the receives to post before it and those to wait for."""
        needs: list[list[Recv]] = []
        seen: dict[Recv, int] = {}
        for i, action in enumerate(self.computes):
            fresh = [recv for recv in self._inputs(action) if recv not in seen]
            seen |= dict.fromkeys(fresh, i)
            needs.append(fresh)
        posts: list[list[Recv]] = [[] for _ in self.computes]
        slot = len(self.computes)
        for recv in sorted(seen, key=self._arrival, reverse=True):
            slot = min(slot, max(seen[recv] - 1, 0))
            posts[slot].insert(0, recv)
        return posts, needs

    def _arrival(self, recv: Recv) -> int:
        messages = self.program.messages_of(self.rank, recv)
        return max(self._made_at(recv, message) for message in messages)

    def _inputs(self, action: Compute) -> Iterator[Recv]:
        """Yield the receives that an action reads."""
        topology, routes = self.program.topology, self.program.routes
        stage, microbatch = action.stage, action.microbatch
        if action.kind is Kind.FORWARD:
            for link in topology.links_into(stage):
                if routes.sent_to(self.rank, link, microbatch):
                    yield Recv(stage, Direction.FORWARD, microbatch, link.source)
            return
        for link in topology.links_from(stage):
            for k in self._target_microbatches(link, microbatch):
                if link in self.program.order.gradients and routes.sent_by(self.rank, link, k):
                    yield Recv(stage, Direction.BACKWARD, k, link.target)

    def _sends(self, action: Compute) -> Iterator[Send]:
        """Yield the sends that an action completes."""
        topology, routes = self.program.topology, self.program.routes
        stage, microbatch = action.stage, action.microbatch
        if action.kind is Kind.FORWARD:
            for link in topology.links_from(stage):
                for k in self._target_microbatches(link, microbatch):
                    messages = routes.sent_by(self.rank, link, k)
                    if messages and max(m.made_by[-1] for m in messages) == microbatch:
                        yield Send(stage, Direction.FORWARD, k, link.target)
            return
        for link in topology.links_into(stage):
            if link in self.program.order.gradients:
                if routes.sent_to(self.rank, link, microbatch):
                    yield Send(stage, Direction.BACKWARD, microbatch, link.source)

    def _target_microbatches(self, link: Link, microbatch: int) -> range:
        modules = self.program.topology.modules
        source, target = modules[link.source.module], modules[link.target.module]
        return overlapping(microbatch, source.microbatches, target.microbatches)

    def _made_at(self, recv: Recv, message: Message) -> int:
        """Where in the global order the data of a message is made."""
        forward = recv.direction is Direction.FORWARD
        kind = Kind.FORWARD if forward else Kind.BACKWARD
        microbatch = message.made_by[-1] if forward else recv.microbatch
        return self.program.order.index[Compute(kind, recv.peer, microbatch)]

    def _read_at(self, send: Send, message: Message) -> int:
        """Where in the global order the peer first reads a message."""
        forward = send.direction is Direction.FORWARD
        kind = Kind.FORWARD if forward else Kind.BACKWARD
        microbatch = send.microbatch if forward else message.made_by[0]
        return self.program.order.index[Compute(kind, send.peer, microbatch)]

    def _ends(self, sends: list[tuple[Send, ...]], needs: list[list[Recv]]) -> list[list[Send]]:
        """Return, per compute action and for the end, the sends to wait for before it."""
        ends: list[list[Send]] = [[] for _ in range(len(self.computes) + 1)]
        for i, made in enumerate(sends):
            for send in made:
                ends[self._end(send, i, needs)].append(send)
        return ends

    def _end(self, send: Send, start: int, needs: list[list[Recv]]) -> int:
        """Return the compute action before which a send is waited for (their number: the end)."""
        messages = self.program.messages_of(self.rank, send)
        read_at = {self._peer(m): self._read_at(send, m) for m in messages}
        answered = link_of(self.program.topology, send) in self.program.order.gradients
        for i in range(start + 1, len(self.computes)):
            if not answered and self.program.order.index[self.computes[i]] > max(read_at.values()):
                return i
            for recv in needs[i]:
                for message in self.program.messages_of(self.rank, recv):
                    peer = self._peer(message)
                    if peer in read_at and self._made_at(recv, message) > read_at[peer]:
                        del read_at[peer]
            if not read_at:
                return i
        return len(self.computes)

    def _peer(self, message: Message) -> int:
        return message.rank_source if message.rank_target == self.rank else message.rank_target
