"""Sums of gradients as pieces of time, beside what is computed.

A sum begins when all who share it have posted it and the one before it in their group is done.
"""

import collections
from collections.abc import Hashable

from mimogrid.core.schedule.actions import Reduce
from mimogrid.core.simulate.folded import Folded
from mimogrid.core.simulate.lower_bound import sum_s
from mimogrid.core.simulate.pieces import Pieces


class Sums:
    """All sums of a walk."""

    def __init__(self, folded: Folded, pieces: Pieces) -> None:
        self._folded, self._pieces = folded, pieces
        self._posted: dict[tuple[int, Reduce], int] = {}
        self._waiting: dict[Hashable, collections.deque[Reduce]] = collections.defaultdict(collections.deque)
        self._done: dict[Hashable, int] = {}
        self._last: dict[Hashable, int] = {}
        self._queues: dict[tuple[int, Reduce], Hashable] = {}

    def post(self, rank: int, reduce: Reduce, before: int) -> int:
        """Post a rank's part of a sum, which takes no time; the first of the group puts it into the group's queue."""
        if not any((member, reduce) in self._posted for member in self._folded.joint(rank, reduce)):
            self._waiting[self._queue_of(rank, reduce)].append(reduce)
        self._posted[rank, reduce] = before
        return before

    def summed(self, rank: int, reduce: Reduce) -> int:
        """Return the piece at whose end a sum is there: all have posted it, and it comes after those before it."""
        group, queue = self._folded.joint(rank, reduce), self._queue_of(rank, reduce)
        while (queue, reduce) not in self._done:
            following = self._waiting[queue].popleft()
            behind = [self._last.get(queue, 0), *(self._posted[member, following] for member in group)]
            seconds = sum_s(self._folded.program, self._folded.costs, following)
            piece = self._pieces.add(tuple(dict.fromkeys(behind)), seconds, (rank, following))
            self._last[queue] = self._done[queue, following] = piece
        return self._done[queue, reduce]

    def _queue_of(self, rank: int, reduce: Reduce) -> Hashable:
        """Name the group of a sum: different groups may have the same ranks standing for them."""
        if (rank, reduce) not in self._queues:
            program = self._folded.program
            ranks = program.joint(rank, reduce)
            first = next(each for each in program.sums(rank) if program.joint(rank, each) == ranks)
            self._queues[rank, reduce] = (self._folded.joint(rank, reduce), first)
        return self._queues[rank, reduce]
