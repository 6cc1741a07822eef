"""Rehearsal: a listing carried out without tensors, as a second opinion to `verify`.

What a stage would compute is a hash of all that it would be computed from, so two listings give the same result
only if every number in them comes of the same work on the same data. Nothing here is shared with `replay`:

- ranks take turns as a seed has it, and each does its next action or stays before it;
- a channel of a pair of ranks gives the n-th receive the n-th send, whatever they are; neither is complete
  without the other, nor are the two ends of what a rank sends to itself. With `serial`, both directions of a
  pair are one queue, in which the n-th operations of the two ranks meet;
- a collective gives its n-th call on one rank the n-th call of each other member, whatever they are;
- what is not there cannot be read, and what nobody takes is left over; both are failures, as is a stage that
  holds more than `room` allows.
"""

import collections
import hashlib
import random
from collections.abc import Hashable, Iterator, Mapping

from mimogrid.core.base.samples import overlapping
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Gather,
    Kind,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Transfer,
    Update,
    Wait,
    WaitGather,
    WaitReduce,
    matching_op,
)
from mimogrid.core.step.routes import Message
from mimogrid.core.topology.topology import Link, Stage


Number = int
MODULUS = 2**61 - 1


class RehearsalError(Exception):
    """What would hang, crash or mix up data."""


def rehearse(
    program: Program,
    listing: Listing,
    *,
    seed: int = 0,
    serial: bool = False,
    room: Mapping[Stage, int] | None = None,
) -> Mapping[Hashable, Number]:
    """Return the weights of each stage on each rank after the step, and the answers of those that no one reads.

    Raises RehearsalError where the listing does not get there.
    """
    world = _World(program, listing, serial=serial, room=room)
    dice = random.Random(seed)
    while any(rank.actions for rank in world.ranks.values()):
        turn = [rank for rank in world.ranks.values() if rank.actions]
        dice.shuffle(turn)
        moved = [_moves(rank, dice.randint(1, 9)) for rank in turn]
        if not any(moved):
            raise RehearsalError("stuck before " + "; ".join(f"{r.number}: {r.actions[0]}" for r in turn))
    world.nothing_is_left()
    return {key: value for rank in world.ranks.values() for key, value in rank.results()}


def _moves(rank: "_Rank", most: int) -> bool:
    """Let a rank do up to so many actions; return whether it did any."""
    moved = False
    for _ in range(most):
        if not rank.actions or not rank.do(rank.actions[0]):
            return moved
        rank.actions.popleft()
        moved = True
    return moved


def of(*parts: object) -> Number:
    """Return a number that is another one for other parts."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


class _Post:
    """One end of a message, put into a channel; whole once it has met its other end."""

    def __init__(self, *, sends: bool, value: Number = 0) -> None:
        self.sends, self.value, self.whole = sends, value, False


class _World:
    """What ranks share: channels and collectives."""

    def __init__(
        self, program: Program, listing: Listing, *, serial: bool, room: Mapping[Stage, int] | None
    ) -> None:
        self.program, self.serial, self.room = program, serial, room
        self.ends: dict[Hashable, collections.deque[_Post]] = collections.defaultdict(collections.deque)
        self.met: dict[tuple[tuple[int, ...], int], dict[int, tuple[str, Number]]] = {}
        self.ranks = {number: _Rank(self, number, actions) for number, actions in listing.items()}

    def put(self, here: int, there: int, post: _Post) -> None:
        """Put one end of a message into its channel, and join what meets."""
        way = None if self.serial else post.sends
        mine, theirs = self.ends[here, there, way], self.ends[there, here, way if way is None else not way]
        mine.append(post)
        while mine and theirs and mine[0].sends != theirs[0].sends:
            one, other = mine.popleft(), theirs.popleft()
            one.whole = other.whole = True
            one.value = other.value = (one if one.sends else other).value

    def post(
        self, rank: "_Rank", members: tuple[int, ...], what: str, value: Number
    ) -> tuple[tuple[int, ...], int]:
        """Hand in a value for a call of a group, without waiting; return the call."""
        if len(members) == 1:
            raise RehearsalError(f"'{what}' is a sum over one rank")
        call = (members, rank.calls[members])
        rank.calls[members] += 1
        self.met.setdefault(call, {})[rank.number] = what, value
        return call

    def handed(self, call: tuple[tuple[int, ...], int]) -> list[Number] | None:
        """Return what all members have handed in for a call, once they have."""
        handed, members = self.met[call], call[0]
        if len(handed) < len(members):
            return None
        if len({word for word, _ in handed.values()}) > 1:
            raise RehearsalError(f"ranks {members} meet in different calls: {sorted(handed.items())}")
        return [handed[member][1] for member in members]

    def gather(
        self, rank: "_Rank", members: tuple[int, ...], what: str, value: Number
    ) -> list[Number] | None:
        """Hand in a value; return those of all members once the last of them has come."""
        if len(members) == 1:
            return [value]
        place = (members, rank.calls[members])
        self.met.setdefault(place, {})[rank.number] = what, value
        handed = self.handed(place)
        rank.calls[members] += handed is not None
        return handed

    def nothing_is_left(self) -> None:
        """Raise where someone waits for a message or for a call that nobody makes."""
        if any(self.ends.values()):
            raise RehearsalError("messages are left over")
        if any(len(handed) < len(members) for (members, _), handed in self.met.items()):
            raise RehearsalError("calls are left over")


class _Rank:
    """One rank: what it has still to do, and what it holds."""

    def __init__(self, world: _World, number: int, actions: tuple[Action, ...]) -> None:
        self.world, self.program, self.number = world, world.program, number
        self.topology = world.program.topology
        self.actions = collections.deque(actions)
        self.calls: collections.Counter[tuple[int, ...]] = collections.Counter()
        self.pending: dict[Transfer, list[tuple[Message, _Post | None]]] = {}
        self.inbox: dict[tuple[Link, Direction, int], list[Number]] = {}
        self.posted: set[Transfer] = set()
        self.home: dict[Hashable, Number] = {}
        self.made: dict[tuple[Stage, Direction, int], Number] = {}
        self.kept: dict[tuple[Stage, int], Number] = {}
        self.halves: dict[tuple[Stage, int], Number] = {}
        self.unread: dict[tuple[Stage, int], set[Transfer]] = {}
        self.gradient: collections.Counter[Stage] = collections.Counter()
        self.whole: collections.Counter[Stage] = collections.Counter()
        self.parts: dict[tuple[Stage, int], list[int | None]] = {}
        self.early: dict[tuple[Stage, int], Number] = {}
        self.sums: dict[Reduce, tuple[tuple[int, ...], int]] = {}
        self.summed: dict[Reduce, Number] = {}
        self.gathers: dict[Gather, tuple[tuple[int, ...], int]] = {}
        self.gathered: dict[Stage, dict[int, Number]] = {}
        self.computes: collections.Counter[tuple[int, ...]] = collections.Counter()
        self.weights = {info.stage: of("weights", info.stage) for info in self.topology.role(number).stages}
        self.agreed: Number | None = None

    def do(self, action: Action) -> bool:
        """Do an action; return whether it got through."""
        match action:
            case Compute():
                return self.compute(action)
            case Send() | Recv():
                return self.post(action)
            case Wait():
                return self.wait(action.transfer)
            case Reduce():
                return self.post_sum(action)
            case Gather() | WaitGather():
                return self.gather(action)
            case _:
                return self.finish(action)

    def finish(self, action: WaitReduce | Tie | Norm | Update) -> bool:
        """Do what ends a step."""
        match action:
            case WaitReduce():
                return self.wait_for_sum(action)
            case Tie() | Norm():
                return self.agree(action)
            case Update():
                return self.update()

    # -- messages --

    def post(self, transfer: Transfer) -> bool:
        """Post all messages of a transfer."""
        if transfer in self.pending:
            raise RehearsalError(f"'{transfer}' is posted twice")
        self.pending[transfer] = []
        self.posted.add(transfer)
        sends = isinstance(transfer, Send)
        for message in self.messages(transfer):
            there = message.rank_target if transfer.at_source else message.rank_source
            post = _Post(sends=sends, value=self.payload(transfer, message) if sends else 0)
            self.pending[transfer].append((message, None if there == self.number else post))
            if there != self.number:
                self.world.put(self.number, there, post)
            elif sends:
                self.home[self.key(transfer, message)] = post.value
        return True

    def messages(self, transfer: Transfer) -> tuple[Message, ...]:
        """Return the messages of a transfer that this rank has an end of."""
        ends = (transfer.stage, transfer.peer) if transfer.at_source else (transfer.peer, transfer.stage)
        hosted = transfer.stage in self.weights
        if not hosted or ends not in self.topology.link_between:
            raise RehearsalError(f"rank {self.number} has no end of '{transfer}'")
        return self.program.messages_of(self.number, transfer)

    def payload(self, send: Send, message: Message) -> Number:
        """Return what a message carries: rows of all microbatches that they come from."""
        own = message.made_by if send.at_source else (send.microbatch,)
        keys = [(send.stage, send.direction, k) for k in own]
        if any(key not in self.made for key in keys):
            raise RehearsalError(f"'{send}' has nothing to send")
        return of(send.peer, send.microbatch, message.rank_source, *(self.made[key] for key in keys))

    def key(self, transfer: Transfer, message: Message) -> Hashable:
        """Name a message that stays here."""
        return message.link, transfer.direction, message

    def wait(self, transfer: Transfer) -> bool:
        """Go on once all messages are complete, with what they brought."""
        if transfer not in self.pending:
            raise RehearsalError(f"'{transfer}' is waited for and not posted")
        brought: list[Number] = []
        for message, post in self.pending[transfer]:
            if not (post.whole if post else matching_op(transfer) in self.posted):
                return False
            brought.append(post.value if post else self.home.get(self.key(transfer, message), 0))
        del self.pending[transfer]
        if isinstance(transfer, Recv):
            link = link_of(self.topology, transfer)
            self.inbox[link, transfer.direction, transfer.microbatch] = brought
        for waiting in self.unread.values():
            waiting.discard(transfer)
        return True

    # -- work --

    def compute(self, action: Compute) -> bool:
        """Do a forward or a backward together with all ranks that compute it."""
        stage, k = action.stage, action.microbatch
        if stage not in self.weights:
            raise RehearsalError(f"rank {self.number} does not host {stage}")
        if action.kind is Kind.FORWARD:
            read = [self.weights[stage], *self.delivered(action)]
        elif action.kind is Kind.WEIGHT_GRADIENT:
            read = [self.keeps(self.halves, action)]
        else:
            read = [self.keeps(self.kept, action), *self.delivered(action)]
        members = tuple(self.program.joint(self.number, action))
        handed = self.world.gather(self, members, str(action), of(self.number, stage, k, *read))
        if handed is not None:
            self.computes[members] += 1
            self.computed(action, of(self.number, *handed))
        return handed is not None

    def keeps(self, store: Mapping[tuple[Stage, int], Number], action: Compute) -> Number:
        """Return what is kept for an action."""
        if (action.stage, action.microbatch) not in store:
            raise RehearsalError(f"rank {self.number} keeps nothing for '{action}'")
        return store[action.stage, action.microbatch]

    def computed(self, action: Compute, value: Number) -> None:
        """Keep what a compute action has made; add to a gradient, whose sum has no order."""
        stage, place = action.stage, (action.stage, action.microbatch)
        if action.kind is Kind.BACKWARD_PART:
            self.part_computed(action, value)
            return
        cuts = self.program.order.cuts_of(*place) if action.kind is Kind.BACKWARD else ()
        if self.parts.get(place, []) != [cut.layer for cut in cuts]:
            raise RehearsalError(f"'{action}' comes before all of its parts")
        match action.kind:
            case Kind.FORWARD:
                self.kept[place] = self.made[stage, Direction.FORWARD, action.microbatch] = value
                self.hold(*place)
                return
            case Kind.BACKWARD | Kind.INPUT_GRADIENT:
                if place in self.halves:
                    raise RehearsalError(f"'{action}' comes after another backward")
                self.made[stage, Direction.BACKWARD, action.microbatch] = value
                self.halves[place] = value
        if action.kind is not Kind.INPUT_GRADIENT:
            complete = {bucket for cut in cuts for bucket in cut.buckets}
            if any(reduce.stage == stage and reduce.bucket not in complete for reduce in self.sums):
                raise RehearsalError(f"'{action}' adds to a gradient that is being summed")
            made = self.halves.pop(place)
            self.gradient[stage] = (self.gradient[stage] + made) % MODULUS
            if not cuts:
                self.whole[stage] = (self.whole[stage] + made) % MODULUS
            del self.kept[place]

    def part_computed(self, part: Compute, value: Number) -> None:
        """Keep what a part of a backward adds to the buckets that it completes."""
        stage, place = part.stage, (part.stage, part.microbatch)
        done = self.parts.setdefault(place, [])
        cuts = self.program.order.cuts_of(*place)
        if len(done) == len(cuts) or cuts[len(done)].layer != part.layer:
            raise RehearsalError(f"'{part}' is not the next part")
        for bucket in cuts[len(done)].buckets:
            if Reduce(stage, bucket) in self.sums:
                raise RehearsalError(f"'{part}' adds to a gradient that is being summed")
            self.early[stage, bucket] = value
        done.append(part.layer)

    def gradient_of(self, reduce: Reduce) -> Number:
        """Return the gradient of a bucket. One that a part of a backward completes takes nothing from the rest."""
        stage, bucket = reduce.stage, reduce.bucket
        if any(bucket in cut.buckets for cut in self.program.order.cuts.get(stage, ())):
            return of(self.whole[stage], self.early.get((stage, bucket)))
        return self.gradient[stage]

    def hold(self, stage: Stage, k: int) -> None:
        """Count what a stage holds now: what its backward will need, or what is still to be read elsewhere."""
        if stage not in self.program.order.backward:
            self.unread[stage, k] = {transfer for transfer, own in self.outgoing(stage) if k in own}
            held = sum(bool(waiting) for (owner, _), waiting in self.unread.items() if owner == stage)
        else:
            held = sum(owner == stage for owner, _ in self.kept)
        if self.world.room is not None and held > self.world.room[stage]:
            raise RehearsalError(f"rank {self.number} holds {held} of {stage}")

    def outgoing(self, stage: Stage) -> Iterator[tuple[Send, set[int]]]:
        """Yield the sends of outputs that a stage has on this rank, with the microbatches they are of."""
        for link in self.topology.links_from(stage):
            for k in range(self.topology.modules[link.target.module].microbatches):
                messages = self.program.routes.sent_by(self.number, link, k)
                if messages:
                    send = Send(stage, Direction.FORWARD, k, link.target)
                    yield send, {j for message in messages for j in message.made_by}

    def delivered(self, action: Compute) -> Iterator[Number]:
        """Yield all that an action reads and that has come by message."""
        stage, k, routes = action.stage, action.microbatch, self.program.routes
        if action.kind is Kind.FORWARD:
            for link in self.topology.links_into(stage):
                if routes.sent_to(self.number, link, k):
                    yield from self.arrived(link, Direction.FORWARD, k)
            return
        own = self.topology.modules[stage.module].microbatches
        for link in self.topology.links_from(stage):
            if link in self.program.order.gradients:
                for j in overlapping(k, own, self.topology.modules[link.target.module].microbatches):
                    messages = routes.sent_by(self.number, link, j)
                    if any(k in message.made_by for message in messages):
                        yield from self.arrived(link, Direction.BACKWARD, j)

    def arrived(self, link: Link, direction: Direction, k: int) -> list[Number]:
        """Return what has come on a link for a microbatch."""
        if (link, direction, k) not in self.inbox:
            raise RehearsalError(
                f"rank {self.number} reads {direction.value}{k} of {link} before it has come"
            )
        return self.inbox[link, direction, k]

    # -- the end of the step --

    def post_sum(self, reduce: Reduce) -> bool:
        """Hand in a gradient, at a place among the computations that all members join."""
        if reduce.stage not in self.weights or reduce in self.sums:
            raise RehearsalError(f"'{reduce}' is not for rank {self.number}, or twice")
        members = tuple(self.program.joint(self.number, reduce))
        before = [n for ranks, n in sorted(self.computes.items()) if set(members) <= set(ranks)]
        what = f"{reduce} after {before}"
        self.sums[reduce] = self.world.post(self, members, what, self.gradient_of(reduce))
        return True

    def wait_for_sum(self, wait: WaitReduce) -> bool:
        """Go on once all members have handed in theirs."""
        if wait.posted not in self.sums:
            raise RehearsalError(f"'{wait}' waits for what is not posted")
        handed = self.world.handed(self.sums[wait.posted])
        if handed is not None:
            self.summed[wait.posted] = of("sum", *handed)
        return handed is not None

    def gather(self, action: Gather | WaitGather) -> bool:
        """Do what a stage needs before it computes."""
        return self.post_gather(action) if isinstance(action, Gather) else self.wait_for_weights(action)

    def post_gather(self, gather: Gather) -> bool:
        """Hand in a shard of the weights, at a place among the computations that all members join."""
        if gather.stage not in self.weights or gather in self.gathers:
            raise RehearsalError(f"'{gather}' is not for rank {self.number}, or twice")
        members = tuple(self.program.joint(self.number, gather))
        before = [n for ranks, n in sorted(self.computes.items()) if set(members) <= set(ranks)]
        self.gathers[gather] = self.world.post(self, members, f"{gather} after {before}", self.stale(gather))
        return True

    def stale(self, gather: Gather) -> Number:
        """Return the shard of a bucket that this rank updated in the step before."""
        return of("shard", gather, self.number)

    def wait_for_weights(self, wait: WaitGather) -> bool:
        """Go on once all members have handed in their shards. Weights that were read before were others."""
        if wait.posted not in self.gathers or self.agreed is not None:
            raise RehearsalError(f"'{wait}' waits for what is not posted, or comes too late")
        handed = self.world.handed(self.gathers[wait.posted])
        if handed is not None:
            self.gathered.setdefault(wait.stage, {})[wait.bucket] = of("gathered", *handed)
            whole = tuple(sorted(self.gathered[wait.stage].items()))
            self.weights[wait.stage] = of("weights", wait.stage, whole)
        return handed is not None

    def result_of(self, stage: Stage) -> Number:
        """Return the gradient of a stage, summed as far as it is."""
        mine = [(reduce.bucket, value) for reduce, value in self.summed.items() if reduce.stage == stage]
        return of(self.gradient[stage], *sorted(mine))

    def agree(self, action: Tie | Norm) -> bool:
        """Sum tied gradients over the members of a joint action, or hand all that a rank has to all."""
        if not isinstance(action, Norm) and action.stage not in self.weights:
            raise RehearsalError(f"rank {self.number} does not host {action.stage}")
        members = tuple(self.program.joint(self.number, action))
        if self.number not in members:
            raise RehearsalError(f"'{action}' is not for rank {self.number}")
        what = f"TIE {action.stage.module}" if isinstance(action, Tie) else str(action)
        if isinstance(action, Norm):
            mine = of(*((stage, self.result_of(stage)) for stage in self.weights))
        else:
            mine = self.result_of(action.stage)
        handed = self.world.gather(self, members, what, mine)
        if handed is None:
            return False
        if isinstance(action, Norm):
            self.agreed = of("agreed", self.agreed, *handed)
        else:
            self.gradient[action.stage] = of(what.split()[0], *handed)
        return True

    def update(self) -> bool:
        """Take the step that was agreed on."""
        if self.agreed is None:
            raise RehearsalError("a step is taken that nobody agreed on")
        for stage, weights in self.weights.items():
            self.weights[stage] = of("updated", weights, self.result_of(stage), self.agreed)
        return True

    def results(self) -> Iterator[tuple[Hashable, Number]]:
        """Yield what is left: weights, and what was computed for nobody else."""
        if self.pending:
            raise RehearsalError(f"rank {self.number} never waits for {', '.join(map(str, self.pending))}")
        if self.sums.keys() != self.summed.keys():
            raise RehearsalError(f"rank {self.number} does not wait for all sums that it posted")
        waited = {Gather(stage, bucket) for stage, own in self.gathered.items() for bucket in own}
        if self.gathers.keys() != waited:
            raise RehearsalError(f"rank {self.number} does not wait for all weights that it gathers")
        for stage, weights in self.weights.items():
            yield (self.number, stage), weights
        for (stage, direction, k), value in self.made.items():
            if direction is Direction.FORWARD and not self.topology.links_from(stage):
                yield (self.number, stage, k), value
