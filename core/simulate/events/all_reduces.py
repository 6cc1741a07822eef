"""All-reduces of gradients as pieces of time, beside what is computed.

An all-reduce begins when all ranks of its group have posted it and the one before it in the group is done.
"""

import collections
from collections.abc import Hashable

from mimogrid.core.schedule.actions import Reduce
from mimogrid.core.simulate.events.folded import FoldedProgram
from mimogrid.core.simulate.events.pieces import Pieces
from mimogrid.core.simulate.lower_bound import all_reduce_s


class AllReduces:
    """All all-reduces of a walk."""

    def __init__(self, folded: FoldedProgram, pieces: Pieces) -> None:
        self._folded, self._pieces = folded, pieces
        self._posted: dict[tuple[int, Reduce], int] = {}
        self._begun: set[tuple[int, Reduce]] = set()
        self._waiting: dict[Hashable, collections.deque[Reduce]] = collections.defaultdict(collections.deque)
        self._done: dict[Hashable, int] = {}
        self._last: dict[Hashable, int] = {}
        self._queues: dict[tuple[int, Reduce], Hashable] = {}

    def post(self, rank: int, reduce: Reduce, before: int) -> int:
        """Post a rank's part, which takes no time. The first rank that posts puts the all-reduce into the queue."""
        begun = self._folded.joint(rank, reduce)[0], reduce
        if begun not in self._begun:
            self._begun.add(begun)
            self._waiting[self._queue_of(rank, reduce)].append(reduce)
        self._posted[rank, reduce] = before
        return before

    def done(self, rank: int, reduce: Reduce) -> int:
        """Return the piece that ends an all-reduce: behind all postings and behind those before it in the queue."""
        group, queue = self._folded.joint(rank, reduce), self._queue_of(rank, reduce)
        while (queue, reduce) not in self._done:
            following = self._waiting[queue].popleft()
            behind = [self._last.get(queue, 0), *(self._posted[member, following] for member in group)]
            seconds = all_reduce_s(self._folded.program, self._folded.costs, following)
            piece = self._pieces.add(tuple(dict.fromkeys(behind)), seconds, (rank, following))
            self._last[queue] = self._done[queue, following] = piece
        return self._done[queue, reduce]

    def _queue_of(self, rank: int, reduce: Reduce) -> Hashable:
        """Name the group of an all-reduce. The leaders alone do not: several groups may have the same ones."""
        if (rank, reduce) not in self._queues:
            first: dict[tuple[int, ...], Reduce] = {}
            program = self._folded.program
            for each in program.sums(rank):
                named = first.setdefault(program.joint(rank, each), each)
                self._queues[rank, each] = (self._folded.joint(rank, each), named)
        return self._queues[rank, reduce]
