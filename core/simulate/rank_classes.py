"""Fold: which ranks live through a step alike, so that one of them can stand for all.

Ranks are of one *class* if they host the same stages, take part in the same microbatches, and exchange, message
by message, equal amounts with ranks of equal classes. Their programs are then equal, and so are their clocks: what
a rank waits for is another's posting, and the others of its class wait for postings of that other's class at the
same point of theirs. So it is enough to time one rank of each class, exactly.

    vision dp4    0 1 2 3        one class: each sends two messages to its half of the language model
    language dp2    4 5          one class: each receives from two ranks, first from one, then from the other

Classes are found as colours are refined for graph isomorphism: ranks that differ in what they do begin with
different colours, and a colour is split where the colours of peers, or of those who start an action together, differ.
The coarsest partition that no longer splits is reached when the number of colours stays the same.

Nothing is lowered for that. What a rank exchanges is read off the routes, and only for the first of microbatches
that are alike (`steps`): the sequence of the others is one for all ranks.

What counts is all that a program or its clock depends on: which messages there are, in which order, how many of
them share a channel (peers are numbered as they first come up), which microbatches made them, and their sizes where
bandwidth is finite.
"""

import collections
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Tie
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Stage


@attrs.frozen(eq=False)
class Classes:
    """Who stands for whom: the first rank of a class for all its members.

    Attributes:
        leader: for every rank that hosts a module, the one that stands for it.
        members: for every rank that stands for others, these, itself first.
    """

    leader: Mapping[int, int]
    members: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, colours: Mapping[int, Hashable]) -> "Classes":
        """Put ranks of one colour, in the order given, into one class."""
        first: dict[Hashable, int] = {}
        leader = {rank: first.setdefault(colour, rank) for rank, colour in colours.items()}
        members: dict[int, list[int]] = {rank: [] for rank in first.values()}
        for rank, found in leader.items():
            members[found].append(rank)
        return cls(leader, {rank: tuple(ranks) for rank, ranks in members.items()})

    def met(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Return who stands for some ranks, each once, ascending."""
        return tuple(sorted({self.leader[rank] for rank in ranks}))


def alone(ranks: Sequence[int]) -> Classes:
    """Return classes in which every rank stands for itself."""
    return Classes.of({rank: rank for rank in ranks})


def classes_of(
    program: Program, costs: Costs, marks: Callable[[Stage, int], Hashable] | None = None
) -> Classes:
    """Return the classes of a program's ranks.

    `marks` gives what a dp rank of a stage must have in common with others to be of one class with them.
    """
    groups = list(_groups(program))
    met: dict[int, list[int]] = collections.defaultdict(list)
    for number, (_, ranks) in enumerate(groups):
        for rank in ranks:
            met[rank].append(number)
    numbers: dict[Hashable, int] = {}
    colours: dict[int, int] = {}
    peers: dict[int, tuple[int, ...]] = {}
    contacts = _contacts(program, costs)
    for rank in program.topology.ranks:
        local = {rank: 0}
        moved = tuple((fact, local.setdefault(peer, len(local))) for peer, fact in contacts[rank])
        kinds = tuple(groups[number][0] for number in met[rank])
        does = (tuple(_parts(program, rank, marks)), kinds, moved)
        colours[rank] = numbers.setdefault(does, len(numbers))
        peers[rank] = tuple(local)[1:]
    return Classes.of(_refined(colours, peers, met, [ranks for _, ranks in groups]))


def _refined(
    colours: dict[int, int],
    peers: Mapping[int, tuple[int, ...]],
    met: Mapping[int, list[int]],
    groups: Sequence[tuple[int, ...]],
) -> dict[int, int]:
    """Split colours until ranks of one colour have peers of equal colours, and meet equal colours."""
    count = 0
    while len(set(colours.values())) > count:
        count = len(set(colours.values()))
        numbers: dict[Hashable, int] = {}
        sets: dict[frozenset[int], int] = {}
        of_group = [sets.setdefault(frozenset(colours[r] for r in ranks), len(sets)) for ranks in groups]
        colours = {
            rank: numbers.setdefault(
                (
                    colour,
                    tuple(colours[peer] for peer in peers[rank]),
                    tuple(of_group[number] for number in met[rank]),
                ),
                len(numbers),
            )
            for rank, colour in colours.items()
        }
    return colours


def _parts(
    program: Program, rank: int, marks: Callable[[Stage, int], Hashable] | None
) -> Iterator[tuple[Stage, frozenset[int], Hashable]]:
    """Yield the stages of a rank with the microbatches that it takes part in, and its mark."""
    topology, step = program.topology, program.routes.step
    for info in topology.stages_of(rank):
        dp_rank = topology.modules[info.stage.module].dp_rank_of(rank)
        active = step.active(info.stage.module, dp_rank)
        yield info.stage, active, marks(info.stage, dp_rank) if marks else None


def _contacts(program: Program, costs: Costs) -> dict[int, list[tuple[int, int]]]:
    """Return, per rank, the peer of each message that it sends or receives forward, and the number of what else counts.

    Of microbatches that are alike, only the first.
    """
    topology, routes = program.topology, program.routes
    numbers: dict[Hashable, int] = {}
    found: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for link in topology.links:
        sized = math.isfinite(costs.on(link, link.edge).bytes_per_s)
        for k in routes.firsts(link):
            before = routes.repeats(link).source_start(k)
            for dp_rank in range(topology.modules[link.target.module].dp_size):
                for messages in routes.reaching(link, k, dp_rank).values():
                    for message in messages:
                        size = message_bytes(routes.step, message)
                        made = tuple(j - before for j in message.made_by)
                        fact = (link, k, size if sized else size > 0, made)
                        sent = numbers.setdefault((True, fact), len(numbers))
                        received = numbers.setdefault((False, fact), len(numbers))
                        found[message.rank_source].append((message.rank_target, sent))
                        found[message.rank_target].append((message.rank_source, received))
    return found


def _groups(program: Program) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the ranks that start an action together or share a sum, with what tells this from their others."""
    topology = program.topology
    yield from dict.fromkeys(
        (str(reduce), program.joint(rank, reduce)) for rank in topology.ranks for reduce in program.sums(rank)
    )
    for module in topology.modules.values():
        ep_dp_ranks_of = dict.fromkeys(module.ep_dp_ranks(dp_rank) for dp_rank in range(module.dp_size))
        for info in module.stages:
            if info.stage.chunk == 0:
                for dp_ranks in ep_dp_ranks_of:
                    ranks = tuple(r for dp_rank in dp_ranks for r in module.tp_cp_ranks(info.stage, dp_rank))
                    yield f"{info.stage} computes", ranks
        for ranks in module.grid.ranks_along("pp"):
            if Tie(module.stages[0].stage) in set(program.finish(ranks[0])):
                yield f"{module.name} ties", (ranks[0], ranks[-1])
