"""Graph: the actions of a program as pieces of time, each hung behind what it waits for, along a walk."""

import collections
from collections.abc import Callable, Hashable

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import ReplayRanks, replay_ranks
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Recv,
    Reduce,
    Send,
    Transfer,
    Update,
    Wait,
    WaitReduce,
)
from mimogrid.core.simulate.channels import Channels
from mimogrid.core.simulate.folded import Folded
from mimogrid.core.simulate.lower_bound import update_s
from mimogrid.core.simulate.pieces import Clock, Pieces
from mimogrid.core.simulate.rank_classes import Classes
from mimogrid.core.simulate.rank_timelines import PathSegment, RankTimeline
from mimogrid.core.simulate.sums import Sums
from mimogrid.core.simulate.timeline import Event


class Graph:
    """The pieces of a program, each after those that it hangs behind. Raises ValueError where a rank gets stuck."""

    def __init__(
        self,
        program: Program,
        costs: Costs,
        classes: Classes,
        listing: Listing,
        seconds_of: Callable[[int, Compute], float],
    ) -> None:
        self.pieces = Pieces()
        self._program, self._costs, self._seconds_of = program, costs, seconds_of
        self._folded = Folded(program, costs, classes)
        ranks = ReplayRanks(listing, self._folded.peers, self._folded.peers, self._folded.joint)
        walked = replay_ranks(ranks)
        if walked.blocked:
            stuck = walked.blocked[0]
            raise ValueError(f"rank {stuck.rank} never gets past '{stuck.action}'")
        self._channels = Channels(self._folded, self.pieces, ranks.matching_ops)
        self._sums = Sums(self._folded, self.pieces)
        self._last = dict.fromkeys(listing, 0)
        self._met: dict[Hashable, int] = {}
        self._times: collections.Counter[tuple[int, Action]] = collections.Counter()
        self._placed = [
            (rank, action, self._last[rank], self._place(rank, action)) for rank, action in walked.started
        ]

    def _place(self, rank: int, action: Action) -> int:
        """Return the piece of an action, made if it needs one, and go on behind it."""
        before = self._last[rank]
        match action:
            case Wait(transfer=transfer):
                arrived = dict.fromkeys((before, *self._channels.arrived(rank, transfer)))
                piece = self.pieces.add(tuple(arrived))
            case Send() | Recv():
                piece = self._channels.post(rank, action, before)
            case Reduce():
                piece = self._sums.post(rank, action, before)
            case WaitReduce():
                piece = self.pieces.add((before, self._sums.summed(rank, action.posted)))
            case _:
                piece = self._join(rank, action)
        self._last[rank] = piece
        return piece

    def _join(self, rank: int, action: Action) -> int:
        """Return the one piece for all the ranks of a joint action, made when the walk gets to the first of them."""
        ranks = self._folded.joint(rank, action)
        meeting = (ranks[0], action, self._times[rank, action])
        self._times[rank, action] += 1
        if meeting not in self._met:
            behind = tuple(dict.fromkeys(self._last[member] for member in ranks))
            cores = 0
            match action:
                case Compute():
                    seconds, cores = self._seconds_of(rank, action), len(ranks)
                case Update():
                    seconds = update_s(self._program, self._costs, rank)
                case _:
                    seconds = 0.0
            self._met[meeting] = self.pieces.add(behind, seconds, (rank, action), cores)
        return self._met[meeting]

    def rank_timelines(self, clock: Clock) -> dict[int, RankTimeline]:
        """Return what each rank does when: a wait from when the rank gets there."""
        begins, ends = clock
        events: dict[int, list[Event]] = {rank: [] for rank in self._last}
        for rank, action, before, piece in self._placed:
            waits = isinstance(action, Wait | WaitReduce) or piece == before
            events[rank].append(Event(rank, action, ends[before] if waits else begins[piece], ends[piece]))
        ways: dict[int, dict[Transfer, tuple[tuple[float, float], ...]]] = {rank: {} for rank in self._last}
        for rank, transfer, found in self._channels.ways(ends):
            ways[rank][transfer] = found
        return {rank: RankTimeline(tuple(events[rank]), ways[rank]) for rank in sorted(events)}

    def critical_path(self, clock: Clock) -> tuple[PathSegment, ...]:
        """Follow what each piece waited for longest from the end back to the begin."""
        begins, ends = clock
        piece = max(self._last.values(), key=lambda last: ends[last], default=0)
        segments: list[PathSegment] = []
        while piece:
            label = self.pieces.labels[piece]
            if label and ends[piece] > begins[piece]:
                segments.append(PathSegment(*label, begins[piece], ends[piece]))
            piece = max(self.pieces.behind[piece], key=lambda other: ends[other])
        return tuple(reversed(segments))
