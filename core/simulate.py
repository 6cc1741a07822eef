"""Simulate: the walk of `replay` with a clock.

Replay gives an order in which every action of a program may start. Along it each action is hung behind what
it waits for, which makes a graph of *pieces* of time, and the graph is timed:

    rank 0   F0 --- SEND_F0 .            F1                posting takes no time and does not block
                             \
    channel                   carry --- arrive             bytes / bytes_per_s, in turn; then latency
                             /               \
    rank 1   RECV_F0 -------'                 WAIT --- F0  blocks; joint actions hang behind all ranks

Without a limit on cores a piece begins when the last of what it hangs behind has ended. With one, compute
actions that run at once share the cores evenly, and the graph is timed from event to event.

`limit_s` is what no order could beat on these grids: on any rank, the shortest way in to any of a set of its
compute actions, plus their work, plus the shortest way out, where ways follow the data alone. For equal
stages on a chain this is (M + P - 1)(f + b), which 1F1B and GPipe reach.
"""

import collections
import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.costs import Costs
from mimogrid.core.routes import Message
from mimogrid.core.schedule.actions import Action, Compute, Kind, Recv, Send, Transfer, Wait
from mimogrid.core.schedule.lower import Program, link_of
from mimogrid.core.schedule.program import Listing
from mimogrid.core.schedule.replay import postings, replay
from mimogrid.core.timeline import Event, Flight, Idle, busy_s, idle_s, idles, peak_in_flight, sent_as
from mimogrid.core.topology import Stage
from mimogrid.core.traffic import VALUE_BYTES


@attrs.frozen
class Timeline:
    """A simulated step: the events of every rank in order of its program, and what they come to."""

    events: tuple[Event, ...]
    flights: tuple[Flight, ...]
    step_s: float
    limit_s: float
    busy_s: Mapping[int, float]
    idles: tuple[Idle, ...]
    peak_in_flight: Mapping[Stage, int]

    @property
    def ratio_to_limit(self) -> float:
        """How many times longer the step takes than the lower bound; 1 if both are nothing."""
        return self.step_s / self.limit_s if self.limit_s else 1.0

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they compute nothing; ranks without a module do not count."""
        whole = self.step_s * len(self.busy_s)
        return 1 - sum(self.busy_s.values()) / whole if whole else 0.0

    @property
    def idle_s(self) -> Mapping[str, float]:
        """Seconds of idling by cause, summed over ranks."""
        return idle_s(self.idles)


def simulate(program: Program, costs: Costs, listing: Listing | None = None) -> Timeline:
    """Time a listing of the program (default: its own). Raises ValueError where it never ends."""
    if listing is None:
        listing = {rank: program.of(rank) for rank in program.topology.ranks}
    graph = _Graph(program, costs, listing)
    clock = _unlimited(graph.pieces) if costs.cores is None else _shared(graph.pieces, costs.cores)
    events = tuple(graph.events(clock))
    flights = tuple(
        Flight(source, target, transfer, clock[posted][0], clock[arrived][1])
        for source, target, transfer, posted, arrived in graph.flights
    )
    return Timeline(
        events=events,
        flights=flights,
        step_s=max((event.end_s for event in events), default=0.0),
        limit_s=limit_s(program, costs, listing),
        busy_s=dict.fromkeys(listing, 0.0) | busy_s(events),
        idles=idles(events, flights),
        peak_in_flight=peak_in_flight(events),
    )


def compute_s(action: Compute, costs: Costs) -> float:
    """Return how long a compute action takes."""
    of_stage = costs.of(action.stage)
    match action.kind:
        case Kind.FORWARD:
            return of_stage.forward
        case Kind.BACKWARD:
            return of_stage.whole_backward
        case Kind.INPUT_GRADIENT:
            return of_stage.input_gradient or 0.0
        case Kind.WEIGHT_GRADIENT:
            return of_stage.weight_gradient or 0.0


def message_bytes(program: Program, message: Message) -> int:
    """Return how large a message is, one way; nothing where it stays on its rank."""
    if message.rank_source == message.rank_target:
        return 0
    topology, step = program.topology, program.routes.step
    value = VALUE_BYTES[topology.spec.precision]
    if message.link.edge:
        return message.rows * message.link.edge.width * value
    positions, samples, hidden = step.hop_shape(message.link.target, message.lane, message.microbatch)
    return positions * samples * hidden * value


# -- the graph of pieces -----------------------------------------------------------------------------------


@attrs.frozen
class _Piece:
    """It takes `seconds` once all that it hangs `behind` have ended; a compute action uses `cores`."""

    behind: tuple[int, ...]
    seconds: float = 0.0
    cores: int = 0


class _Graph:
    """The pieces of a program, each after those that it hangs behind."""

    def __init__(self, program: Program, costs: Costs, listing: Listing) -> None:
        self.program = program
        self.costs = costs
        self.pieces: list[_Piece] = [_Piece(())]
        self.flights: list[tuple[int, int, Send, int, int]] = []
        self._walk = replay(program, listing)
        if self._walk.blocked:
            stuck = self._walk.blocked[0]
            raise ValueError(f"rank {stuck.rank} never gets past '{stuck.action}'")
        self._last = dict.fromkeys(listing, 0)
        self._posted: dict[Hashable, int] = {}
        self._arrived: dict[Hashable, int] = {}
        self._channel: dict[Hashable, int] = {}
        self._met: dict[Hashable, int] = {}
        self._times: collections.Counter[tuple[int, Action]] = collections.Counter()
        self._bytes: dict[Message, int] = {}
        self._placed = [self._place(rank, action) for rank, action in self._walk.started]

    def events(self, clock: Sequence[tuple[float, float]]) -> Iterator[Event]:
        """Yield what each rank does when, rank by rank: a wait from when the rank gets there."""
        of_rank: dict[int, list[Event]] = {rank: [] for rank in self._last}
        for (rank, action), (before, piece) in zip(self._walk.started, self._placed, strict=True):
            begin, end = clock[piece]
            waits = isinstance(action, Wait)
            of_rank[rank].append(Event(rank, action, clock[before][1] if waits else begin, end))
        for rank in sorted(of_rank):
            yield from of_rank[rank]

    def _place(self, rank: int, action: Action) -> tuple[int, int]:
        """Make the piece of an action; return the rank's piece before it, and it."""
        before = self._last[rank]
        match action:
            case Wait(transfer=transfer):
                arrived = {self._arrived[_pair(m, t)] for m, t in postings(self.program, rank, transfer)}
                piece = self._add(_Piece((before, *sorted(arrived))))
            case Send() | Recv():
                piece = self._post(rank, action, before)
            case _:
                piece = self._join(rank, action)
        self._last[rank] = piece
        return before, piece

    def _add(self, piece: _Piece) -> int:
        self.pieces.append(piece)
        return len(self.pieces) - 1

    def _join(self, rank: int, action: Action) -> int:
        """One piece for all the ranks of a joint action, made when the walk gets to the first of them."""
        ranks = self.program.joint(rank, action)
        meeting = (ranks[0], action, self._times[rank, action])
        self._times[rank, action] += 1
        if meeting not in self._met:
            seconds = compute_s(action, self.costs) if isinstance(action, Compute) else 0.0
            behind = tuple(dict.fromkeys(self._last[member] for member in ranks))
            cores = len(ranks) if isinstance(action, Compute) else 0
            self._met[meeting] = self._add(_Piece(behind, seconds, cores))
        return self._met[meeting]

    def _post(self, rank: int, transfer: Transfer, before: int) -> int:
        """Post one end of each message; the end that is posted second sets it on its way."""
        link = link_of(self.program.topology, transfer)
        edge = self.costs.on(link, link.edge)
        sizes = [self._size(message) for message in self.program.messages_of(rank, transfer)]
        holds_up = isinstance(transfer, Send) and not edge.overlap
        took = sum(edge.carry_s(size) + edge.latency for size in sizes if size) if holds_up else 0.0
        post = self._add(_Piece((before,), took))
        for size, (mine, theirs) in zip(sizes, postings(self.program, rank, transfer), strict=True):
            self._posted[mine, isinstance(transfer, Send)] = post
            other = self._posted.get((theirs, not isinstance(transfer, Send)))
            if other is None:
                continue
            pair = _pair(mine, theirs)
            ends = (mine.by, mine.other) if isinstance(transfer, Send) else (mine.other, mine.by)
            posted = carried = arrived = self._add(_Piece((post, other)))
            if size and edge.overlap:
                channel = (*ends, transfer.direction)
                behind = (posted, self._channel.get(channel, 0))
                carried = self._add(_Piece(behind, edge.carry_s(size)))
                arrived = self._add(_Piece((carried,), edge.latency))
                self._channel[channel] = carried
            self._arrived[pair] = arrived
            self.flights.append((*ends, sent_as(transfer), posted, arrived))
        return post

    def _size(self, message: Message) -> int:
        if message not in self._bytes:
            self._bytes[message] = message_bytes(self.program, message)
        return self._bytes[message]


def _pair(mine: object, theirs: object) -> frozenset[object]:
    """Both ends of a message, whoever asks."""
    return frozenset((mine, theirs))


# -- the clock ---------------------------------------------------------------------------------------------


def _unlimited(pieces: Sequence[_Piece]) -> list[tuple[float, float]]:
    """Return when each piece begins and ends if nothing holds it up but what it hangs behind."""
    clock: list[tuple[float, float]] = []
    for piece in pieces:
        begin = max((clock[other][1] for other in piece.behind), default=0.0)
        clock.append((begin, begin + piece.seconds))
    return clock


def _shared(pieces: Sequence[_Piece], cores: float) -> list[tuple[float, float]]:
    """Return when each piece begins and ends if those that compute share some cores evenly.

    All who compute go at one speed, so *progress*, the seconds of work that each has been given so far, is
    one number for all: whoever begins at progress p with work w ends at p + w.
    """
    after: list[list[int]] = [[] for _ in pieces]
    missing = [len(piece.behind) for piece in pieces]
    for i, piece in enumerate(pieces):
        for other in piece.behind:
            after[other].append(i)
    clock = [(0.0, 0.0)] * len(pieces)
    timed = [(piece.seconds, i) for i, piece in enumerate(pieces) if not piece.behind]
    heapq.heapify(timed)
    computing: list[tuple[float, int]] = []
    now = progress = 0.0
    used = 0
    while timed or computing:
        speed = min(1.0, cores / used) if used else 1.0
        ends = now + (computing[0][0] - progress) / speed if computing else None
        if ends is not None and (not timed or ends <= timed[0][0]):
            work, i = heapq.heappop(computing)
            now, progress = max(now, ends), max(progress, work)
            used -= pieces[i].cores
        else:
            until, i = heapq.heappop(timed)
            progress += (until - now) * speed
            now = until
        clock[i] = (clock[i][0], now)
        for following in after[i]:
            missing[following] -= 1
            if not missing[following]:
                piece = pieces[following]
                clock[following] = (now, now)
                if piece.cores:
                    used += piece.cores
                    heapq.heappush(computing, (progress + piece.seconds, following))
                else:
                    heapq.heappush(timed, (now + piece.seconds, following))
    return clock


# -- the lower bound ---------------------------------------------------------------------------------------


Node = tuple[int, Compute]
"""A compute action by the first of the ranks that share it."""


def limit_s(program: Program, costs: Costs, listing: Listing | None = None) -> float:
    """Return a time that no order of the same compute actions could beat, whatever may be in flight.

    The formulas for the slowest stage (all its work; all its forwards, then the way down and back; the way
    down and back, then all its backwards) are this one bound over three sets of actions. Sets of a stage and
    sets of all stages of a rank are tried.
    """
    if listing is None:
        listing = {rank: program.of(rank) for rank in program.topology.ranks}
    ranks_of = {
        (ranks[0], action): ranks
        for rank, actions in listing.items()
        for action in actions
        if isinstance(action, Compute) and (ranks := program.joint(rank, action))[0] == rank
    }
    seconds = {node: compute_s(node[1], costs) for node in ranks_of}
    before = _data(program, costs, ranks_of)
    order = _in_order(before)
    heads = dict.fromkeys(order, 0.0)
    tails = dict.fromkeys(order, 0.0)
    for node in order:
        for other, on_the_way in before[node]:
            heads[node] = max(heads[node], heads[other] + seconds[other] + on_the_way)
    for node in reversed(order):
        for other, on_the_way in before[node]:
            tails[other] = max(tails[other], tails[node] + seconds[node] + on_the_way)
    sets: dict[Hashable, list[Node]] = collections.defaultdict(list)
    for node, ranks in ranks_of.items():
        forward = node[1].kind is Kind.FORWARD
        for rank in ranks:
            for key in ((rank,), (rank, forward), (rank, node[1].stage), (rank, node[1].stage, forward)):
                sets[key].append(node)
    bounds = [
        min(heads[n] for n in nodes) + sum(seconds[n] for n in nodes) + min(tails[n] for n in nodes)
        for nodes in sets.values()
    ]
    if costs.cores is not None:
        bounds.append(sum(seconds[node] * len(ranks) for node, ranks in ranks_of.items()) / costs.cores)
    return max(bounds, default=0.0)


def _data(
    program: Program, costs: Costs, ranks_of: Mapping[Node, tuple[int, ...]]
) -> dict[Node, list[tuple[Node, float]]]:
    """Return, per compute action, those whose results it needs, and how long these are on the way."""
    topology = program.topology
    before: dict[Node, list[tuple[Node, float]]] = {node: [] for node in ranks_of}
    at = {(rank, node[1]): node for node, ranks in ranks_of.items() for rank in ranks}

    def needs(rank: int, action: Compute, other_rank: int, other: Compute, on_the_way: float) -> None:
        if (rank, action) in at and (other_rank, other) in at:
            before[at[rank, action]].append((at[other_rank, other], on_the_way))

    for rank, action in before:
        own = (action.stage, action.microbatch)
        if action.kind is Kind.WEIGHT_GRADIENT:
            needs(rank, action, rank, Compute(Kind.INPUT_GRADIENT, *own), 0.0)
        elif action.kind is not Kind.FORWARD:
            needs(rank, action, rank, Compute(Kind.FORWARD, *own), 0.0)
    for link in topology.links:
        edge = costs.on(link, link.edge)
        for k in range(topology.modules[link.target.module].microbatches):
            for message in program.routes.messages(link, k):
                source, target = message.rank_source, message.rank_target
                size = message_bytes(program, message)
                on_the_way = edge.latency + edge.carry_s(size) if size else 0.0
                for made in message.made_by:
                    there, here = (
                        Compute(Kind.FORWARD, link.target, k),
                        Compute(Kind.FORWARD, link.source, made),
                    )
                    needs(target, there, source, here, on_the_way)
                    if link in program.order.gradients:
                        for back in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
                            for given in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
                                to, of = Compute(back, link.source, made), Compute(given, link.target, k)
                                needs(source, to, target, of, on_the_way)
    return before


def _in_order(before: Mapping[Node, Sequence[tuple[Node, float]]]) -> list[Node]:
    """Return the nodes so that each comes after those that it needs."""
    missing = {node: len(others) for node, others in before.items()}
    after: dict[Node, list[Node]] = collections.defaultdict(list)
    for node, others in before.items():
        for other, _ in others:
            after[other].append(node)
    order = [node for node, count in missing.items() if not count]
    for node in order:
        for following in after[node]:
            missing[following] -= 1
            if not missing[following]:
                order.append(following)
    return order
