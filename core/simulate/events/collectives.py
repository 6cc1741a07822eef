"""Collectives for buckets as pieces of time, beside what is computed: gathers of weights and sums of gradients.

One begins when all ranks of its group have posted it and the one before it in the group is done.
"""

import collections
from collections.abc import Hashable

from mimogrid.core.schedule.actions import Collective
from mimogrid.core.simulate.events.folded import FoldedProgram
from mimogrid.core.simulate.events.pieces import Pieces
from mimogrid.core.simulate.lower_bound import collective_s


class Collectives:
    """All collectives of a walk."""

    def __init__(self, folded: FoldedProgram, pieces: Pieces) -> None:
        self._folded, self._pieces = folded, pieces
        self._posted: dict[tuple[int, Collective], int] = {}
        self._begun: set[tuple[int, Collective]] = set()
        self._waiting: dict[Hashable, collections.deque[Collective]] = collections.defaultdict(
            collections.deque
        )
        self._done: dict[Hashable, int] = {}
        self._last: dict[Hashable, int] = {}
        self._queues: dict[tuple[int, Collective], Hashable] = {}

    def post(self, rank: int, collective: Collective, before: int) -> int:
        """Post a rank's part, which takes no time. The first rank that posts puts the collective into the queue."""
        begun = self._folded.joint(rank, collective)[0], collective
        if begun not in self._begun:
            self._begun.add(begun)
            self._waiting[self._queue_of(rank, collective)].append(collective)
        self._posted[rank, collective] = before
        return before

    def done(self, rank: int, collective: Collective) -> int:
        """Return the piece that ends a collective: behind all postings and behind those before it in the queue."""
        group, queue = self._folded.joint(rank, collective), self._queue_of(rank, collective)
        while (queue, collective) not in self._done:
            following = self._waiting[queue].popleft()
            behind = [self._last.get(queue, 0), *(self._posted[member, following] for member in group)]
            seconds = collective_s(self._folded.program, self._folded.costs, following)
            piece = self._pieces.add(tuple(dict.fromkeys(behind)), seconds, (rank, following))
            self._last[queue] = self._done[queue, following] = piece
        return self._done[queue, collective]

    def _queue_of(self, rank: int, collective: Collective) -> Hashable:
        """Name the group of a collective. The leaders alone do not: several groups may have the same ones."""
        if (rank, collective) not in self._queues:
            first: dict[tuple[int, ...], Collective] = {}
            program = self._folded.program
            for each in program.collectives(rank):
                named = first.setdefault(program.joint(rank, each), each)
                self._queues[rank, each] = (self._folded.joint(rank, each), named)
        return self._queues[rank, collective]
