"""Verify: checks that a program is complete, keeps its limits, cannot deadlock, and mixes up no data.

A listing is checked against the step that it is for, not against how it was made. It must have

- every forward of every active microbatch once, and its backward where there is one: complete, or as I and then W,
  the same for all ranks of a stage;
- every message posted once at each end and then waited for once at each end; each pair of ranks receives in the order
  in which it sends;
- data before it is read: the wait for a receive comes before the compute action that reads it, and a send comes after
  the compute action that makes its data;
- each sum of gradients posted once, after the last gradient of its stage, and waited for; where the last backward is
  cut, after the part that completes its bucket; each gather of weights posted once, and waited for before its stage
  computes; then norm and update, once;
- what a group of ranks does together at one place on all of them, because communicators match calls by order;
- no more in flight than the order's limits. A microbatch is in flight on a stage from its forward to the end of its
  backward. On a stage without backward an output counts until all sends of it have been waited for. That holds in
  training and in evaluation: a fast encoder without a bound would fill the memory in both;
- an end: the replay, in which nothing buffers and joint actions wait for all of their ranks, runs to the end.

The `strict` check also asks that the listing ends with one queue per pair of ranks for both directions. Jobs do not
need that, because they have a channel for each direction.

Ranks are *alike* if the same is due on them and their lists are equal. The checks of single ranks read nothing else, so
one check serves all of them. In the replay alike ranks are merged into one, which is stricter (see `replay`): if the
merged replay ends, the program is sound. If it gets stuck, every rank is replayed by itself, and that result counts.
So `verify` says the same of every listing as `verify_each`, which merges nothing.

The merged replay of a program that `lower` made always ends: its order was executed action by action, each on all dp
ranks that have it. So verifying a world of thousands of ranks costs as much as its different lists.
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
from mimogrid.core.program.replay import Blocked, ReplayRanks, merged_ranks, replay_ranks, single_ranks
from mimogrid.core.schedule.actions import (
    Action,
    Collective,
    Compute,
    Direction,
    Gather,
    Kind,
    Recv,
    Reduce,
    Send,
    Transfer,
    Wait,
    WaitGather,
    WaitReduce,
)
from mimogrid.core.step.routes import Message
from mimogrid.core.topology.topology import Link, Stage, Topology


def listing_of(program: Program) -> Listing:
    """Return the lists of all ranks that host a module."""
    return {rank: program.of(rank) for rank in program.topology.ranks}


def verify(program: Program, listing: Listing | None = None, *, strict: bool = False) -> tuple[str, ...]:
    """Return every problem of a listing of the program (default: its own), in words; () if it is sound.

    With `strict` it must also end with one queue per pair of ranks.
    """
    lists = _lists(program, listing)
    return tuple(_problems(program, lists, _alike(program, lists), strict=strict))


def verify_each(program: Program, listing: Listing | None = None, *, strict: bool = False) -> tuple[str, ...]:
    """Return what `verify` returns, with every rank checked and replayed by itself."""
    each = [(_due_on(program, rank), (rank,)) for rank in program.topology.ranks]
    return tuple(_problems(program, _lists(program, listing), each, strict=strict))


def in_flight(program: Program, listing: Listing | None = None) -> Mapping[Stage, int]:
    """Return the most microbatches that each stage has in flight on any rank, counted as its limit counts them.

    The listing must be sound. A stage whose outputs nobody reads has none in flight.
    """
    lists = _lists(program, listing)
    alike = _alike(program, lists)
    checker = _Checker(program, (lists[ranks[0]] for _, ranks in alike))
    peaks = dict.fromkeys(program.topology.stages, 0)
    for due, ranks in alike:
        for stage, _, count in checker.in_flight(due, lists[ranks[0]]):
            peaks[stage] = max(peaks[stage], count)
    return peaks


def _lists(program: Program, listing: Listing | None) -> dict[int, tuple[Action, ...]]:
    """Return the lists to check; a rank without a list has an empty one."""
    found = listing_of(program) if listing is None else listing
    return {rank: tuple(found.get(rank, ())) for rank in dict.fromkeys((*program.topology.ranks, *found))}


_Alike = Sequence[tuple["_Due", Sequence[int]]]
"""Sets of ranks that are alike, with what is due on them."""


def _alike(program: Program, listing: Listing) -> _Alike:
    alike: dict[tuple[_Due, tuple[Action, ...]], list[int]] = collections.defaultdict(list)
    for rank in program.topology.ranks:
        alike[_due_on(program, rank), listing[rank]].append(rank)
    return [(due, ranks) for (due, _), ranks in alike.items()]


def _problems(program: Program, listing: Listing, alike: _Alike, *, strict: bool) -> Iterator[str]:
    checker = _Checker(program, (listing[ranks[0]] for _, ranks in alike))
    found = [(rank, f"rank {rank} hosts no module but has actions") for rank in _idlers(program, listing)]
    for due, ranks in alike:
        problems = tuple(checker.problems(due, listing[ranks[0]]))
        found += [(rank, f"rank {rank}: {problem}") for rank in ranks for problem in problems]
    if found:
        yield from (problem for _, problem in sorted(found, key=operator.itemgetter(0)))
        return
    sound_merged = len(alike) < len(listing) and not any(
        _together(merged_ranks(program, listing, [ranks for _, ranks in alike], strict=strict))
    )
    stuck = () if sound_merged else tuple(_together(single_ranks(program, listing, strict=strict)))
    yield from stuck or _mixed(program, listing, alike)


def _mixed(program: Program, listing: Listing, alike: _Alike) -> Iterator[str]:
    """Find groups of ranks that post a collective at different places among their joint actions.

    These are the collectives over the same ranks, and the compute actions that all of them join: these may use the same
    communicator.
    """
    first = {rank: ranks[0] for _, ranks in alike for rank in ranks}

    @functools.cache
    def calls(leader: int, own: frozenset[Collective], stages: frozenset[Stage]) -> tuple[Action, ...]:
        """Return the actions of a rank that are among `own` or compute on one of `stages`."""
        return tuple(
            action
            for action in listing[leader]
            if action in own or (isinstance(action, Compute) and action.stage in stages)
        )

    found: dict[tuple[int, ...], tuple[int, tuple[Action, ...]]] = {}
    for rank, leader in sorted(first.items()):
        posted = {collective: program.joint(rank, collective) for collective in program.collectives(rank)}
        stages = [info.stage for info in program.topology.role(rank).stages]
        joined = {stage: set(program.joint(rank, Compute(Kind.FORWARD, stage, 0))) for stage in stages}
        for group in dict.fromkeys(posted.values()):
            own = frozenset(collective for collective, ranks in posted.items() if ranks == group)
            mine = calls(leader, own, frozenset(stage for stage in stages if joined[stage].issuperset(group)))
            other, theirs = found.setdefault(group, (rank, mine))
            if mine != theirs:
                pairs = itertools.zip_longest(mine, theirs)
                here, there = next((a, b) for a, b in pairs if a != b)
                yield (
                    f"rank {rank} reaches '{here}' when rank {other} reaches '{there}': a communicator of both "
                    "would mix them up"
                )


def _idlers(program: Program, listing: Listing) -> Iterator[int]:
    """Return the ranks that host no module but have actions."""
    return (rank for rank in listing if listing[rank] and not program.topology.role(rank).stages)


# -- one rank ----------------------------------------------------------------------------------------------


@attrs.frozen(cache_hash=True)
class _Due:
    """What a step requires of a rank.

    Attributes:
        stages: Its stages, with the microbatches that it computes.
        arrivals: The links into them, with the microbatches of the link's target for which it receives something.
        departures: The links out of them, with the microbatches of the link's target for which it sends something,
            each with the rank's own microbatches that make the data.
        collectives: Its gathers of weights and its sums of gradients.
        finish: The actions that end the step.
    """

    stages: tuple[tuple[Stage, frozenset[int]], ...]
    arrivals: tuple[tuple[Link, tuple[int, ...]], ...]
    departures: tuple[tuple[Link, tuple[tuple[int, tuple[int, ...]], ...]], ...]
    collectives: tuple[Collective, ...]
    finish: tuple[Action, ...]


def _due_on(program: Program, rank: int) -> _Due:
    topology, routes = program.topology, program.routes
    stages = topology.role(rank).stages
    dp_ranks = {info.stage: topology.modules[info.stage.module].dp_rank_of(rank) for info in stages}
    return _Due(
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
        program.collectives(rank),
        tuple(program.finish(rank)),
    )


def _microbatches(topology: Topology, link: Link) -> range:
    return range(topology.modules[link.target.module].microbatches)


def _made_by(messages: tuple[Message, ...]) -> tuple[int, ...]:
    return tuple(sorted({k for message in messages for k in message.made_by}))


_Pair = tuple[Action, Action]
"""Two actions, of which the first must come before the second."""


@attrs.frozen
class _Rule:
    """A part of what is due on a rank, by numbers of actions.

    Attributes:
        due: Actions that must be there once.
        pairs: Pairs of which the first must come before the second, if the list has both.
    """

    due: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


class _Checker:
    """Checks single lists: whether all actions are there, once, in an order that data and memory allow.

    Actions are numbered, because comparing attrs values is slow, and rules are kept, because ranks share them. A stage
    is split if the lists have halves of its backward. If they have complete ones too, the order decides.
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
        complete = {a.stage for a in computed if a.kind is Kind.BACKWARD}
        self.split = (halves - complete) | (halves & program.order.split)
        self.max_in_flight = program.order.max_in_flight
        self.of_compute: dict[tuple[Stage, int, tuple[Action, ...], tuple[Action, ...]], _Rule] = {}
        self.of_transfer: dict[tuple[Stage, Link, int, tuple[int, ...]], _Rule] = {}

    def problems(self, due: _Due, actions: tuple[Action, ...]) -> Iterator[str]:
        """Yield the problems of a list; what is in flight is checked only if all else is right."""
        mine = [self.numbers[action] for action in actions]
        place = {number: i for i, number in enumerate(mine)}
        wrong = tuple(self._disorder(due, mine, place))
        yield from wrong or self._excess(due, place)

    def in_flight(self, due: _Due, actions: tuple[Action, ...]) -> Iterator[tuple[Stage, int, int]]:
        """Yield (stage, number of the action, count in flight after it) for every forward that adds one.

        The list must have the actions that are due.
        """
        return self._in_flight(due, {self.numbers[action]: i for i, action in enumerate(actions)})

    def _disorder(self, due: _Due, mine: Sequence[int], place: dict[int, int]) -> Iterator[str]:
        rules = tuple(self._rules(due))
        expected = {number for rule in rules for number in rule.due}
        if len(place) < len(mine):
            counts = collections.Counter(mine)
            yield from (f"'{self.actions[n]}' is there {counts[n]} times" for n in place if counts[n] > 1)
        if place.keys() != expected:
            yield from (
                f"'{self.actions[n]}' has no place in this program" for n in place if n not in expected
            )
            yield from (f"'{self.actions[n]}' is missing" for n in sorted(expected - place.keys()))
        for rule in rules:
            for first, then in rule.pairs:
                if first in place and then in place and place[first] > place[then]:
                    yield f"'{self.actions[then]}' comes before '{self.actions[first]}', which it needs"

    def _excess(self, due: _Due, place: Mapping[int, int]) -> Iterator[str]:
        for stage, number, count in self._in_flight(due, place):
            if count > self.max_in_flight[stage]:
                what = "microbatches in flight" if self._is_trained(stage) else "outputs that wait to be read"
                yield f"'{self.actions[number]}' gives {stage} {count} {what}; it may have {self.max_in_flight[stage]}"
                return

    def _in_flight(self, due: _Due, place: Mapping[int, int]) -> Iterator[tuple[Stage, int, int]]:
        for stage, spans in self._spans(due).items():
            ends = sorted(max(place[number] for number in last) for _, last in spans)
            forwards = sorted((place[number], number) for number, _ in spans)
            for i, (start, number) in enumerate(forwards, 1):
                yield stage, number, i - bisect.bisect_left(ends, start)

    def _spans(self, due: _Due) -> Mapping[Stage, Sequence[tuple[int, Sequence[int]]]]:
        """Return, by stage, the action that puts each microbatch in flight, and those of which the last ends that."""
        spans: dict[Stage, list[tuple[int, Sequence[int]]]] = {}
        for stage, active in due.stages:
            computed = {k: self._of_compute(stage, k, due).due for k in active}
            until: dict[int, list[int]] = {k: [numbers[-1]] for k, numbers in computed.items()}
            if not self._is_trained(stage):
                until = collections.defaultdict(list)
                for link, sent in due.departures:
                    for k, made in sent if link.source == stage else ():
                        for j in made:
                            until[j].append(self._of_transfer(stage, link, k, made).due[-1])
            spans[stage] = [(computed[k][0], last) for k, last in until.items()]
        return spans

    def _is_trained(self, stage: Stage) -> bool:
        return stage in self.program.order.backward

    def _number(self, action: Action) -> int:
        number = self.numbers.setdefault(action, len(self.actions))
        if number == len(self.actions):
            self.actions.append(action)
        return number

    def _rules(self, due: _Due) -> Iterator[_Rule]:
        for stage, active in due.stages:
            for k in sorted(active):
                yield self._of_compute(stage, k, due)
        for link, ks in due.arrivals:
            for k in ks:
                yield self._of_transfer(link.target, link, k, (k,))
        for link, sent in due.departures:
            for k, made in sent:
                yield self._of_transfer(link.source, link, k, made)
        yield self._finish(due)

    def _finish(self, due: _Due) -> _Rule:
        """Return the rule of what is posted for buckets and waited for, and of what ends the step, one by one."""
        gathered = [WaitGather(g.stage, g.bucket) for g in due.collectives if isinstance(g, Gather)]
        summed = [action for action in due.finish if isinstance(action, WaitReduce)]
        waits: list[WaitGather | WaitReduce] = [*gathered, *summed]
        rest = [action for action in due.finish if not isinstance(action, WaitReduce)]
        pairs: list[_Pair] = [(wait.posted, wait) for wait in waits]
        pairs += [(wait, action) for wait in waits for action in rest[:1]]
        return self._rule((*due.collectives, *waits, *rest), [*pairs, *itertools.pairwise(rest)])

    def _of_compute(self, stage: Stage, k: int, due: _Due) -> _Rule:
        mine = [collective for collective in due.collectives if collective.stage == stage]
        leaders = tuple(WaitGather(g.stage, g.bucket) for g in mine if isinstance(g, Gather))
        followers = tuple(reduce for reduce in mine if isinstance(reduce, Reduce))
        key = (stage, k, leaders, followers or due.finish[:1])
        if key not in self.of_compute:
            self.of_compute[key] = self._rule(*self._compute(*key))
        return self.of_compute[key]

    def _of_transfer(self, stage: Stage, link: Link, k: int, own: tuple[int, ...]) -> _Rule:
        key = (stage, link, k, own)
        if key not in self.of_transfer:
            self.of_transfer[key] = self._rule(*self._transfers(*key))
        return self.of_transfer[key]

    def _rule(self, due: Iterable[Action], pairs: Iterable[_Pair]) -> _Rule:
        return _Rule(
            tuple(map(self._number, due)), tuple((self._number(a), self._number(b)) for a, b in pairs)
        )

    def _compute(
        self, stage: Stage, k: int, leaders: tuple[Action, ...], followers: tuple[Action, ...]
    ) -> tuple[list[Action], list[_Pair]]:
        """Return what is due for one microbatch: its forward, then its backward, complete or in two, then `followers`.

        A backward that is cut is there part by part. `followers` are the stage's sums, or the first action that ends
        the step if it has none. The forward is behind `leaders`, the waits for the stage's weights.
        """
        order = self.program.order
        kinds = [Kind.FORWARD]
        if self._is_trained(stage):
            halves = [Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]
            kinds += halves if stage in self.split else [Kind.BACKWARD]
        whole = [Compute(kind, stage, k) for kind in kinds]
        last = order.parts(whole[-1])
        due: list[Action] = [*whole[:-1], *last]
        pairs: list[_Pair] = [(leader, due[0]) for leader in leaders]
        for follower in followers:
            after = last
            if len(last) > 1 and isinstance(follower, Reduce):
                after = tuple(part for part in last if order.completes(part, follower.bucket))
            pairs.append((after[-1], follower))
        return due, [*pairs, *itertools.pairwise(due)]

    def _transfers(
        self, stage: Stage, link: Link, k: int, own: tuple[int, ...]
    ) -> tuple[list[Action], list[_Pair]]:
        """Return what is due for one microbatch on a link, at the end where `stage` is.

        `own` are the microbatches of the stage that have a part in it. A receive is complete before its readers, and a
        send follows the actions that make its data.
        """
        order = self.program.order
        forwards = [Compute(Kind.FORWARD, stage, j) for j in own]
        backwards = [
            part
            for j in own
            for kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT)
            for part in order.parts(Compute(kind, stage, j))
        ]
        has_gradients = link in order.gradients
        if stage == link.target:
            received = self._received(Recv(stage, Direction.FORWARD, k, link.source), forwards)
            sent = self._sent(Send(stage, Direction.BACKWARD, k, link.source), backwards)
            parts = [received, sent] if has_gradients else [received]
        else:
            received = self._received(Recv(stage, Direction.BACKWARD, k, link.target), backwards)
            sent = self._sent(Send(stage, Direction.FORWARD, k, link.target), forwards)
            parts = [received, sent] if has_gradients else [sent]
        return [action for due, _ in parts for action in due], [pair for _, pairs in parts for pair in pairs]

    @staticmethod
    def _received(recv: Recv, readers: Iterable[Action]) -> tuple[list[Action], list[_Pair]]:
        wait = Wait(recv)
        return [recv, wait], [(recv, wait), *((wait, reader) for reader in readers)]

    @staticmethod
    def _sent(send: Send, makers: Iterable[Action]) -> tuple[list[Action], list[_Pair]]:
        wait = Wait(send)
        return [send, wait], [*((maker, send) for maker in makers), (send, wait)]


# -- all ranks together ------------------------------------------------------------------------------------


def _together(ranks: ReplayRanks) -> Iterator[str]:
    yield from _channels(ranks)
    yield from _deadlock(replay_ranks(ranks).blocked)


def _channels(ranks: ReplayRanks) -> Iterator[str]:
    """Find ranks that do not receive from a peer in the order in which that peer sends: some transports have no tags.

    Merged ranks must have all of their sends and receives in one order, and then each pair of ranks has.
    """
    sent: dict[tuple[int, int], list[Transfer]] = collections.defaultdict(list)
    received: dict[tuple[int, int], list[Transfer]] = collections.defaultdict(list)
    for rank, actions in ranks.listing.items():
        for action in actions:
            if isinstance(action, Send):
                for peer in ranks.others(rank, action):
                    sent[rank, peer].append(action)
            elif isinstance(action, Recv):
                for peer in ranks.others(rank, action):
                    received[peer, rank].append(ranks.matching_ops[action])
    for (source, target), order in sent.items():
        if order != received[source, target]:
            yield (
                f"rank {target} posts its receives from rank {source} in another order than rank {source} "
                "sends: a transport without tags would mix them up"
            )


def _deadlock(blocked: tuple[Blocked, ...]) -> Iterator[str]:
    """Describe one cycle of waits. Ranks outside it only wait for those in it."""
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
