"""Event graph: the actions of a program as pieces of time, each behind what it waits for.

The graph is built along a walk of the program (`replay`), and timed afterwards (`pieces`).
"""

import collections
from collections.abc import Callable, Hashable

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import ReplayRanks, replay_ranks
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Gather,
    Recv,
    Reduce,
    Send,
    Transfer,
    Update,
    Wait,
    WaitCollective,
    WaitGather,
    WaitReduce,
)
from mimogrid.core.simulate.events.channels import Channels
from mimogrid.core.simulate.events.collectives import Collectives
from mimogrid.core.simulate.events.folded import FoldedProgram
from mimogrid.core.simulate.events.pieces import Clock, Pieces
from mimogrid.core.simulate.lower_bound import update_s
from mimogrid.core.simulate.rank_classes import RankClasses
from mimogrid.core.simulate.timeline import Event, Interval, PathSegment, RankTimeline


class EventGraph:
    """The pieces of time of a program. Raises ValueError where a rank never gets past an action."""

    def __init__(
        self,
        program: Program,
        costs: Costs,
        classes: RankClasses,
        listing: Listing,
        seconds_of: Callable[[int, Compute], float],
    ) -> None:
        self.pieces = Pieces()
        self._program, self._costs, self._seconds_of = program, costs, seconds_of
        self._folded = FoldedProgram(program, costs, classes)
        ranks = ReplayRanks(listing, self._folded.peers, self._folded.peers, self._folded.joint)
        walked = replay_ranks(ranks)
        if walked.blocked:
            stuck = walked.blocked[0]
            raise ValueError(f"rank {stuck.rank} never gets past '{stuck.action}'")
        self._channels = Channels(self._folded, self.pieces, ranks.matching_ops)
        self._collectives = Collectives(self._folded, self.pieces)
        self._last = dict.fromkeys(listing, 0)
        self._joint: dict[Hashable, int] = {}
        self._times: collections.Counter[tuple[int, Action]] = collections.Counter()
        self._placed = [
            (rank, action, self._last[rank], self._place(rank, action)) for rank, action in walked.started
        ]

    def _place(self, rank: int, action: Action) -> int:
        """Return the piece of an action, which becomes the last one of its rank; add it if it needs one of its own."""
        before = self._last[rank]
        match action:
            case Wait(transfer=transfer):
                arrivals = dict.fromkeys((before, *self._channels.arrivals(rank, transfer)))
                piece = self.pieces.add(tuple(arrivals))
            case Send() | Recv():
                piece = self._channels.post(rank, action, before)
            case Reduce() | Gather():
                piece = self._collectives.post(rank, action, before)
            case WaitReduce() | WaitGather():
                piece = self.pieces.add((before, self._collectives.done(rank, action.posted)))
            case _:
                piece = self._join(rank, action)
        self._last[rank] = piece
        return piece

    def _join(self, rank: int, action: Action) -> int:
        """Return the one piece of all ranks of a joint action. The first rank that the walk comes to adds it."""
        ranks = self._folded.joint(rank, action)
        key = (ranks[0], action, self._times[rank, action])
        self._times[rank, action] += 1
        if key not in self._joint:
            behind = tuple(dict.fromkeys(self._last[member] for member in ranks))
            cores = 0
            match action:
                case Compute():
                    seconds, cores = self._seconds_of(rank, action), len(ranks)
                case Update():
                    seconds = update_s(self._program, self._costs, rank)
                case _:
                    seconds = 0.0
            self._joint[key] = self.pieces.add(behind, seconds, (rank, action), cores)
        return self._joint[key]

    def rank_timelines(self, clock: Clock) -> dict[int, RankTimeline]:
        """Return what each rank does, and when. A wait begins when the rank comes to it."""
        begins, ends = clock
        events: dict[int, list[Event]] = {rank: [] for rank in self._last}
        for rank, action, before, piece in self._placed:
            waits = isinstance(action, Wait | WaitCollective) or piece == before
            events[rank].append(Event(rank, action, ends[before] if waits else begins[piece], ends[piece]))
        on_the_way: dict[int, dict[Transfer, tuple[Interval, ...]]] = {rank: {} for rank in self._last}
        for rank, transfer, intervals in self._channels.intervals(ends):
            on_the_way[rank][transfer] = intervals
        return {rank: RankTimeline(tuple(events[rank]), on_the_way[rank]) for rank in sorted(events)}

    def critical_path(self, clock: Clock) -> tuple[PathSegment, ...]:
        """Return the critical path: from the end of the step back along the piece that each waited for longest."""
        begins, ends = clock
        piece = max(self._last.values(), key=lambda last: ends[last], default=0)
        segments: list[PathSegment] = []
        while piece:
            label = self.pieces.labels[piece]
            if label and ends[piece] > begins[piece]:
                segments.append(PathSegment(*label, begins[piece], ends[piece]))
            piece = max(self.pieces.behind[piece], key=lambda other: ends[other])
        return tuple(reversed(segments))
