"""Collectives for buckets as pieces of time, beside what is computed: gathers of weights and sums of gradients.

One begins when all ranks of its group have posted it and the one before it in the group is done.
"""

import collections
from collections.abc import Hashable

from mimogrid.core.schedule.actions import Collective
from mimogrid.core.simulate.events.folded import FoldedProgram
from mimogrid.core.simulate.events.pieces import Pieces
from mimogrid.core.simulate.lower_bound import collective_s


class _Queue:
    """The collectives of a group that are posted and not done, the last piece of those that are, and the piece of each.

    `members` are the leaders of the group.
    """

    __slots__ = ("done", "last", "members", "waiting")

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.waiting: collections.deque[Collective] = collections.deque()
        self.last = 0
        self.done: dict[Collective, int] = {}


class Collectives:
    """All collectives of a walk."""

    def __init__(self, folded: FoldedProgram, pieces: Pieces) -> None:
        self._folded, self._pieces = folded, pieces
        self._posted: dict[int, dict[Collective, int]] = collections.defaultdict(dict)
        self._begun: set[tuple[int, Collective]] = set()
        self._queues: dict[Hashable, _Queue] = {}
        self._queue_of: dict[int, dict[Collective, _Queue]] = {}

    def post(self, rank: int, collective: Collective, before: int) -> int:
        """Post a rank's part, which takes no time. The first rank that posts puts the collective into the queue."""
        queue = self._queue(rank, collective)
        begun = queue.members[0], collective
        if begun not in self._begun:
            self._begun.add(begun)
            queue.waiting.append(collective)
        self._posted[rank][collective] = before
        return before

    def done(self, rank: int, collective: Collective) -> int:
        """Return the piece that ends a collective: behind all postings and behind those before it in the queue."""
        queue = self._queue(rank, collective)
        while collective not in queue.done:
            following = queue.waiting.popleft()
            posts = [self._posted[member][following] for member in queue.members]
            seconds = collective_s(self._folded.program, self._folded.costs, following)
            piece = self._pieces.add(tuple(dict.fromkeys((queue.last, *posts))), seconds, (rank, following))
            queue.last = queue.done[following] = piece
        return queue.done[collective]

    def _queue(self, rank: int, collective: Collective) -> _Queue:
        """Return the queue of a group. The leaders alone do not name it: several groups may have the same ones."""
        if rank not in self._queue_of:
            first: dict[tuple[int, ...], Collective] = {}
            program, mine = self._folded.program, dict[Collective, _Queue]()
            for each in program.collectives(rank):
                members = self._folded.joint(rank, each)
                named = members, first.setdefault(program.joint(rank, each), each)
                mine[each] = self._queues.setdefault(named, _Queue(members))
            self._queue_of[rank] = mine
        return self._queue_of[rank][collective]
