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

A dp rank without rows in a microbatch has no actions for it: absence is decided here, not by the executor.

The sums of a stage's gradients, bucket by bucket, are posted after the last turn of the whole order in which any of
its dp ranks adds to them, whether or not this dp rank has that turn: so all dp ranks post them at one place among
what else they do together. They go on while the rank computes for its other stages, and are waited for at the end.

What rows do not change (which transfers may stand at which action) is worked out once per job and stage; a
step adds the messages of the rank.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.base.samples import overlapping
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
    WaitReduce,
)
from mimogrid.core.schedule.orders import Order, order_of
from mimogrid.core.step.routes import Message, Routes
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Link, Stage, StageInfo, Topology
from mimogrid.core.update.buckets import buckets_of, shared_by


@attrs.frozen(eq=False)
class Program:
    """Everything that every rank does in a step; `of` expands one rank when it is asked for."""

    order: Order
    routes: Routes
    _sums: dict[int, tuple[Reduce, ...]] = attrs.field(
        factory=dict[int, tuple[Reduce, ...]], init=False, repr=False
    )

    @property
    def topology(self) -> Topology:
        """The topology that the program runs on."""
        return self.routes.step.topology

    def of(self, rank: int) -> tuple[Action, ...]:
        """Return the program of one rank; a rank in no grid has none."""
        if not self.topology.role(rank).stages:
            return ()
        return (*_Lowering(self, rank).actions(), *self.finish(rank))

    def messages(self, transfer: Transfer) -> tuple[Message, ...]:
        """Return all messages that a transfer stands for, whichever rank posts them."""
        return self.routes.messages(link_of(self.topology, transfer), transfer.microbatch)

    def messages_of(self, rank: int, transfer: Transfer) -> tuple[Message, ...]:
        """Return the messages that a rank posts for a transfer, in order of rows."""
        link = link_of(self.topology, transfer)
        side = self.routes.sent_by if transfer.at_source else self.routes.sent_to
        return side(rank, link, transfer.microbatch)

    def peers_of(self, rank: int, transfer: Transfer) -> tuple[int, ...]:
        """Return the ranks at the other ends of the messages that a rank posts for a transfer."""
        messages = self.messages_of(rank, transfer)
        return tuple(m.rank_target if transfer.at_source else m.rank_source for m in messages)

    def joint(self, rank: int, action: Action) -> tuple[int, ...]:
        """Return the ranks that an action starts together with; a lone rank for most."""
        modules = self.topology.modules
        match action:
            case Compute(stage=stage):
                module = modules[stage.module]
                dp_ranks = module.ep_dp_ranks(module.grid.position(rank)["dp"])
                return tuple(r for dp_rank in dp_ranks for r in module.tp_cp_ranks(stage, dp_rank))
            case Reduce(stage, bucket) | WaitReduce(stage, bucket):
                section = buckets_of(self.topology, self.topology.stages[stage], rank)[bucket].section
                return shared_by(modules[stage.module], rank, section)
            case Tie(stage=stage):
                pipeline = modules[stage.module].grid.group_of(rank, "pp")
                return (pipeline[0], pipeline[-1])
            case Norm():
                return self.topology.ranks
            case _:
                return (rank,)

    def sums(self, rank: int) -> tuple[Reduce, ...]:
        """Return the sums of gradients that a rank has a part in, in the order in which it posts them."""
        if rank not in self._sums:
            found = (
                Reduce(info.stage, bucket)
                for info in sorted(self._trained(rank), key=self.last_gradient)
                for bucket in range(len(buckets_of(self.topology, info, rank)))
            )
            self._sums[rank] = tuple(reduce for reduce in found if len(self.joint(rank, reduce)) > 1)
        return self._sums[rank]

    def _trained(self, rank: int) -> tuple[StageInfo, ...]:
        return self.topology.role(rank).stages if self.order.training else ()

    def last_gradient(self, info: StageInfo) -> int:
        """Return where in the global order the gradients of a stage are complete on all dp ranks."""
        return self.order.index[self.order.of(info.stage)[-1]]

    def finish(self, rank: int) -> Iterator[Action]:
        """Yield what ends a program that trains: all sums are there, and then agreement and update."""
        if not self.order.training:
            return
        yield from (WaitReduce(reduce.stage, reduce.bucket) for reduce in self.sums(rank))
        for info in self.topology.role(rank).stages:
            tied = any(p.copy and p.name in info.trainable for p in info.parameters)
            if tied and info.first != info.last:
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
    here, there = transfer.stage, transfer.peer
    return topology.link_between[(here, there) if transfer.at_source else (there, here)]


@attrs.frozen(eq=False)
class _Option:
    """A transfer that a rank has if the step has messages for it: all of it that no row changes.

    `leaves` says that the rank is at the link's source. `place` sorts the transfers of a step as their data
    is made, the same at both ends; `peer_starts` is when the peer computes each microbatch of its own.
    """

    transfer: Transfer
    wait: Wait
    link: Link
    leaves: bool
    answered: bool
    place: tuple[int, int, int]
    peer_starts: tuple[int, ...]

    def made_at(self, message: Message) -> int:
        """Where in the global order the data of a message that is received is made."""
        forward = self.transfer.direction is Direction.FORWARD
        return self.peer_starts[message.made_last if forward else self.transfer.microbatch]

    def read_at(self, message: Message) -> int:
        """Where in the global order the peer first reads a message that is sent."""
        forward = self.transfer.direction is Direction.FORWARD
        return self.peer_starts[self.transfer.microbatch if forward else message.made_first]


@attrs.frozen(eq=False)
class _Turn:
    """A compute action of a stage, its place in the global order, and what may be read and sent there."""

    action: Compute
    start: int
    receives: tuple[_Option, ...]
    sends: tuple[_Option, ...]


@functools.lru_cache(maxsize=512)
def _turns(topology: Topology, order: Order, stage: Stage) -> tuple[_Turn, ...]:
    """Return the turns of a stage: they are the same in every step, and for all of its ranks."""
    return tuple(_Script(topology, order, stage).turns())


@attrs.frozen(eq=False)
class _Script:
    """What the ranks of a stage may have to do, from the order alone."""

    topology: Topology
    order: Order
    stage: Stage
    _options: dict[Transfer, _Option] = attrs.field(factory=dict[Transfer, _Option], init=False)

    def turns(self) -> Iterator[_Turn]:
        """Yield the stage's turns."""
        for action in self.order.of(self.stage):
            receives = tuple(self._option(transfer, link) for transfer, link in self._reads(action))
            sends = tuple(self._option(transfer, link) for transfer, link in self._makes(action))
            yield _Turn(action, self.order.index[action], receives, sends)

    def _reads(self, action: Compute) -> Iterator[tuple[Recv, Link]]:
        """Yield the receives that an action may read, with their links."""
        k = action.microbatch
        if action.kind is Kind.FORWARD:
            for link in self.topology.links_into(self.stage):
                yield Recv(self.stage, Direction.FORWARD, k, link.source), link
        elif action.kind is not Kind.WEIGHT_GRADIENT:
            for link, target_k in self._outgoing(k):
                if link in self.order.gradients:
                    yield Recv(self.stage, Direction.BACKWARD, target_k, link.target), link

    def _makes(self, action: Compute) -> Iterator[tuple[Send, Link]]:
        """Yield the sends that an action may complete, with their links."""
        k = action.microbatch
        if action.kind is Kind.FORWARD:
            for link, target_k in self._outgoing(k):
                yield Send(self.stage, Direction.FORWARD, target_k, link.target), link
        elif action.kind is not Kind.WEIGHT_GRADIENT:
            for link in self.topology.links_into(self.stage):
                if link in self.order.gradients:
                    yield Send(self.stage, Direction.BACKWARD, k, link.source), link

    def _outgoing(self, microbatch: int) -> Iterator[tuple[Link, int]]:
        """The links that an output leaves on, with the microbatches of their targets that it is part of."""
        modules = self.topology.modules
        for link in self.topology.links_from(self.stage):
            source, target = modules[link.source.module], modules[link.target.module]
            for k in overlapping(microbatch, source.microbatches, target.microbatches):
                yield link, k

    def _option(self, transfer: Transfer, link: Link) -> _Option:
        if transfer not in self._options:
            modules, starts = self.topology.modules, self.order.starts
            source, target = modules[link.source.module], modules[link.target.module]
            direction, k = transfer.direction, transfer.microbatch
            if direction is Direction.FORWARD:
                last = overlapping(k, target.microbatches, source.microbatches)[-1]
                made_at = starts[link.source, direction][last]
            else:
                made_at = starts[link.target, direction][k]
            self._options[transfer] = _Option(
                transfer,
                Wait(transfer),
                link,
                leaves=self.stage == link.source,
                answered=link in self.order.gradients,
                place=(made_at, self.topology.links.index(link), k),
                peer_starts=starts[transfer.peer, direction],
            )
        return self._options[transfer]


@attrs.frozen(eq=False)
class _Mail:
    """A transfer of one rank: the turn that reads it or makes it, and its messages."""

    option: _Option
    turn: int
    messages: tuple[Message, ...]

    def peers(self) -> Iterator[tuple[int, Message]]:
        """Yield each message with the rank at its other end."""
        for message in self.messages:
            yield message.rank_target if self.option.leaves else message.rank_source, message


@attrs.frozen(eq=False)
class _Lowering:
    """One rank's lowering: the turns that it takes part in, and what surrounds each."""

    program: Program
    rank: int

    def actions(self) -> Iterator[Action]:
        """Yield the rank's actions up to the last wait."""
        turns = self._own_turns()
        received, sent = list(self._received(turns)), self._sent(turns)
        posts, reads = _posts(received, len(turns)), _by_turn(received, len(turns))
        sends = _by_turn(sent, len(turns))
        starts = [turn.start for turn, _ in turns]
        ends, sums = _ends(starts, received, sent), self._sums(starts)
        for i, (turn, _) in enumerate(turns):
            yield from sums[i]
            for mail in posts[i]:
                yield mail.option.transfer
            for mail in (*reads[i], *ends[i]):
                yield mail.option.wait
            yield turn.action
            for mail in sends[i]:
                yield mail.option.transfer
        yield from sums[-1]
        for mail in ends[-1]:
            yield mail.option.wait

    def _sums(self, starts: list[int]) -> list[list[Reduce]]:
        """Return, per turn and for the end, the sums to post before it."""
        program = self.program
        sums: list[list[Reduce]] = [[] for _ in range(len(starts) + 1)]
        for reduce in program.sums(self.rank):
            complete = program.last_gradient(program.topology.stages[reduce.stage])
            sums[bisect.bisect_right(starts, complete)].append(reduce)
        return sums

    def _own_turns(self) -> list[tuple[_Turn, int]]:
        """Return this rank's turns, each with the dp rank that it has there."""
        topology, step = self.program.topology, self.program.routes.step
        turns: list[tuple[_Turn, int]] = []
        for info in topology.role(self.rank).stages:
            dp_rank = topology.modules[info.stage.module].dp_rank_of(self.rank)
            active = step.active(info.stage.module, dp_rank)
            own = _turns(topology, self.program.order, info.stage)
            turns += [(turn, dp_rank) for turn in own if turn.action.microbatch in active]
        return sorted(turns, key=lambda each: each[0].start)

    def _received(self, turns: list[tuple[_Turn, int]]) -> Iterator[_Mail]:
        """Yield what this rank receives, at the first turn that reads it."""
        seen: set[_Option] = set()
        for i, (turn, dp_rank) in enumerate(turns):
            for option in turn.receives:
                if option not in seen:
                    seen.add(option)
                    messages = self._messages(option, dp_rank)
                    if messages:
                        yield _Mail(option, i, messages)

    def _sent(self, turns: list[tuple[_Turn, int]]) -> list[_Mail]:
        """Return what this rank sends, sorted by `place`: the peers receive it in the same order.

        Each stands at the turn that makes the last of it. It stands later only where something with an
        earlier place is made later here, because this rank's part of the one is made before the parts of
        others.
        """
        made: list[_Mail] = []
        for i, (turn, dp_rank) in enumerate(turns):
            for option in turn.sends:
                messages = self._messages(option, dp_rank)
                if messages and (not option.leaves or _last_made(messages) == turn.action.microbatch):
                    made.append(_Mail(option, i, messages))
        made.sort(key=lambda mail: mail.option.place)
        turn_of = itertools.accumulate((mail.turn for mail in made), max)
        return [_Mail(mail.option, turn, mail.messages) for mail, turn in zip(made, turn_of, strict=True)]

    def _messages(self, option: _Option, dp_rank: int) -> tuple[Message, ...]:
        routes = self.program.routes
        side = routes.leaving if option.leaves else routes.reaching
        return side(option.link, option.transfer.microbatch, dp_rank).get(self.rank, ())


def _last_made(messages: tuple[Message, ...]) -> int:
    return max(message.made_last for message in messages)


def _by_turn(mails: list[_Mail], turns: int) -> list[list[_Mail]]:
    groups: list[list[_Mail]] = [[] for _ in range(turns)]
    for mail in mails:
        groups[mail.turn].append(mail)
    return groups


def _posts(received: list[_Mail], turns: int) -> list[list[_Mail]]:
    """Return, per turn, the receives to post before it: by `place`, and one turn before they are read."""
    posts: list[list[_Mail]] = [[] for _ in range(turns)]
    slot = turns
    for mail in sorted(received, key=lambda mail: mail.option.place, reverse=True):
        slot = min(slot, max(mail.turn - 1, 0))
        posts[slot].append(mail)
    for post in posts:
        post.reverse()
    return posts


def _ends(starts: list[int], received: list[_Mail], sent: list[_Mail]) -> list[list[_Mail]]:
    """Return, per turn and for the end, the sends to wait for before it."""
    answers: dict[int, list[tuple[int, int]]] = {}
    for mail in received:
        for peer, message in mail.peers():
            answers.setdefault(peer, []).append((mail.turn, mail.option.made_at(message)))
    ends: list[list[_Mail]] = [[] for _ in range(len(starts) + 1)]
    for mail in sent:
        ends[_end(mail, starts, answers)].append(mail)
    return ends


def _end(mail: _Mail, starts: list[int], answers: Mapping[int, list[tuple[int, int]]]) -> int:
    """Return the turn before which a send is waited for (their number: the end).

    By then every peer has answered with what it could make only with the message in hand, or, where no answer
    is due, the order has let the peer read the message.
    """
    end = 0
    for peer, message in mail.peers():
        read_at = mail.option.read_at(message)
        given = answers.get(peer, [])
        first = bisect.bisect_left(given, (mail.turn + 1,))
        later = itertools.islice(given, first, None)
        through = next((turn for turn, made_at in later if made_at > read_at), len(starts))
        if not mail.option.answered:
            through = min(through, max(bisect.bisect_right(starts, read_at), mail.turn + 1))
        end = max(end, through)
    return end
