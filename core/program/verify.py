"""Verify: whether a program does all of its work, in an order that cannot deadlock or mix up data.

A listing is judged against the step that it is for, not against how it was made. It must hold

- every forward of every active microbatch once, and its backward where due: whole, or the gradient of the
  inputs and then that of the weights, one way or the other for a whole stage;
- every message posted once by each end, waited for once by each end after that, and on every pair of ranks
  received in the order in which it is sent;
- data before it is read: a receive is waited for before the compute action that needs it, a send is posted
  after the one that makes it;
- each sum of gradients posted once, after the last gradient of its stage, and waited for; agreement and update
  once, after that;
- what a group does together at one place on all its ranks: communicators match calls by their order;
- no more in flight than the order's limits in flight: a microbatch is, on a stage, from its forward to the end of its
  backward; where there is none, its output is until every send of it has been waited for. That is so when
  training and when evaluating: without a bound, a fast encoder would fill the memory in both;
- an end: the walk of `replay`, in which nothing buffers and joint actions wait for all their ranks, gets
there.

It may also be asked for the `strict` walk, in which every pair of ranks has one queue for both directions. That
is not due: the channels of a job are one per direction. What passes there, too, needs half as many.

Ranks are *alike* if they owe the same and have equal lists. What is judged of one of them holds for all: the
judgement reads nothing else. And they walk in step, as one. Who walks in step waits for more than who walks
alone, so a walk that gets through is proof (see `replay`). One that gets stuck is none; then every rank
walks by itself, and that walk decides. So `verify` says of every listing what `verify_each` says, which
folds nothing.

Walking in step gets through for what `lower` makes: its order came of doing one compute action after the
other, each on all the dp ranks that have it, and that is a walk in step. So a world of a thousand ranks costs
no more than its different lists do.
"""

import bisect
import collections
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import Blocked, Walkers, alone, in_step, walk
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Kind,
    Recv,
    Reduce,
    Send,
    Transfer,
    Wait,
    WaitReduce,
)
from mimogrid.core.step.routes import Message
from mimogrid.core.topology.topology import Link, Stage, Topology


def listing_of(program: Program) -> Listing:
    """Return the whole program, lowered for every rank that hosts a module."""
    return {rank: program.of(rank) for rank in program.topology.ranks}


def verify(program: Program, listing: Listing | None = None, *, strict: bool = False) -> tuple[str, ...]:
    """Return what is wrong with a listing of the program (or its own), in words; nothing: it is sound.

    A `strict` verdict also asks that it gets through with one serial queue per pair of ranks.
    """
    whole = _complete(program, listing)
    return tuple(_faults(program, whole, _alike(program, whole), strict=strict))


def verify_each(program: Program, listing: Listing | None = None, *, strict: bool = False) -> tuple[str, ...]:
    """Return what `verify` returns, with every rank judged and walking by itself."""
    whole = _complete(program, listing)
    each = [(_duties(program, rank), (rank,)) for rank in program.topology.ranks]
    return tuple(_faults(program, whole, each, strict=strict))


def in_flight(program: Program, listing: Listing | None = None) -> Mapping[Stage, int]:
    """Return how many microbatches a stage has in flight at most on any rank, as its limit in flight counts them.

    The listing must be sound. A stage that keeps nothing for anybody has none in flight.
    """
    whole = _complete(program, listing)
    alike = _alike(program, whole)
    judge = _Judge(program, (whole[ranks[0]] for _, ranks in alike))
    peaks = dict.fromkeys(program.topology.stages, 0)
    for duties, ranks in alike:
        for stage, _, count in judge.flights(duties, whole[ranks[0]]):
            peaks[stage] = max(peaks[stage], count)
    return peaks


def _complete(program: Program, listing: Listing | None) -> dict[int, tuple[Action, ...]]:
    given = listing_of(program) if listing is None else listing
    hosts = program.topology.ranks
    return {rank: tuple(given.get(rank, ())) for rank in dict.fromkeys((*hosts, *given))}


_Alike = Sequence[tuple["_Duties", Sequence[int]]]


def _alike(program: Program, listing: Listing) -> _Alike:
    """Return the sets of ranks that owe the same and have equal lists."""
    alike: dict[tuple[_Duties, tuple[Action, ...]], list[int]] = collections.defaultdict(list)
    for rank in program.topology.ranks:
        alike[_duties(program, rank), listing[rank]].append(rank)
    return [(duties, ranks) for (duties, _), ranks in alike.items()]


def _faults(program: Program, listing: Listing, alike: _Alike, *, strict: bool) -> Iterator[str]:
    judge = _Judge(program, (listing[ranks[0]] for _, ranks in alike))
    found = [(rank, f"rank {rank} hosts no module but has actions") for rank in _idlers(program, listing)]
    for duties, ranks in alike:
        faults = tuple(judge.faults(duties, listing[ranks[0]]))
        found += [(rank, f"rank {rank}: {fault}") for rank in ranks for fault in faults]
    if found:
        yield from (fault for _, fault in sorted(found, key=operator.itemgetter(0)))
        return
    sound_in_step = len(alike) < len(listing) and not any(
        _together(in_step(program, listing, [ranks for _, ranks in alike], strict=strict))
    )
    stuck = () if sound_in_step else tuple(_together(alone(program, listing, strict=strict)))
    yield from stuck or _mixed(program, listing, alike)


def _mixed(program: Program, listing: Listing, alike: _Alike) -> Iterator[str]:
    """Find groups whose ranks post a sum at different places among what else they do together.

    That is: sums over the same ranks, and compute actions that all of them join, whose collectives may use the same
    communicator.
    """
    first = {rank: ranks[0] for _, ranks in alike for rank in ranks}

    @functools.cache
    def calls(leader: int, sums: frozenset[Reduce], stages: frozenset[Stage]) -> tuple[Action, ...]:
        """The actions of a rank that are of some sums, or compute on some stages."""
        return tuple(
            action
            for action in listing[leader]
            if action in sums or (isinstance(action, Compute) and action.stage in stages)
        )

    found: dict[tuple[int, ...], tuple[int, tuple[Action, ...]]] = {}
    for rank, leader in sorted(first.items()):
        sums = {reduce: program.joint(rank, reduce) for reduce in program.sums(rank)}
        stages = [info.stage for info in program.topology.role(rank).stages]
        joined = {stage: set(program.joint(rank, Compute(Kind.FORWARD, stage, 0))) for stage in stages}
        for group in dict.fromkeys(sums.values()):
            own = frozenset(reduce for reduce, ranks in sums.items() if ranks == group)
            mine = calls(leader, own, frozenset(stage for stage in stages if joined[stage].issuperset(group)))
            other, theirs = found.setdefault(group, (rank, mine))
            if mine != theirs:
                pairs = itertools.zip_longest(mine, theirs)
                here, there = next((a, b) for a, b in pairs if a != b)
                yield (
                    f"rank {rank} comes to '{here}' when rank {other} comes to '{there}': a communicator of both "
                    "would mix them up"
                )


def _idlers(program: Program, listing: Listing) -> Iterator[int]:
    """The ranks that host no module and have something to do all the same."""
    return (rank for rank in listing if listing[rank] and not program.topology.role(rank).stages)


# -- one rank ----------------------------------------------------------------------------------------------


@attrs.frozen(cache_hash=True)
class _Duties:
    """All that a step asks of a rank.

    Attributes:
        stages: its stages, with the microbatches that it computes.
        arrivals: the links into them, with the microbatches (of the link's target) that bring it anything.
        departures: the links out of them, likewise, each microbatch with those of its own that make the data.
        sums: the sums of gradients that it has a part in.
        finish: the actions that end the step.
    """

    stages: tuple[tuple[Stage, frozenset[int]], ...]
    arrivals: tuple[tuple[Link, tuple[int, ...]], ...]
    departures: tuple[tuple[Link, tuple[tuple[int, tuple[int, ...]], ...]], ...]
    sums: tuple[Reduce, ...]
    finish: tuple[Action, ...]


def _duties(program: Program, rank: int) -> _Duties:
    topology, routes = program.topology, program.routes
    stages = topology.role(rank).stages
    dp_ranks = {info.stage: topology.modules[info.stage.module].dp_rank_of(rank) for info in stages}
    return _Duties(
        tuple((stage, routes.step.active(stage.module, dp_rank)) for stage, dp_rank in dp_ranks.items()),
        tuple(
            (
                link,
                tuple(k for k in _microbatches(topology, link) if rank in routes.reaching(link, k, dp_rank)),
            )
            for stage, dp_rank in dp_ranks.items()
            for link in topology.links_into(stage)
        ),
        tuple(
            (
                link,
                tuple(
                    (k, _made_by(messages))
                    for k in _microbatches(topology, link)
                    if (messages := routes.leaving(link, k, dp_rank).get(rank))
                ),
            )
            for stage, dp_rank in dp_ranks.items()
            for link in topology.links_from(stage)
        ),
        program.sums(rank),
        tuple(program.finish(rank)),
    )


def _microbatches(topology: Topology, link: Link) -> range:
    return range(topology.modules[link.target.module].microbatches)


def _made_by(messages: tuple[Message, ...]) -> tuple[int, ...]:
    return tuple(sorted({k for message in messages for k in message.made_by}))


_Pair = tuple[Action, Action]
_FORTH_AND_BACK = (Direction.FORWARD, Direction.BACKWARD)


@attrs.frozen
class _Clause:
    """A part of what a rank owes, by numbers: actions in order, and pairs whose first must precede their second.

    A pair counts where the list has both.
    """

    due: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


class _Judge:
    """Judges lists by themselves: is everything there, once, in an order that the data and the memory allow.

    Actions go by numbers here (attrs values are slow to compare), and clauses are kept (ranks share them). A
    stage is split if the lists have halves of its backward; where they have whole ones, too, if the order has it so.
    """

    def __init__(self, program: Program, lists: Iterable[tuple[Action, ...]]) -> None:
        self.program = program
        self.actions: list[Action] = []
        self.numbers: dict[Action, int] = {}
        for actions in lists:
            for action in actions:
                self._number(action)
        computed = [action for action in self.actions if isinstance(action, Compute)]
        halves = {a.stage for a in computed if a.kind in {Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT}}
        whole = {a.stage for a in computed if a.kind is Kind.BACKWARD}
        self.split = (halves - whole) | (halves & program.order.split)
        self.max_in_flight = program.order.max_in_flight
        self.of_compute: dict[tuple[Stage, int, tuple[Action, ...]], _Clause] = {}
        self.of_transfer: dict[tuple[Stage, Link, int, tuple[int, ...]], _Clause] = {}

    def faults(self, duties: _Duties, actions: tuple[Action, ...]) -> Iterator[str]:
        """Yield what is wrong with a list of actions; what is in flight is told where all else is right."""
        mine = [self.numbers[action] for action in actions]
        place = {number: i for i, number in enumerate(mine)}
        wrong = tuple(self._disorder(duties, mine, place))
        yield from wrong or self._excess(duties, place)

    def flights(self, duties: _Duties, actions: tuple[Action, ...]) -> Iterator[tuple[Stage, int, int]]:
        """Yield every forward after which something is in flight, as (stage, number of the action, how much is).

        The actions are known to be those that are due.
        """
        return self._flights(duties, {self.numbers[action]: i for i, action in enumerate(actions)})

    def _disorder(self, duties: _Duties, mine: Sequence[int], place: dict[int, int]) -> Iterator[str]:
        clauses = tuple(self._clauses(duties))
        due = {number for clause in clauses for number in clause.due}
        if len(place) < len(mine):
            counts = collections.Counter(mine)
            yield from (f"'{self.actions[n]}' is there {counts[n]} times" for n in place if counts[n] > 1)
        if place.keys() != due:
            yield from (f"'{self.actions[n]}' has no place in this program" for n in place if n not in due)
            yield from (f"'{self.actions[n]}' is missing" for n in sorted(due - place.keys()))
        for clause in clauses:
            for first, then in clause.pairs:
                if first in place and then in place and place[first] > place[then]:
                    yield f"'{self.actions[then]}' comes before '{self.actions[first]}', which it needs"

    def _excess(self, duties: _Duties, place: Mapping[int, int]) -> Iterator[str]:
        for stage, number, count in self._flights(duties, place):
            if count > self.max_in_flight[stage]:
                what = "microbatches in flight" if self._is_trained(stage) else "outputs that wait to be read"
                yield f"'{self.actions[number]}' gives {stage} {count} {what}; it may have {self.max_in_flight[stage]}"
                return

    def _flights(self, duties: _Duties, place: Mapping[int, int]) -> Iterator[tuple[Stage, int, int]]:
        for stage, spans in self._spans(duties).items():
            ends = sorted(max(place[number] for number in last) for _, last in spans)
            forwards = sorted((place[number], number) for number, _ in spans)
            for i, (start, number) in enumerate(forwards, 1):
                yield stage, number, i - bisect.bisect_left(ends, start)

    def _spans(self, duties: _Duties) -> Mapping[Stage, Sequence[tuple[int, Sequence[int]]]]:
        """Return, by stage, the action that takes up each microbatch, and those of which the last lets go of it."""
        spans: dict[Stage, list[tuple[int, Sequence[int]]]] = {}
        for stage, active in duties.stages:
            due = {k: self._of_compute(stage, k, duties).due for k in active}
            until: dict[int, list[int]] = {k: [numbers[-1]] for k, numbers in due.items()}
            if not self._is_trained(stage):
                until = collections.defaultdict(list)
                for link, sent in duties.departures:
                    for k, made in sent if link.source == stage else ():
                        for j in made:
                            until[j].append(self._of_transfer(stage, link, k, made).due[-1])
            spans[stage] = [(due[k][0], last) for k, last in until.items()]
        return spans

    def _is_trained(self, stage: Stage) -> bool:
        return stage in self.program.order.backward

    def _number(self, action: Action) -> int:
        number = self.numbers.setdefault(action, len(self.actions))
        if number == len(self.actions):
            self.actions.append(action)
        return number

    def _clauses(self, duties: _Duties) -> Iterator[_Clause]:
        for stage, active in duties.stages:
            for k in sorted(active):
                yield self._of_compute(stage, k, duties)
        for link, ks in duties.arrivals:
            for k in ks:
                yield self._of_transfer(link.target, link, k, (k,))
        for link, sent in duties.departures:
            for k, made in sent:
                yield self._of_transfer(link.source, link, k, made)
        yield self._finish(duties)

    def _finish(self, duties: _Duties) -> _Clause:
        """What ends the step: all sums, and then, once they are there, one action after the other."""
        waits = [action for action in duties.finish if isinstance(action, WaitReduce)]
        rest = [action for action in duties.finish if not isinstance(action, WaitReduce)]
        pairs: list[_Pair] = [(wait.posted, wait) for wait in waits]
        pairs += [(wait, action) for wait in waits for action in rest[:1]]
        return self._clause((*duties.sums, *duties.finish), [*pairs, *itertools.pairwise(rest)])

    def _of_compute(self, stage: Stage, k: int, duties: _Duties) -> _Clause:
        followers = tuple(reduce for reduce in duties.sums if reduce.stage == stage)
        key = (stage, k, followers or duties.finish[:1])
        if key not in self.of_compute:
            self.of_compute[key] = self._clause(*self._compute(*key))
        return self.of_compute[key]

    def _of_transfer(self, stage: Stage, link: Link, k: int, own: tuple[int, ...]) -> _Clause:
        key = (stage, link, k, own)
        if key not in self.of_transfer:
            self.of_transfer[key] = self._clause(*self._transfers(*key))
        return self.of_transfer[key]

    def _clause(self, due: Iterable[Action], pairs: Iterable[_Pair]) -> _Clause:
        return _Clause(
            tuple(map(self._number, due)), tuple((self._number(a), self._number(b)) for a, b in pairs)
        )

    def _compute(
        self, stage: Stage, k: int, followers: tuple[Action, ...]
    ) -> tuple[list[Action], list[_Pair]]:
        """One microbatch: its forward, then its backward, whole or in two, then sums, or else what ends the step."""
        kinds = [Kind.FORWARD]
        if self._is_trained(stage):
            halves = [Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]
            kinds += halves if stage in self.split else [Kind.BACKWARD]
        due: list[Action] = [Compute(kind, stage, k) for kind in kinds]
        return due, [*itertools.pairwise(due), *((due[-1], follower) for follower in followers)]

    def _transfers(
        self, stage: Stage, link: Link, k: int, own: tuple[int, ...]
    ) -> tuple[list[Action], list[_Pair]]:
        """One microbatch on a link, at one end, where it is of the microbatches `own`.

        A send follows the compute actions that make its data; a receive is complete before its readers.
        """
        forwards = [Compute(Kind.FORWARD, stage, j) for j in own]
        backwards = [Compute(kind, stage, j) for j in own for kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT)]
        if stage == link.target:
            peer, way_in, way_out, readers, makers = link.source, *_FORTH_AND_BACK, forwards, backwards
        else:
            peer, way_in, way_out, readers, makers = link.target, *_FORTH_AND_BACK[::-1], backwards, forwards
        due: list[Action] = []
        pairs: list[_Pair] = []
        if way_in is Direction.FORWARD or link in self.program.order.gradients:
            recv = Recv(stage, way_in, k, peer)
            due += [recv, Wait(recv)]
            pairs += [(recv, Wait(recv)), *((Wait(recv), reader) for reader in readers)]
        if way_out is Direction.FORWARD or link in self.program.order.gradients:
            send = Send(stage, way_out, k, peer)
            due += [send, Wait(send)]
            pairs += [*((maker, send) for maker in makers), (send, Wait(send))]
        return due, pairs


# -- all ranks together ------------------------------------------------------------------------------------


def _together(walkers: Walkers) -> Iterator[str]:
    yield from _channels(walkers)
    yield from _deadlock(walk(walkers).blocked)


def _channels(walkers: Walkers) -> Iterator[str]:
    """Each rank must receive from a peer in the order in which that peer sends: some transports have no tags.

    Of ranks in step this asks that all they send and receive is in one order, so in the same for every pair.
    """
    sent: dict[tuple[int, int], list[Transfer]] = collections.defaultdict(list)
    received: dict[tuple[int, int], list[Transfer]] = collections.defaultdict(list)
    for rank, actions in walkers.listing.items():
        for action in actions:
            if isinstance(action, Send):
                for peer in walkers.others(rank, action):
                    sent[rank, peer].append(action)
            elif isinstance(action, Recv):
                for peer in walkers.others(rank, action):
                    received[peer, rank].append(walkers.twins[action])
    for (source, target), order in sent.items():
        if order != received[source, target]:
            yield (
                f"rank {target} posts its receives from rank {source} in another order than rank {source} "
                "sends: a transport without tags would mix them up"
            )


def _deadlock(blocked: tuple[Blocked, ...]) -> Iterator[str]:
    """Name one cycle of waits in words; ranks outside it only wait for those in it."""
    stuck = {block.rank: block for block in blocked}
    if not stuck:
        return
    jammed = next((block for block in blocked if block.heads), None)
    if jammed and jammed.heads:
        mine, theirs, peer = *jammed.heads, jammed.waits_for[0]
        yield (
            f"deadlock with one queue per pair of ranks: rank {jammed.rank} stands before '{jammed.action}'; in "
            f"its queue with rank {peer} '{mine}' is next here and '{theirs}' is next there, and each "
            "waits for what comes behind the other"
        )
        return
    path: list[int] = []
    rank = next(iter(stuck))
    while rank in stuck and rank not in path:
        path.append(rank)
        rank = next((r for r in stuck[rank].waits_for if r in stuck), stuck[rank].waits_for[0])
    cycle = path[path.index(rank) :] if rank in path else path
    waits = "; ".join(
        f"rank {r} stands before '{stuck[r].action}' and waits for rank "
        f"{', '.join(map(str, stuck[r].waits_for))}"
        for r in cycle
    )
    yield f"deadlock: {waits}"
