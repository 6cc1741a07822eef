"""Replay: the one walk over a program, without durations.

Every rank works down its list. An action starts when what it waits for is there: a WAIT when both ends have
posted the transfer (nothing is assumed to buffer), a joint action when all its ranks have reached it. The walk
ends when every rank is through, or when none can go on; then it says who waits for whom. `verify` judges the
end of the walk; a simulator adds a clock to it.
"""

import collections
from collections.abc import Hashable, Iterable, Iterator

import attrs

from mimogrid.core.schedule.actions import Action, Direction, Send, Transfer, Wait
from mimogrid.core.schedule.lower import Program
from mimogrid.core.schedule.program import Listing


@attrs.frozen
class Blocked:
    """A rank that cannot go on: the action it stands before, and the ranks that it waits for."""

    rank: int
    action: Action
    waits_for: tuple[int, ...]


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


def replay(program: Program, listing: Listing) -> Replay:
    """Walk a listing of a program to its end, or to where it is stuck."""
    return _Walk(program, listing).run()


def postings(program: Program, rank: int, transfer: Transfer) -> Iterator[tuple[Posting, Posting]]:
    """Yield, per message of a transfer, this rank's end of it and the peer's."""
    here, there = transfer.stage, transfer.peer
    ends = (here, there) if isinstance(transfer, Send) else (there, here)
    key = (*ends, transfer.direction, transfer.microbatch)
    leaves = isinstance(transfer, Send) == (transfer.direction is Direction.FORWARD)
    for message in program.messages_of(rank, transfer):
        peer = message.rank_target if leaves else message.rank_source
        yield Posting(key, rank, peer), Posting(key, peer, rank)


class _Walk:
    """The walk's state: how far each rank is, what is posted, who has reached which joint action."""

    def __init__(self, program: Program, listing: Listing) -> None:
        self.program = program
        self.listing = listing
        self.position = dict.fromkeys(listing, 0)
        self.posted: set[tuple[Posting, bool]] = set()
        self.met: dict[Hashable, set[int]] = collections.defaultdict(set)
        self.times: collections.Counter[tuple[int, Action]] = collections.Counter()
        self.sleeping: dict[Hashable, set[int]] = collections.defaultdict(set)
        self.started: list[tuple[int, Action]] = []
        self.ready = collections.deque(listing)

    def run(self) -> Replay:
        """Let every rank go as far as it can, until none can."""
        while self.ready:
            self._advance(self.ready.popleft())
        stuck = (rank for rank in self.listing if self.position[rank] < len(self.listing[rank]))
        return Replay(tuple(self.started), tuple(self._blocked(rank) for rank in stuck))

    def _advance(self, rank: int) -> None:
        actions = self.listing[rank]
        while self.position[rank] < len(actions):
            action = actions[self.position[rank]]
            obstacle = next(self._obstacles(rank, action), None)
            if obstacle is not None:
                self.sleeping[obstacle[0]].add(rank)
                return
            self._start(rank, action)

    def _start(self, rank: int, action: Action) -> None:
        self.started.append((rank, action))
        self.position[rank] += 1
        self.times[rank, action] += 1
        if isinstance(action, Transfer):
            for mine, _ in postings(self.program, rank, action):
                self._announce((mine, isinstance(action, Send)))

    def _announce(self, posting: tuple[Posting, bool]) -> None:
        self.posted.add(posting)
        self.ready.extend(self.sleeping.pop(posting, ()))

    def _obstacles(self, rank: int, action: Action) -> Iterator[tuple[Hashable, Iterable[int]]]:
        """Yield what an action still waits for, with the ranks that owe it."""
        if isinstance(action, Wait):
            sends = isinstance(action.transfer, Send)
            for mine, theirs in postings(self.program, rank, action.transfer):
                for end, posting in ((sends, mine), (not sends, theirs)):
                    if (posting, end) not in self.posted:
                        yield (posting, end), (posting.by,)
        elif not isinstance(action, Transfer):
            group = self.program.joint(rank, action)
            meeting = (group[0], action, self.times[rank, action])
            met = self.met[meeting]
            if rank not in met:
                met.add(rank)
                if len(met) == len(group):
                    self.ready.extend(self.sleeping.pop(meeting, ()))
            if len(met) < len(group):
                yield meeting, (other for other in group if other not in met)

    def _blocked(self, rank: int) -> Blocked:
        action = self.listing[rank][self.position[rank]]
        owing = (other for _, others in self._obstacles(rank, action) for other in others)
        return Blocked(rank, action, tuple(dict.fromkeys(owing)))
