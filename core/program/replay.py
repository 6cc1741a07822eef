"""Replay: the one walk over a program, without durations.

Every rank works down its list. An action starts when what it waits for is there: a WAIT when both ends have
posted the transfer (nothing is assumed to buffer), or all who share a sum have posted it; a joint action when all
its ranks have reached it. The walk ends when every rank is through, or when none can go on; then it says who
waits for whom. `verify` judges the end of the walk; a simulator adds a clock to it.

Ranks with equal lists may also walk *in step*, as one: an action starts for all of them when it may start for
every one of them, and a joint action when everybody who has it in his list has reached it. That asks for more
than the ranks need. So if such a walk reaches the end, the ranks by themselves can do the same actions in the
same order, and get there, too. If it does not, nothing is said of them.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import (
    Action,
    Recv,
    Reduce,
    Send,
    Tie,
    Transfer,
    Wait,
    WaitReduce,
    matching_op,
)


@attrs.frozen
class Blocked:
    """A rank that cannot go on: the action it stands before, and the ranks that it waits for.

    `heads` are the first ends, its own and that of the first of those ranks, of a queue in which neither lets
    the other pass.
    """

    rank: int
    action: Action
    waits_for: tuple[int, ...]
    heads: tuple[Transfer, Transfer] | None = None


@attrs.frozen
class Replay:
    """The end of a walk: what started in which order, and who is stuck."""

    started: tuple[tuple[int, Action], ...]
    blocked: tuple[Blocked, ...]


@attrs.frozen(cache_hash=True)
class Posting:
    """One end of one message: rank `by` has posted its send or its receive."""

    transfer: tuple[Hashable, ...]
    by: int
    other: int


@attrs.frozen(eq=False)
class ReplayRanks:
    """Who walks: lists, who is at the other ends of a transfer, and who starts an action together.

    `others` are the peers over the network: a message of a rank to itself stays with it. Whether the walk is
    `strict` is for it to say.
    """

    listing: Listing
    peers: Callable[[int, Transfer], Iterable[int]]
    others: Callable[[int, Transfer], Iterable[int]]
    joint: Callable[[int, Action], Sequence[int]]
    strict: bool = False

    @functools.cached_property
    def twins(self) -> Mapping[Transfer, Transfer]:
        """For every transfer of the lists, what the peer posts for it.

        It is the value in the lists, if there is one: attrs values are slow to compare unless they are the
        same.
        """
        actions = (action for actions in self.listing.values() for action in actions)
        own = {action: action for action in actions if isinstance(action, Transfer)}
        return {transfer: own.get(matching_op(transfer), matching_op(transfer)) for transfer in own}


def replay(program: Program, listing: Listing) -> Replay:
    """Walk a listing of a program to its end, or to where it is stuck."""
    return walk(alone(program, listing))


def alone(program: Program, listing: Listing, *, strict: bool = False) -> ReplayRanks:
    """Let every rank walk by itself."""

    def others(rank: int, transfer: Transfer) -> Iterator[int]:
        return (peer for peer in program.peers_of(rank, transfer) if peer != rank)

    return ReplayRanks(listing, program.peers_of, others, program.joint, strict)


def in_step(
    program: Program, listing: Listing, alike: Iterable[Sequence[int]], *, strict: bool = False
) -> ReplayRanks:
    """Let ranks with equal lists walk as one; the first of each set stands for it.

    Every rank of a joint action must have it in its list. A queue between two ranks that walk as one never
    passes anything here: both put the same ends into it.
    """
    members = {ranks[0]: ranks for ranks in alike}
    leader = {rank: first for first, ranks in members.items() for rank in ranks}
    having: dict[Action, list[int]] = collections.defaultdict(list)
    for first in members:
        for action in dict.fromkeys(map(meeting, listing[first])):
            having[action].append(first)

    @functools.cache
    def ends(first: int, transfer: Transfer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        met = [(rank, peer) for rank in members[first] for peer in program.peers_of(rank, transfer)]
        others = (leader[peer] for rank, peer in met if peer != rank)
        return tuple(dict.fromkeys(leader[peer] for _, peer in met)), tuple(dict.fromkeys(others))

    return ReplayRanks(
        {first: listing[first] for first in members},
        lambda first, transfer: ends(first, transfer)[0],
        lambda first, transfer: ends(first, transfer)[1],
        lambda _, action: having[meeting(action)],
        strict,
    )


def meeting(action: Action) -> Action:
    """Return the action by which the members of a joint action know it; a tie joins two stages, and has two names."""
    return Tie(attrs.evolve(action.stage, pp=0, chunk=0)) if isinstance(action, Tie) else action


def walk(walkers: ReplayRanks) -> Replay:
    """Walk to the end, or to where all are stuck."""
    return _Walk(walkers).run()


def postings(program: Program, rank: int, transfer: Transfer) -> Iterator[tuple[Posting, Posting]]:
    """Yield, per message of a transfer, this rank's end of it and the peer's."""
    here, there = transfer.stage, transfer.peer
    ends = (here, there) if isinstance(transfer, Send) else (there, here)
    key = (*ends, transfer.direction, transfer.microbatch)
    for peer in program.peers_of(rank, transfer):
        yield Posting(key, rank, peer), Posting(key, peer, rank)


class _Walk:
    """The walk's state: how far each walker is, what is posted, who has reached which joint action.

    An obstacle is known by what removes it: a posting by its walker and transfer, a joint action by its first
    walker and itself, the passing of a posting by its walker, the walker at the other end, and its transfer.
    """

    def __init__(self, walkers: ReplayRanks) -> None:
        self.listing, self.peers, self.joint = walkers.listing, walkers.peers, walkers.joint
        self.twins, self.others, self.strict = walkers.twins, walkers.others, walkers.strict
        self.queued: dict[tuple[int, int], collections.deque[Transfer]] = collections.defaultdict(
            collections.deque
        )
        self.passed: set[tuple[int, int, Transfer]] = set()
        self.position = dict.fromkeys(self.listing, 0)
        self.posted: set[tuple[int, Transfer | Reduce]] = set()
        self.met: dict[tuple[int, Action], set[int]] = collections.defaultdict(set)
        self.free: set[tuple[int, Action]] = set()
        self.sleeping: dict[Hashable, list[int]] = {}
        self.started: list[tuple[int, Action]] = []
        self.ready = collections.deque(self.listing)

    def run(self) -> Replay:
        """Let every walker go as far as it can, until none can."""
        while self.ready:
            self._advance(self.ready.popleft())
        stuck = (walker for walker in self.listing if self.position[walker] < len(self.listing[walker]))
        return Replay(tuple(self.started), tuple(self._blocked(walker) for walker in stuck))

    def _advance(self, walker: int) -> None:
        actions = self.listing[walker]
        while self.position[walker] < len(actions):
            action = actions[self.position[walker]]
            obstacle = self._obstacle(walker, action)
            if obstacle is not None:
                self.sleeping.setdefault(obstacle, []).append(walker)
                return
            self.position[walker] += 1
            self.started.append((walker, action))
            if isinstance(action, Transfer | Reduce):
                self.posted.add((walker, action))
                self.ready.extend(self.sleeping.pop((walker, action), ()))
                if self.strict and isinstance(action, Transfer):
                    self._queue(walker, action)

    def _queue(self, walker: int, transfer: Transfer) -> None:
        """Put a posting into its queues; what stands first there passes, while its two ends belong together."""
        for other in self.others(walker, transfer):
            mine, theirs = self.queued[walker, other], self.queued[other, walker]
            mine.append(transfer)
            while mine and theirs and self.twins[mine[0]] == theirs[0]:
                for end in ((walker, other, mine.popleft()), (other, walker, theirs.popleft())):
                    self.passed.add(end)
                    self.ready.extend(self.sleeping.pop(end, ()))

    def _obstacle(self, walker: int, action: Action) -> Hashable | None:
        """Return what an action still waits for, if anything."""
        match action:
            case Send() | Recv() | Reduce():
                return None
            case Wait(transfer=transfer):
                queueing = self._queueing(walker, transfer) if self.strict else ()
                return next(itertools.chain(self._unposted(walker, transfer), queueing), None)
            case WaitReduce():
                return next(self._unsummed(walker, action), None)
            case _:
                return self._absent(walker, action)

    def _absent(self, walker: int, action: Action) -> Hashable | None:
        """Return the meeting that a joint action waits for; None once the last member has come."""
        group = self.joint(walker, action)
        if len(group) == 1:
            return None
        if (walker, meeting(action)) in self.free:
            self.free.remove((walker, meeting(action)))
            return None
        place = (group[0], meeting(action))
        met = self.met[place]
        met.add(walker)
        if len(met) < len(group):
            return place
        del self.met[place]
        self.free.update((other, place[1]) for other in group if other != walker)
        self.ready.extend(self.sleeping.pop(place, ()))
        return None

    def _unposted(self, walker: int, transfer: Transfer) -> Iterator[tuple[int, Transfer]]:
        if (walker, transfer) not in self.posted:
            yield walker, transfer
        theirs = self.twins[transfer] if transfer in self.twins else matching_op(transfer)
        for peer in self.peers(walker, transfer):
            if (peer, theirs) not in self.posted:
                yield peer, theirs

    def _unsummed(self, walker: int, action: WaitReduce) -> Iterator[tuple[int, Reduce]]:
        group = (walker, *self.joint(walker, action.posted))
        return ((member, action.posted) for member in group if (member, action.posted) not in self.posted)

    def _queueing(self, walker: int, transfer: Transfer) -> Iterator[tuple[int, int, Transfer]]:
        for other in self.others(walker, transfer):
            if (walker, other, transfer) not in self.passed:
                yield walker, other, transfer

    def _blocked(self, walker: int) -> Blocked:
        action = self.listing[walker][self.position[walker]]
        heads = None
        if isinstance(action, Wait):
            owing = [other for other, _ in self._unposted(walker, action.transfer)]
            if not owing:
                owing = [other for _, other, _ in self._queueing(walker, action.transfer)]
                heads = (self.queued[walker, owing[0]][0], self.queued[owing[0], walker][0])
        elif isinstance(action, WaitReduce):
            owing = [member for member, _ in self._unsummed(walker, action)]
        else:
            group = self.joint(walker, action)
            met = self.met[group[0], meeting(action)]
            owing = [other for other in group if other not in met]
        return Blocked(walker, action, tuple(dict.fromkeys(owing)), heads)
