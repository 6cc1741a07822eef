"""Limit: a time that no order of the same compute actions could beat, whatever may be in flight.

On any rank, take any set of its compute actions: the shortest way in to any of them, plus their work, plus the
shortest way out from any of them, is time that passes one after the other. Ways follow the data alone. The bound is
the largest of these over the sets that are tried: all of a rank's compute actions, those of one stage, and of each the
forwards and the others alone.

    way in            work of the set             way out
    |-- F F F ... --| [F][F][F][B][B][B] |-- ... B B --|  gradients summed  |  update

The formulas for the slowest stage (all its work; all its forwards, then the way down and back; the way down and
back, then all its backwards) are this one bound over three of the sets. For equal stages on a chain it is
(M + P - 1)(f + b), which 1F1B and GPipe reach. After the last way out of a stage that trains its gradients are summed,
one bucket of a group after the other, and when all ranks have agreed, each takes its step.
"""

import collections
from collections.abc import Callable, Hashable, Iterator, Sequence

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Compute, Kind, Reduce, Update
from mimogrid.core.simulate.rank_classes import Classes
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Stage
from mimogrid.core.update.buckets import share_of


Seconds = Callable[[int, Compute], float]
"""How long a compute action takes on a rank."""


def limit_s(program: Program, costs: Costs, classes: Classes, listing: Listing, seconds_of: Seconds) -> float:
    """Return the bound, from the lists of the ranks that stand for their classes."""
    nodes = _Nodes(program, classes, listing)
    seconds = [seconds_of(*node) for node in nodes.known]
    before = _data(program, costs, classes, nodes)
    order = _in_order(before)
    heads = [0.0] * len(before)
    tails = [0.0] * len(before)
    for (rank, stage, kind), found in nodes.at.items():
        summing = 0.0 if kind is Kind.FORWARD else summing_s(program, costs, rank, stage)
        for node in found.values():
            tails[node] = max(tails[node], summing)
    for node in order:
        for other, on_the_way in before[node]:
            heads[node] = max(heads[node], heads[other] + seconds[other] + on_the_way)
    for node in reversed(order):
        for other, on_the_way in before[node]:
            tails[other] = max(tails[other], tails[node] + seconds[node] + on_the_way)
    bounds = [
        min(heads[n] for n in chosen) + sum(seconds[n] for n in chosen) + min(tails[n] for n in chosen)
        for chosen in nodes.sets()
    ]
    if costs.cores is not None:
        work = (
            (sum(seconds[n] for n in nodes.of(rank)), len(ranks)) for rank, ranks in classes.members.items()
        )
        bounds.append(sum(each * count for each, count in work) / costs.cores)
    ends = [head + took for head, took in zip(heads, seconds, strict=True)]
    bounds += _sums(program, costs, classes, nodes, ends)
    updates = (update_s(program, costs, rank) for rank in listing if Update() in listing[rank][-1:])
    return max(bounds, default=0.0) + max(updates, default=0.0)


def summing_s(program: Program, costs: Costs, rank: int, stage: Stage) -> float:
    """Return how long the sums of a stage's gradients take on a rank at least: those of one group follow each other."""
    seconds: dict[tuple[int, ...], float] = collections.defaultdict(float)
    for reduce in program.sums(rank):
        if reduce.stage == stage:
            seconds[program.joint(rank, reduce)] += sum_s(program, costs, reduce)
    return max(seconds.values(), default=0.0)


def sum_s(program: Program, costs: Costs, reduce: Reduce) -> float:
    """Return how long the sum of a bucket takes: its share of what those of the stage take."""
    whole = costs.of(reduce.stage).reduce
    return whole * share_of(program.topology, reduce.stage, reduce.bucket) if whole else 0.0


def update_s(program: Program, costs: Costs, rank: int) -> float:
    """Return how long a rank takes to step the optimizer."""
    return sum(costs.of(info.stage).update for info in program.topology.role(rank).stages)


class _Nodes:
    """The compute actions by number; those that several ranks start together are one node.

    Attributes:
        known: every node by the first of its ranks.
        at: per rank, stage and kind, the node of each microbatch.
    """

    def __init__(self, program: Program, classes: Classes, listing: Listing) -> None:
        self.known: list[tuple[int, Compute]] = []
        self.at: dict[tuple[int, Stage, Kind], dict[int, int]] = {}
        numbers: dict[tuple[int, Compute], int] = {}
        first: dict[tuple[int, Stage], int] = {}
        for rank, actions in listing.items():
            for action in actions:
                if isinstance(action, Compute):
                    place = rank, action.stage
                    if place not in first:
                        first[place] = classes.met(program.joint(rank, action))[0]
                    node = first[place], action
                    number = numbers.setdefault(node, len(self.known))
                    if number == len(self.known):
                        self.known.append(node)
                    self.at.setdefault((*place, action.kind), {})[action.microbatch] = number

    def of(self, rank: int) -> list[int]:
        """Return the nodes of a rank."""
        return [node for (other, _, _), found in self.at.items() if other == rank for node in found.values()]

    def gradients(self, rank: int, stage: Stage) -> list[int]:
        """Return the nodes of a rank that give gradients of a stage."""
        return [
            node
            for (other, at, kind), found in self.at.items()
            if (other, at) == (rank, stage) and kind is not Kind.FORWARD
            for node in found.values()
        ]

    def sets(self) -> Iterator[list[int]]:
        """Yield the sets of nodes of one rank that are tried."""
        sets: dict[Hashable, list[int]] = collections.defaultdict(list)
        for (rank, stage, kind), found in self.at.items():
            forward = kind is Kind.FORWARD
            for key in ((rank,), (rank, forward), (rank, stage), (rank, stage, forward)):
                sets[key] += found.values()
        yield from sets.values()


def _sums(
    program: Program, costs: Costs, classes: Classes, nodes: _Nodes, ends: Sequence[float]
) -> Iterator[float]:
    """Yield when each group is through with its sums at the earliest: all of them, after the first gradient."""
    for rank in classes.members:
        groups: dict[tuple[int, ...], list[Reduce]] = collections.defaultdict(list)
        for reduce in program.sums(rank):
            groups[program.joint(rank, reduce)].append(reduce)
        for sums in groups.values():
            stages = dict.fromkeys(reduce.stage for reduce in sums)
            complete = [max((ends[n] for n in nodes.gradients(rank, stage)), default=0.0) for stage in stages]
            yield min(complete) + sum(sum_s(program, costs, reduce) for reduce in sums)


def _data(program: Program, costs: Costs, classes: Classes, nodes: _Nodes) -> list[list[tuple[int, float]]]:
    """Return, per node, those whose results it needs, and how long these are on the way."""
    topology, routes = program.topology, program.routes
    before: list[list[tuple[int, float]]] = [[] for _ in nodes.known]
    nothing: dict[int, int] = {}

    def at(rank: int, stage: Stage, *kinds: Kind) -> dict[int, int]:
        """The nodes of the first of these kinds that there are."""
        return next((found for kind in kinds if (found := nodes.at.get((rank, stage, kind)))), nothing)

    def needs(node: int | None, other: int | None, on_the_way: float) -> None:
        if node is not None and other is not None:
            before[node].append((other, on_the_way))

    for (rank, stage, kind), found in nodes.at.items():
        made_by = Kind.INPUT_GRADIENT if kind is Kind.WEIGHT_GRADIENT else Kind.FORWARD
        for k, node in found.items() if kind is not Kind.FORWARD else ():
            needs(node, at(rank, stage, made_by).get(k), 0.0)
    for rank in classes.members:
        for link in topology.role(rank).links_in:
            edge, dp_rank = costs.on(link, link.edge), topology.modules[link.target.module].dp_rank_of(rank)
            forwards, backwards = at(rank, link.target, Kind.FORWARD), at(rank, link.target, *_GIVES)
            for k in range(topology.modules[link.target.module].microbatches):
                for message in routes.reaching(link, k, dp_rank).get(rank, ()):
                    source = classes.leader[message.rank_source]
                    size = message_bytes(routes.step, message)
                    on_the_way = edge.latency + edge.carry_s(size) if size else 0.0
                    for made in message.made_by:
                        needs(forwards.get(k), at(source, link.source, Kind.FORWARD).get(made), on_the_way)
                        if link in program.order.gradients:
                            needs(at(source, link.source, *_GIVES).get(made), backwards.get(k), on_the_way)
    return before


_GIVES = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
"""What gives the gradient of inputs: one of them."""


def _in_order(before: Sequence[Sequence[tuple[int, float]]]) -> list[int]:
    """Return the nodes so that each comes after those that it needs."""
    missing = [len(others) for others in before]
    after: list[list[int]] = [[] for _ in before]
    for node, others in enumerate(before):
        for other, _ in others:
            after[other].append(node)
    order = [node for node, count in enumerate(missing) if not count]
    for node in order:
        for following in after[node]:
            missing[following] -= 1
            if not missing[following]:
                order.append(following)
    return order
