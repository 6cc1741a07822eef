"""Lowering: from the order of compute actions to everything that a rank does.

Around each compute action stand the transfers that bring its inputs and take its outputs:

    language.0 RECV_F1 <- vision.0         the next receive is posted one compute action ahead
    language.0 WAIT_RECV_F0 <- vision.0    the inputs of this action must be there
    language.0 F0
    language.0 SEND_F0 -> language.1

Receives are posted in the order in which their data is made. Every peer sends in that order, and NCCL matches by
order, without tags.

A send is waited for where it must have ended: after a receive whose data the peer could make only with the message in
hand. So no wait relies on a transport that buffers. If nothing comes back (nothing upstream trains), the wait stands
where the order has let the peer read the message. That bounds the queue of sends.

A dp rank without rows in a microbatch has no actions for it. Absence is decided here, not by the executor.

The gradients of a stage are summed bucket by bucket. The sums are posted after the last action in the global order in
which any of the stage's dp ranks adds to its gradients. All dp ranks use that place, even if they skip that action, so
they post the sums at one place among their joint actions. They are waited for at the end of the step, so they overlap
with the computing of other stages. A dp rank that runs a last backward which is cut (`schedule.cuts`) posts the sums of
the buckets that a part completes right behind the part.

If dp ranks share the update, each has updated its shard of the weights in the step before. All buckets are gathered
beside the first forwards: the gathers are posted before anything else, those of the stage that computes first and of
its first layers first, and a stage waits for its own before its first action. A rank that computes nothing for a stage
waits at the end.

Which transfers may stand at which action depends on the order (`Order.slots`); a step adds the messages of the rank.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Gather,
    Norm,
    Reduce,
    Tie,
    Transfer,
    Update,
    WaitGather,
    WaitReduce,
)
from mimogrid.core.schedule.order import Order, PossibleTransfer, Slot
from mimogrid.core.step.routes import Message, Routes
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Link, Module, Stage, StageInfo, Topology
from mimogrid.core.update.buckets import Section, buckets_of, shared_by, sharing_ranks


_GroupOf = Callable[[Module, int, Section], tuple[int, ...]]
"""Returns the ranks that share a section of a module with a rank."""


@attrs.frozen(eq=False)
class Program:
    """Everything that every rank does in a step. `of` lowers one rank at a time, when asked."""

    order: Order
    routes: Routes
    _sums: dict[int, tuple[Reduce, ...]] = attrs.field(
        factory=dict[int, tuple[Reduce, ...]], init=False, repr=False
    )
    _gathers: dict[int, tuple[Gather, ...]] = attrs.field(
        factory=dict[int, tuple[Gather, ...]], init=False, repr=False
    )

    _shared: dict[tuple[int, Stage, _GroupOf], tuple[tuple[int, ...], ...]] = attrs.field(
        factory=dict[tuple[int, Stage, _GroupOf], tuple[tuple[int, ...], ...]], init=False, repr=False
    )

    @property
    def topology(self) -> Topology:
        """The topology that the program runs on."""
        return self.routes.step.topology

    def of(self, rank: int) -> tuple[Action, ...]:
        """Return the actions of a rank; none if it is in no grid."""
        if not self.topology.role(rank).stages:
            return ()
        return (*_RankLowering(self, rank).actions(), *self.finish(rank))

    def messages(self, transfer: Transfer) -> tuple[Message, ...]:
        """Return the messages of a transfer, those of all ranks."""
        return self.routes.messages(link_of(self.topology, transfer), transfer.microbatch)

    def messages_of(self, rank: int, transfer: Transfer) -> tuple[Message, ...]:
        """Return the messages of a transfer that a rank posts, in order of rows."""
        link = link_of(self.topology, transfer)
        side = self.routes.sent_by if transfer.at_source else self.routes.sent_to
        return side(rank, link, transfer.microbatch)

    def peers_of(self, rank: int, transfer: Transfer) -> tuple[int, ...]:
        """Return the ranks at the other ends of the messages that a rank posts for a transfer, in the same order."""
        messages = self.messages_of(rank, transfer)
        return tuple(m.rank_target if transfer.at_source else m.rank_source for m in messages)

    def joint(self, rank: int, action: Action) -> tuple[int, ...]:
        """Return the ranks that run an action together; most actions have `rank` only."""
        modules = self.topology.modules
        match action:
            case Compute(stage=stage):
                module = modules[stage.module]
                dp_ranks = module.ep_dp_ranks(module.grid.position(rank)["dp"])
                return tuple(r for dp_rank in dp_ranks for r in module.tp_cp_ranks(stage, dp_rank))
            case Reduce(stage, bucket) | WaitReduce(stage, bucket):
                return self._by_bucket(rank, stage, shared_by)[bucket]
            case Gather(stage, bucket) | WaitGather(stage, bucket):
                return self._by_bucket(rank, stage, sharing_ranks)[bucket]
            case Tie(stage=stage):
                pipeline = modules[stage.module].grid.group_of(rank, "pp")
                return (pipeline[0], pipeline[-1])
            case Norm():
                return self.topology.ranks
            case _:
                return (rank,)

    def _by_bucket(self, rank: int, stage: Stage, group_of: _GroupOf) -> tuple[tuple[int, ...], ...]:
        """Return the ranks that share each bucket of a stage with a rank."""
        key = rank, stage, group_of
        if key not in self._shared:
            module, buckets = (
                self.topology.modules[stage.module],
                buckets_of(self.topology, self.topology.stages[stage], rank),
            )
            groups = {
                section: group_of(module, rank, section) for section in {each.section for each in buckets}
            }
            self._shared[key] = tuple(groups[each.section] for each in buckets)
        return self._shared[key]

    def sums(self, rank: int) -> tuple[Reduce, ...]:
        """Return the sums of gradients of a rank, in the order in which it posts them."""
        if rank not in self._sums:
            self._sums[rank] = tuple(
                Reduce(info.stage, bucket)
                for info in sorted(self._trained(rank), key=self.last_gradient)
                for bucket in self._with_others(info, rank, shared_by)
            )
        return self._sums[rank]

    def gathers(self, rank: int) -> tuple[Gather, ...]:
        """Return the all-gathers of weights of a rank, in the order in which it posts them."""
        if rank not in self._gathers:
            shares = self.topology.spec.optimizer.sharded
            self._gathers[rank] = tuple(
                Gather(info.stage, bucket)
                for info in sorted(self._trained(rank) if shares else (), key=self._first_action)
                for bucket in reversed(self._with_others(info, rank, sharing_ranks))
            )
        return self._gathers[rank]

    def sums_after(self, rank: int, part: Compute) -> tuple[Reduce, ...]:
        """Return the sums that a rank posts for a stage after a part of its last action (`Order.parts`)."""
        if not self.order.training:
            return ()
        shared = self._by_bucket(rank, part.stage, shared_by)
        complete = self.order.completed(part, len(shared))
        return tuple(Reduce(part.stage, bucket) for bucket in complete if len(shared[bucket]) > 1)

    def _with_others(self, info: StageInfo, rank: int, group_of: _GroupOf) -> list[int]:
        """Return the buckets of a stage that a rank does not have for itself."""
        shared = self._by_bucket(rank, info.stage, group_of)
        return [bucket for bucket, ranks in enumerate(shared) if len(ranks) > 1]

    def collectives(self, rank: int) -> tuple[Gather | Reduce, ...]:
        """Return all that a rank posts for buckets: first what it gathers, then what it sums."""
        return (*self.gathers(rank), *self.sums(rank))

    def _first_action(self, info: StageInfo) -> int:
        return self.order.index[self.order.of(info.stage)[0]]

    def _trained(self, rank: int) -> tuple[StageInfo, ...]:
        return self.topology.role(rank).stages if self.order.training else ()

    def last_gradient(self, info: StageInfo) -> int:
        """Return the index of the action that completes the gradients of a stage on all dp ranks."""
        return self.order.index[self.order.of(info.stage)[-1]]

    def ties(self, rank: int) -> Iterator[Stage]:
        """Yield the stages of a rank that have one of two copies of embeddings, whose gradients are summed."""
        for info in self.topology.role(rank).stages if self.order.training else ():
            tied = any(p.copy and p.name in info.trainable for p in info.parameters)
            if tied and info.first != info.last:
                yield info.stage

    def finish(self, rank: int) -> Iterator[Action]:
        """Yield the end of a rank's training step: waits for sums, embedding all-reduces, norm, update."""
        if not self.order.training:
            return
        yield from (WaitReduce(reduce.stage, reduce.bucket) for reduce in self.sums(rank))
        yield from map(Tie, self.ties(rank))
        yield Norm()
        yield Update()


def plan_step(step: Step, order: Order) -> Program:
    """Return the program of one step in an order of its job."""
    return Program(order, Routes(step))


def link_of(topology: Topology, transfer: Transfer) -> Link:
    """Return the link that a transfer is on."""
    here, there = transfer.stage, transfer.peer
    return topology.link_between[(here, there) if transfer.at_source else (there, here)]


@attrs.frozen(eq=False)
class _P2POp:
    """A transfer of one rank: its messages, and the turn that first reads it or completes its data."""

    possible: PossibleTransfer
    turn: int
    messages: tuple[Message, ...]

    def peers(self) -> Iterator[tuple[int, Message]]:
        """Yield each message with the rank at its other end."""
        for message in self.messages:
            yield message.rank_target if self.possible.at_source else message.rank_source, message

    def made_at(self, message: Message) -> int:
        """Return where in the order the peer makes the data of a message that is received."""
        forward = self.possible.transfer.direction is Direction.FORWARD
        return self.possible.peer_starts[message.made_last if forward else self.possible.transfer.microbatch]

    def read_at(self, message: Message) -> int:
        """Return where in the order the peer first reads a message that is sent."""
        forward = self.possible.transfer.direction is Direction.FORWARD
        return self.possible.peer_starts[self.possible.transfer.microbatch if forward else message.made_first]


@attrs.frozen
class _Turn:
    """A slot of the order that a rank takes part in, and the rank's dp rank there."""

    slot: Slot
    dp_rank: int


@attrs.frozen(eq=False)
class _RankLowering:
    """The lowering of one rank: its turns, and what surrounds each of them."""

    program: Program
    rank: int

    def actions(self) -> Iterator[Action]:
        """Yield the rank's actions up to the last wait for a send."""
        turns = self._turns()
        received, sent = list(self._received(turns)), self._sent(turns)
        posts, reads = _posts(received, len(turns)), _by_turn(received, len(turns))
        sends = _by_turn(sent, len(turns))
        starts = [turn.slot.start for turn in turns]
        upper = [self._upper_parts(turn) for turn in turns]
        send_waits, reduces = _send_waits(starts, received, sent), self._reduces(starts, upper)
        gathers = self.program.gathers(self.rank)
        gathered = _waits_by_stage(gathers)
        yield from gathers
        for i, turn in enumerate(turns):
            yield from reduces[i]
            yield from (op.possible.transfer for op in posts[i])
            yield from (op.possible.wait for op in (*reads[i], *send_waits[i]))
            yield from gathered.pop(turn.slot.action.stage, ())
            for part, complete in upper[i]:
                yield part
                yield from complete
            yield turn.slot.action
            yield from (op.possible.transfer for op in sends[i])
        yield from reduces[-1]
        yield from (op.possible.wait for op in send_waits[-1])
        yield from itertools.chain.from_iterable(gathered.values())

    def _turns(self) -> list[_Turn]:
        """Return the turns of the rank, over all of its stages."""
        topology, step = self.program.topology, self.program.routes.step
        turns: list[_Turn] = []
        for info in topology.role(self.rank).stages:
            dp_rank = topology.modules[info.stage.module].dp_rank_of(self.rank)
            active = step.active(info.stage.module, dp_rank)
            slots = self.program.order.slots(info.stage)
            turns += [_Turn(slot, dp_rank) for slot in slots if slot.action.microbatch in active]
        return sorted(turns, key=lambda turn: turn.slot.start)

    def _upper_parts(self, turn: _Turn) -> list[tuple[Compute, tuple[Reduce, ...]]]:
        """Return the parts of a turn's action but the last one, each with the sums to post after it."""
        *upper, _ = self.program.order.parts(turn.slot.action)
        return [(part, self.program.sums_after(self.rank, part)) for part in upper]

    def _reduces(
        self, starts: list[int], upper: list[list[tuple[Compute, tuple[Reduce, ...]]]]
    ) -> list[list[Reduce]]:
        """Return, for each turn and for the end, the sums of gradients to post before it, but those after parts."""
        program = self.program
        early = {reduce for parts in upper for _, complete in parts for reduce in complete}
        reduces: list[list[Reduce]] = [[] for _ in range(len(starts) + 1)]
        for reduce in program.sums(self.rank):
            if reduce not in early:
                complete = program.last_gradient(program.topology.stages[reduce.stage])
                reduces[bisect.bisect_right(starts, complete)].append(reduce)
        return reduces

    def _received(self, turns: list[_Turn]) -> Iterator[_P2POp]:
        """Yield the receives of the rank, at the first turn that reads each."""
        seen: set[PossibleTransfer] = set()
        for i, turn in enumerate(turns):
            for possible in turn.slot.receives:
                if possible not in seen:
                    seen.add(possible)
                    messages = self._messages(possible, turn.dp_rank)
                    if messages:
                        yield _P2POp(possible, i, messages)

    def _sent(self, turns: list[_Turn]) -> list[_P2POp]:
        """Return the sends of the rank by `place`, which is the order in which the peers receive them.

        Each stands at the turn that completes its data. It stands later only if a send with an earlier place is
        completed later on this rank, because the rank's part of its own data is made before the parts of others.
        """
        made: list[_P2POp] = []
        for i, turn in enumerate(turns):
            for possible in turn.slot.sends:
                messages = self._messages(possible, turn.dp_rank)
                if messages and (
                    not possible.at_source or _last_made(messages) == turn.slot.action.microbatch
                ):
                    made.append(_P2POp(possible, i, messages))
        made.sort(key=lambda op: op.possible.place)
        latest = itertools.accumulate((op.turn for op in made), max)
        return [_P2POp(op.possible, turn, op.messages) for op, turn in zip(made, latest, strict=True)]

    def _messages(self, possible: PossibleTransfer, dp_rank: int) -> tuple[Message, ...]:
        routes = self.program.routes
        side = routes.leaving if possible.at_source else routes.reaching
        return side(possible.link, possible.transfer.microbatch, dp_rank).get(self.rank, ())


def _waits_by_stage(gathers: Iterable[Gather]) -> dict[Stage, list[WaitGather]]:
    waits: dict[Stage, list[WaitGather]] = {}
    for gather in gathers:
        waits.setdefault(gather.stage, []).append(WaitGather(gather.stage, gather.bucket))
    return waits


def _last_made(messages: tuple[Message, ...]) -> int:
    return max(message.made_last for message in messages)


def _by_turn(ops: list[_P2POp], turns: int) -> list[list[_P2POp]]:
    groups: list[list[_P2POp]] = [[] for _ in range(turns)]
    for op in ops:
        groups[op.turn].append(op)
    return groups


def _posts(received: list[_P2POp], turns: int) -> list[list[_P2POp]]:
    """Return, for each turn, the receives to post before it: by `place`, and one turn before they are read."""
    posts: list[list[_P2POp]] = [[] for _ in range(turns)]
    latest = turns
    for op in sorted(received, key=lambda op: op.possible.place, reverse=True):
        latest = min(latest, max(op.turn - 1, 0))
        posts[latest].append(op)
    for post in posts:
        post.reverse()
    return posts


def _send_waits(starts: list[int], received: list[_P2POp], sent: list[_P2POp]) -> list[list[_P2POp]]:
    """Return, for each turn and for the end, the sends to wait for before it."""
    replies: dict[int, list[tuple[int, int]]] = {}
    for op in received:
        for peer, message in op.peers():
            replies.setdefault(peer, []).append((op.turn, op.made_at(message)))
    waits: list[list[_P2POp]] = [[] for _ in range(len(starts) + 1)]
    for op in sent:
        waits[_wait_turn(op, starts, replies)].append(op)
    return waits


def _wait_turn(op: _P2POp, starts: list[int], replies: Mapping[int, list[tuple[int, int]]]) -> int:
    """Return the turn before which a send is waited for; the number of turns stands for the end.

    `replies` has, for each peer, the turns at which something is received from it, and where in the order the peer
    made that. Before the returned turn every peer has sent something that it made after reading the message. If no
    reply is due, the order has let the peer read the message by then.
    """
    end = 0
    for peer, message in op.peers():
        read_at = op.read_at(message)
        from_peer = replies.get(peer, [])
        first = bisect.bisect_left(from_peer, (op.turn + 1,))
        later = itertools.islice(from_peer, first, None)
        read = next((turn for turn, made_at in later if made_at > read_at), len(starts))
        if not op.possible.has_reply:
            read = min(read, max(bisect.bisect_right(starts, read_at), op.turn + 1))
        end = max(end, read)
    return end
