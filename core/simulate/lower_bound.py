"""Lower bound of a program: seconds that no order of its compute actions beats, whatever may be in flight.

It is the bound of `bounds`, head + work + tail. Heads and tails follow the data alone. The sets that are tried are, for
each rank, all of its compute actions, those of one stage, and of each of these the forwards alone and the others alone.

Known formulas for the slowest stage are this bound for three of the sets: all its work; all its forwards, then the way
down and back; the way down and back, then all its backwards. For equal stages on a chain the bound is
(M + P - 1)(f + b), which 1F1B and GPipe reach. Before the first forward of a stage its weights are gathered, and after
its last gradient its gradients are summed, one bucket of a group after the other; and when all ranks have agreed, each
takes its optimizer step. A backward that is cut counts as one action, which completes some gradients before it ends.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

from mimogrid.core.base.bounds import bound_s, longest_before_s
from mimogrid.core.job.costs import Costs
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Collective, Compute, Gather, Kind, Reduce, Update
from mimogrid.core.simulate.rank_classes import RankClasses
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Link, Stage
from mimogrid.core.update.buckets import share_of


Seconds = Callable[[int, Compute], float]
"""The seconds that a compute action takes on a rank."""


def lower_bound_s(
    program: Program, costs: Costs, classes: RankClasses, listing: Listing, seconds_of: Seconds
) -> float:
    """Return the bound, from the lists of the ranks that lead their classes."""
    nodes = _Nodes(program, costs, classes, listing)
    seconds = [
        sum(seconds_of(rank, part) for part in program.order.parts(action)) for rank, action in nodes.known
    ]
    before = nodes.needs()
    after = _turned_around(before)
    order = _in_order(before, after)
    heads = longest_before_s(order, before, seconds, nodes.gathering_s())
    tails = longest_before_s(reversed(order), after, seconds, nodes.reducing_s())
    bounds = [
        bound_s((heads[n] for n in each), sum(seconds[n] for n in each), (tails[n] for n in each))
        for each in nodes.sets()
    ]
    if costs.cores is not None:
        work = (
            (sum(seconds[n] for n in nodes.of(rank)), len(ranks)) for rank, ranks in classes.members.items()
        )
        bounds.append(sum(each * count for each, count in work) / costs.cores)
    rest_s = functools.partial(_rest_s, program, seconds_of)
    bounds += nodes.summed_s([heads[node] + took for node, took in enumerate(seconds)], rest_s)
    updates = (update_s(program, costs, rank) for rank in listing if Update() in listing[rank][-1:])
    return max(bounds, default=0.0) + max(updates, default=0.0)


def _rest_s(program: Program, seconds_of: Seconds, rank: int, reduce: Reduce) -> float:
    """Return the seconds of a stage's last action that come after the part which completes a bucket."""
    order = program.order
    parts = order.parts(order.of(reduce.stage)[-1])
    completes = next(i for i, part in enumerate(parts) if order.completes(part, reduce.bucket))
    return sum(seconds_of(rank, part) for part in parts[completes + 1 :])


def reducing_s(program: Program, costs: Costs, rank: int, stage: Stage) -> float:
    """Return the seconds of the sums after a stage's last action, on a rank: those of one group run one by one."""
    computed = program.order.of(stage)
    sums = program.sums_after(rank, computed[-1]) if computed else ()
    return _one_by_one_s(program, costs, rank, stage, sums)


def gathering_s(program: Program, costs: Costs, rank: int, stage: Stage) -> float:
    """Return the seconds that the gathers of a stage take on a rank at least, likewise."""
    return _one_by_one_s(program, costs, rank, stage, program.gathers(rank))


def _one_by_one_s(
    program: Program, costs: Costs, rank: int, stage: Stage, collectives: Iterable[Collective]
) -> float:
    seconds: dict[tuple[int, ...], float] = collections.defaultdict(float)
    for collective in collectives:
        if collective.stage == stage:
            seconds[program.joint(rank, collective)] += collective_s(program, costs, collective)
    return max(seconds.values(), default=0.0)


def collective_s(program: Program, costs: Costs, collective: Collective) -> float:
    """Return the seconds of the sum, or the gather, of one bucket: its share of what those of the stage take."""
    of_stage = costs.of(collective.stage)
    whole = of_stage.gather if isinstance(collective, Gather) else of_stage.reduce
    return whole * share_of(program.topology, collective.stage, collective.bucket) if whole else 0.0


def update_s(program: Program, costs: Costs, rank: int) -> float:
    """Return the seconds of a rank's optimizer step."""
    return sum(costs.of(info.stage).update for info in program.topology.role(rank).stages)


_NOTHING: Mapping[int, int] = {}
_GIVES = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
"""What gives the gradient of inputs: one of them."""


class _Nodes:
    """The compute actions by number; an action that several ranks start together is one node.

    Attributes:
        known: every node, by the first of its ranks.
        at: per rank, stage and kind, the node of each microbatch.
    """

    def __init__(self, program: Program, costs: Costs, classes: RankClasses, listing: Listing) -> None:
        self._program, self._costs, self._classes = program, costs, classes
        self._collective_s: dict[Hashable, float] = {}
        self.known: list[tuple[int, Compute]] = []
        self.at: dict[tuple[int, Stage, Kind], dict[int, int]] = {}
        numbers: dict[tuple[int, Compute], int] = {}
        first: dict[tuple[int, Stage], int] = {}
        for rank, actions in listing.items():
            for action in actions:
                if isinstance(action, Compute) and action.kind is not Kind.BACKWARD_PART:
                    place = rank, action.stage
                    if place not in first:
                        first[place] = classes.leaders_of(program.joint(rank, action))[0]
                    node = first[place], action
                    number = numbers.setdefault(node, len(self.known))
                    if number == len(self.known):
                        self.known.append(node)
                    self.at.setdefault((*place, action.kind), {})[action.microbatch] = number

    def of(self, rank: int) -> list[int]:
        """Return the nodes of a rank."""
        return [node for (other, _, _), found in self.at.items() if other == rank for node in found.values()]

    def sets(self) -> Iterator[list[int]]:
        """Yield the sets of nodes of one rank that are tried."""
        sets: dict[Hashable, list[int]] = collections.defaultdict(list)
        for (rank, stage, kind), found in self.at.items():
            forward = kind is Kind.FORWARD
            for key in ((rank,), (rank, forward), (rank, stage), (rank, stage, forward)):
                sets[key] += found.values()
        yield from sets.values()

    def reducing_s(self) -> dict[int, float]:
        """Return, for every node, the seconds of the sums that follow it if it gives gradients."""
        found: dict[int, float] = {}
        for (rank, stage, kind), mine in self.at.items():
            forward = kind is Kind.FORWARD
            seconds = 0.0 if forward else self._of_stage(reducing_s, rank, stage)
            for node in mine.values():
                found[node] = max(found.get(node, 0.0), seconds)
        return found

    def gathering_s(self) -> dict[int, float]:
        """Return, for every forward, the seconds of the gathers that come before it."""
        found: dict[int, float] = {}
        for (rank, stage, kind), mine in self.at.items():
            if kind is Kind.FORWARD:
                seconds = self._of_stage(gathering_s, rank, stage)
                for node in mine.values():
                    found[node] = max(found.get(node, 0.0), seconds)
        return found

    def _of_stage(self, of: Callable[[Program, Costs, int, Stage], float], rank: int, stage: Stage) -> float:
        """Return the seconds of the sums, or gathers, of a stage on a rank: the same for all with the same experts."""
        key = of, stage, self._program.topology.modules[stage.module].ep_rank_of(rank)
        if key not in self._collective_s:
            self._collective_s[key] = of(self._program, self._costs, rank, stage)
        return self._collective_s[key]

    def summed_s(self, ends: Sequence[float], rest_s: Callable[[int, Reduce], float]) -> Iterator[float]:
        """Yield when each group is done with its sums at the earliest: after the first gradient, one by one.

        `rest_s` says how long before the end of its stage on a rank a bucket is complete.
        """
        complete: dict[tuple[int, Stage], float] = {}
        for (rank, stage, kind), found in self.at.items():
            if kind is not Kind.FORWARD:
                last = max(ends[node] for node in found.values())
                complete[rank, stage] = max(complete.get((rank, stage), 0.0), last)
        known: dict[Reduce, float] = {}
        for rank in self._classes.members:
            groups: dict[tuple[int, ...], list[Reduce]] = collections.defaultdict(list)
            for reduce in self._program.sums(rank):
                groups[self._program.joint(rank, reduce)].append(reduce)
                if reduce not in known:
                    known[reduce] = collective_s(self._program, self._costs, reduce)
            for reduces in groups.values():
                first = min(complete.get((rank, r.stage), 0.0) - rest_s(rank, r) for r in reduces)
                yield first + sum(map(known.__getitem__, reduces))

    def needs(self) -> list[list[tuple[int, float]]]:
        """Return, per node, the nodes whose results it needs, and the seconds that these are on the way."""
        topology = self._program.topology
        needs: list[list[tuple[int, float]]] = [[] for _ in self.known]
        for (rank, stage, kind), found in self.at.items():
            made_by = Kind.INPUT_GRADIENT if kind is Kind.WEIGHT_GRADIENT else Kind.FORWARD
            makers = self._first_of(rank, stage, made_by)
            for k, node in found.items() if kind is not Kind.FORWARD else ():
                if k in makers:
                    needs[node].append((makers[k], 0.0))
        for rank in self._classes.members:
            for info in topology.role(rank).stages:
                for link in topology.links_into(info.stage):
                    for node, other, on_the_way in self._over_link(rank, link):
                        needs[node].append((other, on_the_way))
        return needs

    def _over_link(self, rank: int, link: Link) -> Iterator[tuple[int, int, float]]:
        """Yield nodes that need others because of messages that a rank gets over a link, and how long these take."""
        routes, module = self._program.routes, self._program.topology.modules[link.target.module]
        edge, dp_rank = self._costs.on(link, link.edge), module.dp_rank_of(rank)
        answers = link in self._program.order.gradients
        forwards = self._first_of(rank, link.target, Kind.FORWARD)
        backwards = self._first_of(rank, link.target, *_GIVES) if answers else _NOTHING
        for k in range(module.microbatches):
            for message in routes.reaching(link, k, dp_rank).get(rank, ()):
                source = self._classes.leader[message.rank_source]
                made = self._first_of(source, link.source, Kind.FORWARD)
                answered = self._first_of(source, link.source, *_GIVES)
                size = message_bytes(routes.step, message)
                on_the_way = edge.latency + edge.carry_s(size) if size else 0.0
                for j in message.made_by:
                    if k in forwards and j in made:
                        yield forwards[k], made[j], on_the_way
                    if k in backwards and j in answered:
                        yield answered[j], backwards[k], on_the_way

    def _first_of(self, rank: int, stage: Stage, *kinds: Kind) -> Mapping[int, int]:
        """Return the nodes, by microbatch, of the first of these kinds that there are any of."""
        return next((found for kind in kinds if (found := self.at.get((rank, stage, kind)))), _NOTHING)


def _turned_around(needs: Sequence[Sequence[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """Return, per node, the nodes that need its result, and the seconds that it is on the way."""
    found: list[list[tuple[int, float]]] = [[] for _ in needs]
    for node, others in enumerate(needs):
        for other, on_the_way in others:
            found[other].append((node, on_the_way))
    return found


def _in_order(
    before: Sequence[Sequence[tuple[int, float]]], after: Sequence[Sequence[tuple[int, float]]]
) -> list[int]:
    """Return the nodes so that each comes after those that it needs."""
    missing = [len(others) for others in before]
    order = [node for node, count in enumerate(missing) if not count]
    for node in order:
        for following, _ in after[node]:
            missing[following] -= 1
            if not missing[following]:
                order.append(following)
    return order
