"""Limit: a time that no order of the same compute actions could beat, whatever may be in flight.

On any rank, take any set of its compute actions: the shortest way in to any of them, plus their work, plus the
shortest way out from any of them, is time that passes one after the other. Ways follow the data alone. The bound is
the largest of these over the sets that are tried: all of a rank's compute actions, those of one stage, and of each the
forwards and the others alone.

    way in            work of the set             way out
    |-- F F F ... --| [F][F][F][B][B][B] |-- ... B B --|  gradients summed  |  update

The formulas for the slowest stage (all its work; all its forwards, then the way down and back; the way down and
back, then all its backwards) are this one bound over three of the sets. For equal stages on a chain it is
(M + P - 1)(f + b), which 1F1B and GPipe reach. After the last way out a rank sums its gradients, and when all ranks
have agreed, each takes its step.
"""

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence

from mimogrid.core.costs import Costs
from mimogrid.core.fold import Classes
from mimogrid.core.schedule.actions import Compute, Kind, Reduce, Update
from mimogrid.core.schedule.lower import Program
from mimogrid.core.schedule.program import Listing
from mimogrid.core.traffic import message_bytes


Node = tuple[int, Compute]
"""A compute action by the first of the ranks that share it."""
Seconds = Callable[[int, Compute], float]
"""How long a compute action takes on a rank."""


def limit_s(program: Program, costs: Costs, classes: Classes, listing: Listing, seconds_of: Seconds) -> float:
    """Return the bound, from the lists of the ranks that stand for their classes."""
    at = _nodes(program, classes, listing)
    seconds = {node: seconds_of(*node) for node in dict.fromkeys(at.values())}
    before = _data(program, costs, classes, at)
    order = _in_order(before)
    heads = dict.fromkeys(order, 0.0)
    tails = dict.fromkeys(order, 0.0)
    for (rank, _), node in at.items():
        summing = (costs.of(a.stage).reduce for a in listing[rank] if isinstance(a, Reduce))
        tails[node] = max(tails[node], sum(summing))
    for node in order:
        for other, on_the_way in before[node]:
            heads[node] = max(heads[node], heads[other] + seconds[other] + on_the_way)
    for node in reversed(order):
        for other, on_the_way in before[node]:
            tails[other] = max(tails[other], tails[node] + seconds[node] + on_the_way)
    sets: dict[Hashable, list[Node]] = collections.defaultdict(list)
    for (rank, action), node in at.items():
        forward = action.kind is Kind.FORWARD
        for key in ((rank,), (rank, forward), (rank, action.stage), (rank, action.stage, forward)):
            sets[key].append(node)
    bounds = [
        min(heads[n] for n in nodes) + sum(seconds[n] for n in nodes) + min(tails[n] for n in nodes)
        for nodes in sets.values()
    ]
    if costs.cores is not None:
        size = {rank: len(ranks) for rank, ranks in classes.members.items()}
        bounds.append(sum(seconds[node] * size[rank] for (rank, _), node in at.items()) / costs.cores)
    updates = (update_s(program, costs, rank) for rank in listing if Update() in listing[rank][-1:])
    return max(bounds, default=0.0) + max(updates, default=0.0)


def update_s(program: Program, costs: Costs, rank: int) -> float:
    """Return how long a rank takes to step the optimizer."""
    return sum(costs.of(info.stage).update for info in program.topology.stages_of(rank))


def _nodes(program: Program, classes: Classes, listing: Listing) -> dict[Node, Node]:
    """Return, for every compute action of every rank, the node that it is."""
    first: dict[Hashable, int] = {}
    at: dict[Node, Node] = {}
    for rank, actions in listing.items():
        for action in actions:
            if isinstance(action, Compute):
                place = (rank, action.stage)
                if place not in first:
                    first[place] = classes.met(program.joint(rank, action))[0]
                at[rank, action] = (first[place], action)
    return at


def _data(
    program: Program, costs: Costs, classes: Classes, at: Mapping[Node, Node]
) -> dict[Node, list[tuple[Node, float]]]:
    """Return, per node, those whose results it needs, and how long these are on the way."""
    topology, routes = program.topology, program.routes
    before: dict[Node, list[tuple[Node, float]]] = {node: [] for node in at.values()}

    def needs(rank: int, action: Compute, other_rank: int, other: Compute, on_the_way: float) -> None:
        here, there = at.get((rank, action)), at.get((other_rank, other))
        if here and there:
            before[here].append((there, on_the_way))

    for rank, action in before:
        own = (action.stage, action.microbatch)
        if action.kind is Kind.WEIGHT_GRADIENT:
            needs(rank, action, rank, Compute(Kind.INPUT_GRADIENT, *own), 0.0)
        elif action.kind is not Kind.FORWARD:
            needs(rank, action, rank, Compute(Kind.FORWARD, *own), 0.0)
    into = ((rank, link) for rank in classes.members for info in topology.stages_of(rank) for link in topology.links_into(info.stage))
    for rank, link in into:
        edge = costs.on(link, link.edge)
        for k in range(topology.modules[link.target.module].microbatches):
            for message in routes.sent_to(rank, link, k):
                source = classes.leader[message.rank_source]
                size = message_bytes(routes.step, message)
                on_the_way = edge.latency + edge.carry_s(size) if size else 0.0
                for made in message.made_by:
                    forward = Compute(Kind.FORWARD, link.source, made)
                    needs(rank, Compute(Kind.FORWARD, link.target, k), source, forward, on_the_way)
                    if link in program.order.gradients:
                        for back in _GIVES:
                            for given in _GIVES:
                                to, of = Compute(back, link.source, made), Compute(given, link.target, k)
                                needs(source, to, rank, of, on_the_way)
    return before


_GIVES = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
"""What gives the gradient of inputs."""


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
