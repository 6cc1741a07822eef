"""Replay: runs a program without durations, to see in which order its actions start and whether it ends.

Every rank works down its list. A WAIT starts when both ends have posted the transfer (nothing is assumed to buffer),
or when all ranks of a collective have posted it. A joint action starts when all of its ranks have reached
it. Other actions start at once. The replay ends when every list is done, or when no rank can go on; then it says
which rank waits for which. `verify` checks the end of a replay, and `simulate` adds a clock to it.

Ranks with equal lists can also be replayed *as one*. An action then starts for all of them when it may start for
every one of them, and a joint action when every rank that has it in its list has reached it. That is stricter than
what the ranks need. So if such a replay ends, the ranks can run the same actions in the same order, and end too. If
it gets stuck, nothing is known about the ranks.
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
    Collective,
    Tie,
    Transfer,
    Wait,
    WaitCollective,
    WaitGather,
    WaitReduce,
    matching_op,
)


@attrs.frozen
class Blocked:
    """A rank that cannot go on.

    Attributes:
        rank: The rank.
        action: The action that it stands before.
        waits_for: The ranks that it waits for.
        heads: If a queue of a pair of ranks is jammed, the transfers that stand first in it: this rank's, and that of
            the first rank in `waits_for`.
    """

    rank: int
    action: Action
    waits_for: tuple[int, ...]
    heads: tuple[Transfer, Transfer] | None = None


@attrs.frozen
class Replay:
    """The result of a replay: (rank, action) in the order in which they started, and the ranks that got stuck."""

    started: tuple[tuple[int, Action], ...]
    blocked: tuple[Blocked, ...]


@attrs.frozen(eq=False)
class ReplayRanks:
    """The ranks of a replay, and how they depend on each other.

    Attributes:
        listing: The list of each rank.
        peers: The ranks at the other ends of a rank's transfer.
        others: The same without the rank itself: messages to itself do not use the network.
        joint: The ranks of a rank's joint action.
        strict: Whether both directions between two ranks share one queue.
    """

    listing: Listing
    peers: Callable[[int, Transfer], Iterable[int]]
    others: Callable[[int, Transfer], Iterable[int]]
    joint: Callable[[int, Action], Sequence[int]]
    strict: bool = False

    @functools.cached_property
    def matching_ops(self) -> Mapping[Transfer, Transfer]:
        """For every transfer of the lists, what the peer posts for it.

        It is the very object in the lists, if there is one, because comparing attrs values is slow unless they are
        identical.
        """
        actions = (action for actions in self.listing.values() for action in actions)
        own = {action: action for action in actions if isinstance(action, Transfer)}
        return {transfer: own.get(matching_op(transfer), matching_op(transfer)) for transfer in own}


def replay(program: Program, listing: Listing) -> Replay:
    """Replay a listing of a program, rank by rank."""
    return replay_ranks(single_ranks(program, listing))


def replay_ranks(ranks: ReplayRanks) -> Replay:
    """Replay until every list is done, or no rank can go on."""
    return _State(ranks).run()


def single_ranks(program: Program, listing: Listing, *, strict: bool = False) -> ReplayRanks:
    """Return every rank by itself."""

    def others(rank: int, transfer: Transfer) -> Iterator[int]:
        return (peer for peer in program.peers_of(rank, transfer) if peer != rank)

    return ReplayRanks(listing, program.peers_of, others, program.joint, strict)


def merged_ranks(
    program: Program, listing: Listing, classes: Iterable[Sequence[int]], *, strict: bool = False
) -> ReplayRanks:
    """Return the ranks of each class merged into one; the first rank stands for them. Their lists are equal.

    Every rank of a joint action must have it in its list. With `strict`, nothing passes a queue between two ranks of
    one class, because both put the same transfers into it.
    """
    members = {ranks[0]: ranks for ranks in classes}
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
    """Return what the ranks of a joint action know it by. A TIE has another stage at each end, so both use one."""
    return Tie(attrs.evolve(action.stage, pp=0, chunk=0)) if isinstance(action, Tie) else action


class _State:
    """The state of a replay: how far each rank is, what is posted, which ranks have reached which joint action.

    An obstacle is named by the event that removes it: (rank, transfer or collective) for a post, (first rank, action)
    for a joint action, ("all", first rank, collective) for the last post of a collective, (rank, other rank, transfer)
    for a transfer that passes a queue.
    """

    def __init__(self, ranks: ReplayRanks) -> None:
        self.listing, self.peers, self.joint = ranks.listing, ranks.peers, ranks.joint
        self.matching_ops, self.others, self.strict = ranks.matching_ops, ranks.others, ranks.strict
        self.queued: dict[tuple[int, int], collections.deque[Transfer]] = collections.defaultdict(
            collections.deque
        )
        self.passed: set[tuple[int, int, Transfer]] = set()
        self.position = dict.fromkeys(self.listing, 0)
        self.posted: dict[int, set[Transfer | Collective]] = collections.defaultdict(set)
        self.met: dict[tuple[int, Action], set[int]] = collections.defaultdict(set)
        self.free: set[tuple[int, Action]] = set()
        self.posts: dict[tuple[int, Collective], int] = {}
        self.sleeping: dict[Hashable, list[int]] = {}
        self.started: list[tuple[int, Action]] = []
        self.ready = collections.deque(self.listing)

    def run(self) -> Replay:
        """Let every rank go as far as it can, until none can."""
        while self.ready:
            self._advance(self.ready.popleft())
        stuck = (rank for rank in self.listing if self.position[rank] < len(self.listing[rank]))
        return Replay(tuple(self.started), tuple(self._blocked(rank) for rank in stuck))

    def _advance(self, rank: int) -> None:
        for action in itertools.islice(self.listing[rank], self.position[rank], None):
            if isinstance(action, Transfer | Collective):
                self._post(rank, action)
            else:
                obstacle = self._obstacle(rank, action)
                if obstacle is not None:
                    self.sleeping.setdefault(obstacle, []).append(rank)
                    return
            self.position[rank] += 1
            self.started.append((rank, action))

    def _post(self, rank: int, action: Transfer | Collective) -> None:
        if isinstance(action, Collective):
            self._post_collective(rank, action)
        self.posted[rank].add(action)
        if self.sleeping:
            self.ready.extend(self.sleeping.pop((rank, action), ()))
        if self.strict and isinstance(action, Transfer):
            self._queue(rank, action)

    def _post_collective(self, rank: int, collective: Collective) -> None:
        """Count the ranks that have posted a collective; the last one frees those that wait for it."""
        group = self.joint(rank, collective)
        place = group[0], collective
        self.posts[place] = self.posts.get(place, 0) + (collective not in self.posted[rank])
        if self.posts[place] == len(group):
            self.ready.extend(self.sleeping.pop(("all", *place), ()))

    def _unposted_collective(self, rank: int, collective: Collective) -> Hashable | None:
        """Return the obstacle of a wait for a collective: that not all ranks have posted it, or this one has not."""
        if collective not in self.posted[rank]:
            return rank, collective
        group = self.joint(rank, collective)
        place = group[0], collective
        return None if self.posts[place] == len(group) else ("all", *place)

    def _queue(self, rank: int, transfer: Transfer) -> None:
        """Put a transfer into its queues. The first transfers of the two ends pass while they match."""
        for other in self.others(rank, transfer):
            mine, theirs = self.queued[rank, other], self.queued[other, rank]
            mine.append(transfer)
            while mine and theirs and self.matching_ops[mine[0]] == theirs[0]:
                for end in ((rank, other, mine.popleft()), (other, rank, theirs.popleft())):
                    self.passed.add(end)
                    self.ready.extend(self.sleeping.pop(end, ()))

    def _obstacle(self, rank: int, action: Action) -> Hashable | None:
        """Return an obstacle of an action that posts nothing, if there is one."""
        match action:
            case Wait(transfer=transfer):
                queued = self._still_queued(rank, transfer) if self.strict else ()
                return next(itertools.chain(self._unposted(rank, transfer), queued), None)
            case WaitReduce() | WaitGather():
                return self._unposted_collective(rank, action.posted)
            case _:
                return self._absent(rank, action)

    def _absent(self, rank: int, action: Action) -> Hashable | None:
        """Return the obstacle of a joint action: ranks that have not reached it. None once the last one has."""
        group = self.joint(rank, action)
        if len(group) == 1:
            return None
        if (rank, meeting(action)) in self.free:
            self.free.remove((rank, meeting(action)))
            return None
        place = (group[0], meeting(action))
        met = self.met[place]
        met.add(rank)
        if len(met) < len(group):
            return place
        del self.met[place]
        self.free.update((other, place[1]) for other in group if other != rank)
        self.ready.extend(self.sleeping.pop(place, ()))
        return None

    def _unposted(self, rank: int, transfer: Transfer) -> Iterator[tuple[int, Transfer]]:
        if transfer not in self.posted[rank]:
            yield rank, transfer
        theirs = self.matching_ops.get(transfer) or matching_op(transfer)
        for peer in self.peers(rank, transfer):
            if theirs not in self.posted[peer]:
                yield peer, theirs

    def _unposted_by(self, rank: int, action: WaitCollective) -> Iterator[tuple[int, Collective]]:
        group = (rank, *self.joint(rank, action.posted))
        return ((member, action.posted) for member in group if action.posted not in self.posted[member])

    def _still_queued(self, rank: int, transfer: Transfer) -> Iterator[tuple[int, int, Transfer]]:
        for other in self.others(rank, transfer):
            if (rank, other, transfer) not in self.passed:
                yield rank, other, transfer

    def _blocked(self, rank: int) -> Blocked:
        action = self.listing[rank][self.position[rank]]
        heads = None
        if isinstance(action, Wait):
            missing = [other for other, _ in self._unposted(rank, action.transfer)]
            if not missing:
                missing = [other for _, other, _ in self._still_queued(rank, action.transfer)]
                heads = (self.queued[rank, missing[0]][0], self.queued[missing[0], rank][0])
        elif isinstance(action, WaitCollective):
            missing = [member for member, _ in self._unposted_by(rank, action)]
        else:
            group = self.joint(rank, action)
            met = self.met[group[0], meeting(action)]
            missing = [other for other in group if other not in met]
        return Blocked(rank, action, tuple(dict.fromkeys(missing)), heads)
