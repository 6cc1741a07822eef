r"""Simulate: the walk of `replay` with a clock.

Replay gives an order in which every action of a program may start. Along it each action is hung behind what
it waits for, which makes a graph of *pieces* of time, and the graph is timed:

    rank 0   F0 --- SEND_F0 .            F1                posting takes no time and does not block
                             \
    channel                   carry --- arrive             bytes / bytes_per_s, in turn; then latency
                             /               \
    rank 1   RECV_F0 -------'                 WAIT --- F0  blocks; joint actions hang behind all ranks

A sum of gradients begins when all who share it have posted it and the one before it in their group is done. It takes
its time beside what they compute.

Without a limit on cores a piece begins when the last of what it hangs behind has ended. With one, compute
actions that run at once share the cores evenly, and the graph is timed from event to event.

One rank of each class walks for all of it (`fold`). Each end of a message keeps its own book of what is on the way:
the peer's postings are those of whoever stands for the peer, and both books come to the same. With a limit on cores
every rank walks, because all of them share the cores.
"""

import collections
import functools
import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.costs import Costs, EdgeCosts
from mimogrid.core.fold import Classes, alone, classes_of
from mimogrid.core.limit import limit_s, sum_s, update_s
from mimogrid.core.pace import Pace
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Recv,
    Reduce,
    Send,
    Transfer,
    Update,
    Wait,
    WaitReduce,
)
from mimogrid.core.schedule.lower import Program, link_of
from mimogrid.core.schedule.program import Listing
from mimogrid.core.schedule.replay import Walkers, walk
from mimogrid.core.schedule.work import seconds_of
from mimogrid.core.thin import thinned
from mimogrid.core.timeline import (
    CAUSES,
    Event,
    Flight,
    Idle,
    busy_s,
    idles_of,
    peak_in_flight,
    sent_as,
)
from mimogrid.core.topology import Link, Stage
from mimogrid.core.traffic import message_bytes


MANY = 512
"""Ranks; of more, those of a lane are timed as one where that is exact."""


@attrs.frozen
class Leg:
    """A part of the critical path: an action, or the way of a message, which is its `Send`, from begin to end."""

    rank: int
    action: Action
    begin_s: float
    end_s: float


@attrs.frozen
class Track:
    """What one rank does when, and when each message of its transfers is on the way, in order of rows."""

    events: tuple[Event, ...]
    on_the_way: Mapping[Transfer, tuple[tuple[float, float], ...]]

    def posted(self) -> dict[Transfer, float]:
        """Return when both ends of the message of each transfer that arrives last had been posted."""
        return {
            transfer: max(ways, key=lambda way: way[::-1])[0]
            for transfer, ways in self.on_the_way.items()
            if ways
        }


@attrs.frozen(eq=False)
class Timeline:
    """A simulated step.

    Attributes:
        program: what was timed.
        classes: which rank stands for which.
        tracks: the track of every rank that stands for others.
        step_s: when the last rank is through.
        limit_s: a lower bound of `step_s` (`limit`).
        critical_path: what the step waited for, from its begin to its end, one leg after the other.
        by_lanes: a rank stands for all of its lane (`thin`), and the messages of each are not known.
    """

    program: Program
    classes: Classes
    tracks: Mapping[int, Track]
    step_s: float
    limit_s: float
    critical_path: tuple[Leg, ...]
    by_lanes: bool = False

    @property
    def ratio_to_limit(self) -> float:
        """How many times longer the step takes than the lower bound; 1 if both are nothing."""
        return self.step_s / self.limit_s if self.limit_s else 1.0

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they compute nothing; ranks without a module do not count."""
        whole = self.step_s * len(self.classes.leader)
        busy = sum(self._busy_s[rank] * len(ranks) for rank, ranks in self.classes.members.items())
        return 1 - busy / whole if whole else 0.0

    @functools.cached_property
    def busy_s(self) -> Mapping[int, float]:
        """Return how long each rank computes."""
        return {rank: self._busy_s[first] for rank, first in self.classes.leader.items()}

    @functools.cached_property
    def idle_s(self) -> Mapping[str, float]:
        """Seconds of idling by cause, summed over ranks."""
        total = dict.fromkeys(CAUSES, 0.0)
        for rank, found in self._idles.items():
            for idle in found:
                total[idle.cause] += (idle.end_s - idle.begin_s) * len(self.classes.members[rank])
        return total

    @functools.cached_property
    def idle_s_by_rank(self) -> Mapping[int, Mapping[str, float]]:
        """Seconds of idling by rank and cause."""
        found: dict[int, dict[str, float]] = {}
        for rank, mine in self._idles.items():
            found[rank] = dict.fromkeys(CAUSES, 0.0)
            for idle in mine:
                found[rank][idle.cause] += idle.end_s - idle.begin_s
        return {rank: found[first] for rank, first in self.classes.leader.items()}

    @functools.cached_property
    def peak_in_flight(self) -> Mapping[Stage, int]:
        """How many microbatches each stage holds at most on any rank."""
        return peak_in_flight(event for track in self.tracks.values() for event in track.events)

    @functools.cached_property
    def events(self) -> tuple[Event, ...]:
        """The events of every rank, in order of its program. In a large world these are many."""
        return tuple(event for rank in self.classes.leader for event in self.events_of(rank))

    @functools.cached_property
    def flights(self) -> tuple[Flight, ...]:
        """Every message on its way."""
        return tuple(
            flight
            for rank in self.classes.leader
            for flight in self.flights_of(rank)
            if flight.rank_source == rank
        )

    @functools.cached_property
    def idles(self) -> tuple[Idle, ...]:
        """When each rank computes nothing, and why."""
        return tuple(
            attrs.evolve(idle, rank=rank)
            for rank, first in self.classes.leader.items()
            for idle in self._idles[first]
        )

    def events_and_flights(
        self, ranks: Iterable[int] | None = None
    ) -> tuple[tuple[Event, ...], tuple[Flight, ...]]:
        """Return what these ranks (default: all) do, and the messages between them and any others."""
        if ranks is None:
            return self.events, self.flights
        chosen = list(ranks)
        events = tuple(event for rank in chosen for event in self.events_of(rank))
        return events, tuple(dict.fromkeys(flight for rank in chosen for flight in self.flights_of(rank)))

    def events_of(self, rank: int) -> tuple[Event, ...]:
        """Return what a rank does when, in order of its program."""
        first = self.classes.leader[rank]
        events = self.tracks[first].events
        if rank == first:
            return events
        return tuple(Event(rank, event.action, event.begin_s, event.end_s) for event in events)

    def flights_of(self, rank: int) -> Iterator[Flight]:
        """Yield the messages that a rank sends and receives, where they are known."""
        if self.by_lanes:
            return
        for transfer, ways in self.tracks[self.classes.leader[rank]].on_the_way.items():
            sends = isinstance(transfer, Send)
            for peer, (begin, end) in zip(self.program.peers_of(rank, transfer), ways, strict=True):
                ends = (rank, peer) if sends else (peer, rank)
                yield Flight(*ends, sent_as(transfer), begin, end)

    @functools.cached_property
    def _busy_s(self) -> Mapping[int, float]:
        return {rank: busy_s(track.events).get(rank, 0.0) for rank, track in self.tracks.items()}

    @functools.cached_property
    def _idles(self) -> Mapping[int, tuple[Idle, ...]]:
        return {
            rank: tuple(idles_of(rank, track.events, track.posted(), whole=(0.0, self.step_s)))
            for rank, track in self.tracks.items()
        }


def simulate(
    program: Program,
    costs: Costs,
    listing: Listing | None = None,
    *,
    pace: Pace | None = None,
    fold: bool = True,
    told: Callable[[Classes], None] | None = None,
) -> Timeline:
    """Time a listing of the program (default: its own). Raises ValueError where it never ends.

    With a `pace`, compute actions take longer or shorter than `costs` say. Without `fold`, every rank walks by itself.
    `told` is who stands for whom before they walk: the more classes there are, the longer that takes.
    """
    ranks = program.topology.ranks
    folds = fold and listing is None and costs.cores is None
    if folds and pace is None and len(ranks) > MANY and (thin := thinned(program, costs)):
        return spread(simulate(thin.program, costs, told=told), program, thin.standing)
    classes = (
        classes_of(program, costs, pace.mark if pace else None) if folds else alone(tuple(listing or ranks))
    )
    if told is not None:
        told(classes)
    lists = {rank: program.of(rank) if listing is None else listing[rank] for rank in classes.members}
    seconds = functools.partial(_seconds, program, costs, pace)
    graph = _Graph(program, costs, classes, lists, seconds)
    clock = _unlimited(graph.pieces) if costs.cores is None else _shared(graph.pieces, costs.cores)
    tracks = graph.tracks(clock)
    return Timeline(
        program=program,
        classes=classes,
        tracks=tracks,
        step_s=max((track.events[-1].end_s for track in tracks.values() if track.events), default=0.0),
        limit_s=limit_s(program, costs, classes, lists, seconds),
        critical_path=graph.critical_path(clock),
    )


def spread(timeline: Timeline, program: Program, standing: Mapping[int, int]) -> Timeline:
    """Return the timeline of a thin program as that of the whole one; `standing` says who stands for each rank."""
    first: dict[int, int] = {}
    for rank, stands in standing.items():
        first[stands] = min(rank, first.get(stands, rank))
    leader = {rank: first[timeline.classes.leader[stands]] for rank, stands in sorted(standing.items())}
    members: dict[int, list[int]] = {rank: [rank] for rank in leader.values()}
    for rank, stands in leader.items():
        members[stands] += [rank] if rank != stands else []
    tracks = {
        first[rank]: Track(
            tuple(Event(first[rank], event.action, event.begin_s, event.end_s) for event in track.events),
            track.on_the_way,
        )
        for rank, track in timeline.tracks.items()
    }
    return Timeline(
        program=program,
        classes=Classes(leader, {rank: tuple(ranks) for rank, ranks in members.items()}),
        tracks=tracks,
        step_s=timeline.step_s,
        limit_s=timeline.limit_s,
        critical_path=tuple(attrs.evolve(leg, rank=first[leg.rank]) for leg in timeline.critical_path),
        by_lanes=True,
    )


def _seconds(program: Program, costs: Costs, pace: Pace | None, rank: int, action: Compute) -> float:
    mean = seconds_of(action, costs)
    if pace is None:
        return mean
    return mean * pace.factor(action, program.topology.modules[action.stage.module].lane_of(rank))


# -- the graph of pieces -----------------------------------------------------------------------------------


Clock = tuple[Sequence[float], Sequence[float]]
"""When each piece begins, and when it ends."""


class _Pieces:
    """Pieces of time, by number: each takes its seconds once all that it hangs behind have ended.

    A compute action uses `cores`. `labels` says whose time a piece is; the first piece is the begin of all.
    """

    def __init__(self) -> None:
        self.behind: list[tuple[int, ...]] = [()]
        self.seconds: list[float] = [0.0]
        self.cores: list[int] = [0]
        self.labels: list[tuple[int, Action] | None] = [None]

    def add(
        self,
        behind: tuple[int, ...],
        seconds: float = 0.0,
        label: tuple[int, Action] | None = None,
        cores: int = 0,
    ) -> int:
        """Add a piece; return its number."""
        if len(behind) == 1 and not seconds and not cores:
            return behind[0]
        self.behind.append(behind)
        self.seconds.append(seconds)
        self.cores.append(cores)
        self.labels.append(label)
        return len(self.behind) - 1


class _Mail:
    """One end of the messages of a transfer: the peers with what each is sent, and the pieces of their ways."""

    __slots__ = ("arrived", "edge", "parcels", "post", "posted")

    def __init__(self, edge: EdgeCosts, parcels: tuple[tuple[int, int], ...], post: int) -> None:
        self.edge = edge
        self.parcels = parcels
        self.post = post
        self.posted: list[int] = [-1] * len(parcels)
        self.arrived: list[int] = [-1] * len(parcels)


class _Graph:
    """The pieces of a program, each after those that it hangs behind."""

    def __init__(
        self,
        program: Program,
        costs: Costs,
        classes: Classes,
        listing: Listing,
        seconds_of: Callable[[int, Compute], float],
    ) -> None:
        self.program, self.costs, self.classes, self.seconds_of = program, costs, classes, seconds_of
        self.pieces = _Pieces()
        self._parcels: dict[tuple[int, Link, bool, int], tuple[tuple[int, int], ...]] = {}
        self._links: dict[tuple[Stage, Stage], tuple[Link, EdgeCosts]] = {}
        self._joint: dict[Hashable, tuple[int, ...]] = {}
        walkers = Walkers(listing, self._peers_of, self._peers_of, self._joint_of)
        self._twins = walkers.twins
        walked = walk(walkers)
        if walked.blocked:
            stuck = walked.blocked[0]
            raise ValueError(f"rank {stuck.rank} never gets past '{stuck.action}'")
        self._last = dict.fromkeys(listing, 0)
        self._mail: dict[tuple[int, Transfer], _Mail] = {}
        self._sent: dict[Hashable, collections.deque[tuple[Transfer, int]]] = collections.defaultdict(
            collections.deque
        )
        self._channel: dict[Hashable, int] = {}
        self._sums: dict[tuple[int, Reduce], int] = {}
        self._unsummed: dict[Hashable, collections.deque[Reduce]] = collections.defaultdict(collections.deque)
        self._queues: dict[tuple[int, Reduce], Hashable] = {}
        self._met: dict[Hashable, int] = {}
        self._times: collections.Counter[tuple[int, Action]] = collections.Counter()
        self._placed = [
            (rank, action, self._last[rank], self._place(rank, action)) for rank, action in walked.started
        ]

    def tracks(self, clock: Clock) -> dict[int, Track]:
        """Return what each rank does when: a wait from when the rank gets there."""
        begins, ends = clock
        events: dict[int, list[Event]] = {rank: [] for rank in self._last}
        for rank, action, before, piece in self._placed:
            waits = isinstance(action, Wait | WaitReduce) or piece == before
            events[rank].append(Event(rank, action, ends[before] if waits else begins[piece], ends[piece]))
        ways: dict[int, dict[Transfer, tuple[tuple[float, float], ...]]] = {rank: {} for rank in self._last}
        for (rank, transfer), mail in self._mail.items():
            if -1 not in mail.arrived:
                both = zip(mail.posted, mail.arrived, strict=True)
                ways[rank][transfer] = tuple(
                    (max(ends[mail.post], ends[other]), ends[there]) for other, there in both
                )
        return {rank: Track(tuple(events[rank]), ways[rank]) for rank in sorted(events)}

    def critical_path(self, clock: Clock) -> tuple[Leg, ...]:
        """Follow what each piece waited for longest from the end back to the begin."""
        begins, ends = clock
        piece = max(self._last.values(), key=lambda last: ends[last], default=0)
        legs: list[Leg] = []
        while piece:
            label = self.pieces.labels[piece]
            if label and ends[piece] > begins[piece]:
                legs.append(Leg(*label, begins[piece], ends[piece]))
            piece = max(self.pieces.behind[piece], key=lambda other: ends[other])
        return tuple(reversed(legs))

    def _peers_of(self, rank: int, transfer: Transfer) -> tuple[int, ...]:
        """Who stands for the ranks at the other ends of a transfer."""
        leader = self.classes.leader
        return tuple(dict.fromkeys([leader[peer] for peer, _ in self._parcels_of(rank, transfer)]))

    def _parcels_of(self, rank: int, transfer: Transfer) -> tuple[tuple[int, int], ...]:
        """The ranks at the other ends of a transfer, with the bytes for each; alike in microbatches that are alike."""
        link, _ = self._on(transfer)
        key = rank, link, transfer.at_source, self.program.routes.first(link, transfer.microbatch)
        if key not in self._parcels:
            step, at_source = self.program.routes.step, transfer.at_source
            self._parcels[key] = tuple(
                (message.rank_target if at_source else message.rank_source, message_bytes(step, message))
                for message in self.program.messages_of(rank, transfer)
            )
        return self._parcels[key]

    def _joint_of(self, rank: int, action: Action) -> tuple[int, ...]:
        """Who stands for those that start an action together; the same in every microbatch."""
        key = rank, type(action), getattr(action, "stage", None), getattr(action, "bucket", None)
        if key not in self._joint:
            self._joint[key] = self.classes.met(self.program.joint(rank, action))
        return self._joint[key]

    def _on(self, transfer: Transfer) -> tuple[Link, EdgeCosts]:
        """The link that a transfer is on, and its costs."""
        ends = transfer.stage, transfer.peer
        if ends not in self._links:
            link = link_of(self.program.topology, transfer)
            self._links[ends] = link, self.costs.on(link, link.edge)
        return self._links[ends]

    def _place(self, rank: int, action: Action) -> int:
        """Make the piece of an action."""
        before = self._last[rank]
        match action:
            case Wait(transfer=transfer):
                arrived = dict.fromkeys((before, *self._arrived(rank, transfer)))
                piece = self.pieces.add(tuple(arrived))
            case Send() | Recv():
                piece = self._post(rank, action, before)
            case Reduce():
                piece = self._post_sum(rank, action, before)
            case WaitReduce():
                piece = self.pieces.add((before, self._summed(rank, action.posted)))
            case _:
                piece = self._join(rank, action)
        self._last[rank] = piece
        return piece

    def _join(self, rank: int, action: Action) -> int:
        """One piece for all the ranks of a joint action, made when the walk gets to the first of them."""
        ranks = self._joint_of(rank, action)
        meeting = (ranks[0], action, self._times[rank, action])
        self._times[rank, action] += 1
        if meeting not in self._met:
            behind = tuple(dict.fromkeys(self._last[member] for member in ranks))
            cores = 0
            match action:
                case Compute():
                    seconds, cores = self.seconds_of(rank, action), len(ranks)
                case Update():
                    seconds = update_s(self.program, self.costs, rank)
                case _:
                    seconds = 0.0
            self._met[meeting] = self.pieces.add(behind, seconds, (rank, action), cores)
        return self._met[meeting]

    def _post_sum(self, rank: int, reduce: Reduce, before: int) -> int:
        """Post a rank's part of a sum; the first of the group puts it into the group's queue."""
        if not any((member, reduce) in self._sums for member in self._joint_of(rank, reduce)):
            self._unsummed[self._queue_of(rank, reduce)].append(reduce)
        self._sums[rank, reduce] = before
        return before

    def _summed(self, rank: int, reduce: Reduce) -> int:
        """Return the piece at whose end a sum is there: all have posted it, and it comes after those before it."""
        group, queue = self._joint_of(rank, reduce), self._queue_of(rank, reduce)
        while (queue, reduce) not in self._met:
            following = self._unsummed[queue].popleft()
            behind = [self._channel.get(queue, 0), *(self._sums[member, following] for member in group)]
            seconds = sum_s(self.program, self.costs, following)
            piece = self.pieces.add(tuple(dict.fromkeys(behind)), seconds, (rank, following))
            self._channel[queue] = self._met[queue, following] = piece
        return self._met[queue, reduce]

    def _queue_of(self, rank: int, reduce: Reduce) -> Hashable:
        """Name the group of a sum: different groups may have the same ranks standing for them."""
        if (rank, reduce) not in self._queues:
            ranks = self.program.joint(rank, reduce)
            first = next(sum_ for sum_ in self.program.sums(rank) if self.program.joint(rank, sum_) == ranks)
            self._queues[rank, reduce] = (self._joint_of(rank, reduce), first)
        return self._queues[rank, reduce]

    def _post(self, rank: int, transfer: Transfer, before: int) -> int:
        """Post one end of each message."""
        sends, parcels = isinstance(transfer, Send), self._parcels_of(rank, transfer)
        _, edge = self._on(transfer)
        holds_up = sends and not edge.overlap
        took = sum(edge.carry_s(size) + edge.latency for _, size in parcels if size) if holds_up else 0.0
        post = self.pieces.add((before,), took, (rank, transfer))
        self._mail[rank, transfer] = _Mail(edge, parcels, post)
        if edge.overlap:
            for i, (peer, size) in enumerate(parcels):
                if size:
                    self._sent[rank, peer, sends, transfer.direction].append((transfer, i))
        return post

    def _arrived(self, rank: int, transfer: Transfer) -> list[int]:
        """Return the pieces at whose end the messages of a transfer are there, both ends being posted."""
        mail, sends = self._mail[rank, transfer], isinstance(transfer, Send)
        for i, (peer, size) in enumerate(mail.parcels):
            if size and mail.edge.overlap:
                channel = (rank, peer, sends, transfer.direction)
                while mail.arrived[i] < 0:
                    self._carry(channel, *self._sent[channel].popleft())
            elif mail.arrived[i] < 0:
                mail.posted[i] = self._other_post(peer, transfer)
                mail.arrived[i] = self.pieces.add(tuple(dict.fromkeys((mail.post, mail.posted[i]))))
        return mail.arrived

    def _carry(self, channel: tuple[int, int, bool, Direction], transfer: Transfer, i: int) -> None:
        """Send the next message of a channel on its way: it is carried after the one before it, and then arrives."""
        rank, peer, sends, _ = channel
        mail = self._mail[rank, transfer]
        mail.posted[i] = self._other_post(peer, transfer)
        behind = dict.fromkeys((mail.post, mail.posted[i], self._channel.get(channel, 0)))
        label = (rank, transfer) if sends else (peer, sent_as(transfer))
        carried = self.pieces.add(tuple(behind), mail.edge.carry_s(mail.parcels[i][1]), label)
        self._channel[channel] = carried
        mail.arrived[i] = self.pieces.add((carried,), mail.edge.latency, label)

    def _other_post(self, peer: int, transfer: Transfer) -> int:
        return self._mail[self.classes.leader[peer], self._twins[transfer]].post


# -- the clock ---------------------------------------------------------------------------------------------


def _unlimited(pieces: _Pieces) -> Clock:
    """Return when each piece begins and ends if nothing holds it up but what it hangs behind."""
    begins: list[float] = []
    ends: list[float] = []
    for behind, seconds in zip(pieces.behind, pieces.seconds, strict=True):
        begin = max([ends[other] for other in behind], default=0.0)
        begins.append(begin)
        ends.append(begin + seconds)
    return begins, ends


def _shared(pieces: _Pieces, cores: float) -> Clock:
    """Return when each piece begins and ends if those that compute share some cores evenly.

    All who compute go at one speed, so *progress*, the seconds of work that each has been given so far, is
    one number for all: whoever begins at progress p with work w ends at p + w.
    """
    count = len(pieces.behind)
    after: list[list[int]] = [[] for _ in range(count)]
    missing = [len(behind) for behind in pieces.behind]
    for i, behind in enumerate(pieces.behind):
        for other in behind:
            after[other].append(i)
    begins, ends = [0.0] * count, [0.0] * count
    timed = [(0.0, 0)]
    computing: list[tuple[float, int]] = []
    now = progress = 0.0
    used = 0
    while timed or computing:
        speed = min(1.0, cores / used) if used else 1.0
        through = now + (computing[0][0] - progress) / speed if computing else None
        if through is not None and (not timed or through <= timed[0][0]):
            work, i = heapq.heappop(computing)
            now, progress = max(now, through), max(progress, work)
            used -= pieces.cores[i]
        else:
            until, i = heapq.heappop(timed)
            progress += (until - now) * speed
            now = until
        ends[i] = now
        for following in after[i]:
            missing[following] -= 1
            if not missing[following]:
                begins[following] = now
                if pieces.cores[following]:
                    used += pieces.cores[following]
                    heapq.heappush(computing, (progress + pieces.seconds[following], following))
                else:
                    heapq.heappush(timed, (now + pieces.seconds[following], following))
    return begins, ends
