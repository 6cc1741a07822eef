"""Rank classes: which ranks live through a step alike, so that one of them, the leader, stands for all.

Ranks are of one *class* if they host the same stages, take part in the same microbatches, and exchange, message by
message, equal amounts with ranks that post alike. Then their programs are equal, and so are their clocks: where a rank
waits for a peer to post, the others of its class wait for a peer that posts at the same time, at the same point of
their programs. So it is enough to time one rank of each class, and the times are exact.

    vision dp4    0 1 2 3        one class: each sends two messages to its half of the language model
    language dp2    4 5          one class: each receives from two ranks, first from one, then from the other

Ranks *post* alike if they compute together, whatever each of them waits for in between: `lower` posts when a compute
action has ended, before any wait. So the tp ranks of a dp rank of a pipeline's second stage are one class even where
those of the first stage are fed unequal parts. Where a send blocks its rank, only ranks of one class post alike.

Classes are found by colour refinement, as in tests of graph isomorphism. Ranks that differ in what they do start with
different colours. A colour is split where peers post differently, or where the colours differ of ranks that start an
action together. The coarsest partition is reached when the number of colours no longer grows.

Nothing is lowered for this. The routes say what a rank exchanges, and only the first of microbatches that are alike is
looked at (`step`): the sequence of the others is the same for all ranks.

Everything counts that a program or its clock depends on: which messages there are, in which order, how many of them
share a channel (peers are numbered as they first come up), which microbatches made them, and their sizes where
bandwidth is finite.
"""

import collections
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Collective
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Stage
from mimogrid.core.update.buckets import buckets_of


@attrs.frozen(eq=False)
class RankClasses:
    """Which rank stands for which others.

    Attributes:
        leader: for every rank that hosts a module, the leader of its class.
        members: for every leader, the ranks of its class, the leader first.
        collapsed: a smaller program to time instead, if there is one (`collapse`).
    """

    leader: Mapping[int, int]
    members: Mapping[int, tuple[int, ...]]
    collapsed: "Collapsed | None" = None

    @classmethod
    def of(cls, colours: Mapping[int, Hashable]) -> "RankClasses":
        """Put ranks of one colour into one class, with the first of them as its leader."""
        first: dict[Hashable, int] = {}
        leader = {rank: first.setdefault(colour, rank) for rank, colour in colours.items()}
        members: dict[int, list[int]] = {rank: [] for rank in first.values()}
        for rank, found in leader.items():
            members[found].append(rank)
        return cls(leader, {rank: tuple(ranks) for rank, ranks in members.items()})

    def leaders_of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Return the leaders of some ranks, each once, ascending."""
        return tuple(sorted({self.leader[rank] for rank in ranks}))


@attrs.frozen(eq=False)
class Collapsed:
    """A program on fewer ranks that takes exactly as long as the whole one.

    Attributes:
        program: with one rank for all ranks along tp and cp.
        classes: the rank classes of that program.
        leader: for every leader of these classes, the leader in the whole program.
    """

    program: Program
    classes: RankClasses
    leader: Mapping[int, int]


def each_alone(ranks: Iterable[int]) -> RankClasses:
    """Return classes of one rank each."""
    return RankClasses.of({rank: rank for rank in ranks})


def alike_in_time(
    program: Program, costs: Costs, marks: Callable[[Stage, int], Hashable] | None = None
) -> RankClasses:
    """Return the classes of ranks that do the same at the same times.

    `marks` gives for a stage and a dp rank what it must have in common with the others of its class.
    """
    groups = list(_groups(program))
    groups_of: dict[int, list[int]] = collections.defaultdict(list)
    for number, group in enumerate(groups):
        for rank in group.ranks:
            groups_of[rank].append(number)
    numbers: dict[Hashable, int] = {}
    colours: dict[int, int] = {}
    posts: dict[int, int] = {}
    peers: dict[int, tuple[int, ...]] = {}
    contacts = _contacts(program, costs)
    for rank in program.topology.ranks:
        local = {rank: 0}
        found = contacts[rank]
        moved = tuple((contact.fact, local.setdefault(contact.peer, len(local))) for contact in found)
        kinds = tuple(groups[number].kind for number in groups_of[rank])
        parts = tuple(_parts(program, rank))
        marked = tuple(marks(stage, dp_rank) for stage, dp_rank, _ in parts) if marks else ()
        does = tuple((stage, active) for stage, _, active in parts)
        colours[rank] = numbers.setdefault((does, marked, kinds, moved), len(numbers))
        posts[rank] = numbers.setdefault((does, frozenset(each.post for each in found)), len(numbers))
        peers[rank] = tuple(local)[1:]
    computing = {
        rank: tuple(number for number in mine if groups[number].computes)
        for rank, mine in groups_of.items()
        if all(costs.on(link, link.edge).overlap for link in program.topology.links)
    }
    ranks_of = [group.ranks for group in groups]
    return RankClasses.of(_refined(colours, _Posts(posts, computing), peers, groups_of, ranks_of))


def alike_in_bytes(program: Program, classes: RankClasses) -> RankClasses:
    """Split classes further, until the ranks of each also hold the same bytes over time."""
    if classes.collapsed is not None:
        return classes
    return RankClasses.of(
        {
            rank: (leader, tuple(_sizes(program, rank)) if len(classes.members[leader]) > 1 else ())
            for rank, leader in classes.leader.items()
        }
    )


@attrs.frozen(eq=False)
class _Posts:
    """When the ranks post, as far as their peers wait for it.

    A rank posts when a compute action has ended, which it has for all ranks that started it at the same time. So what
    a peer must know is what the rank posts at which of its actions (`what`), and the colours of the groups that it
    computes with (`computing`). Where a send blocks its rank, there are no such groups, and its own colour counts.
    """

    what: Mapping[int, int]
    computing: Mapping[int, tuple[int, ...]]

    def seen(self, colours: Mapping[int, int], of_group: Sequence[int]) -> Mapping[int, int]:
        """Return a number for each rank that is equal for ranks whose peers cannot tell them apart."""
        if not self.computing:
            return colours
        numbers: dict[Hashable, int] = {}
        return {
            rank: numbers.setdefault((what, tuple(of_group[i] for i in self.computing[rank])), len(numbers))
            for rank, what in self.what.items()
        }


def _refined(
    colours: dict[int, int],
    posts: _Posts,
    peers: Mapping[int, tuple[int, ...]],
    groups_of: Mapping[int, list[int]],
    groups: Sequence[tuple[int, ...]],
) -> dict[int, int]:
    """Split colours until ranks of one colour have peers that post alike, and groups of equal colours."""
    count = 0
    while len(set(colours.values())) > count:
        count = len(set(colours.values()))
        numbers: dict[Hashable, int] = {}
        sets: dict[frozenset[int], int] = {}
        of_group = [sets.setdefault(frozenset(colours[r] for r in ranks), len(sets)) for ranks in groups]
        seen = posts.seen(colours, of_group)
        colours = {
            rank: numbers.setdefault(
                (
                    colour,
                    tuple(seen[peer] for peer in peers[rank]),
                    tuple(of_group[number] for number in groups_of[rank]),
                ),
                len(numbers),
            )
            for rank, colour in colours.items()
        }
    return colours


def _parts(program: Program, rank: int) -> Iterator[tuple[Stage, int, frozenset[int]]]:
    """Yield the stages of a rank, with its dp rank there and the microbatches that it takes part in."""
    topology, step = program.topology, program.routes.step
    for info in topology.role(rank).stages:
        dp_rank = topology.modules[info.stage.module].dp_rank_of(rank)
        yield info.stage, dp_rank, step.active(info.stage.module, dp_rank)


class _Contact(NamedTuple):
    """A message that a rank sends or receives forward.

    Attributes:
        peer: the rank at the other end.
        fact: a number for all that its clock may depend on.
        post: a number for all that counts for when it is posted.
    """

    peer: int
    fact: int
    post: int


def _contacts(program: Program, costs: Costs) -> dict[int, list[_Contact]]:
    """Return the messages of each rank. Of microbatches that are alike, only the first is looked at."""
    topology, routes = program.topology, program.routes
    numbers: dict[Hashable, int] = {}
    found: dict[int, list[_Contact]] = collections.defaultdict(list)
    for link in topology.links:
        sized = math.isfinite(costs.on(link, link.edge).bytes_per_s)
        for k in routes.firsts(link):
            before = routes.repeats(link).source_start(k)
            for dp_rank in range(topology.modules[link.target.module].dp_size):
                for messages in routes.reaching(link, k, dp_rank).values():
                    for message in messages:
                        size = message_bytes(routes.step, message)
                        made = tuple(j - before for j in message.made_by)
                        post = numbers.setdefault((link, k, made), 2 * len(numbers))
                        fact = numbers.setdefault((post, size if sized else size > 0), 2 * len(numbers))
                        ends = message.rank_source, message.rank_target
                        found[ends[0]].append(_Contact(ends[1], fact, post))
                        found[ends[1]].append(_Contact(ends[0], fact + 1, post + 1))
    return found


class _Group(NamedTuple):
    """Ranks that start an action together or share collectives; `kind` tells this group from others."""

    kind: str
    ranks: tuple[int, ...]
    computes: bool = False


def _groups(program: Program) -> Iterator[_Group]:
    """Yield the groups of ranks."""
    topology = program.topology
    yield from dict.fromkeys(group for rank in topology.ranks for group in _sharing(program, rank))
    for module in topology.modules.values():
        together = dict.fromkeys(module.ep_dp_ranks(dp_rank) for dp_rank in range(module.dp_size))
        for info in module.stages:
            if info.stage.chunk == 0:
                for dp_ranks in together:
                    ranks = tuple(r for dp_rank in dp_ranks for r in module.tp_cp_ranks(info.stage, dp_rank))
                    yield _Group(f"{info.stage} computes", ranks, computes=True)
        for ranks in module.grid.ranks_along("pp"):
            if module.stages[0].stage in program.ties(ranks[0]):
                yield _Group(f"{module.name} ties", (ranks[0], ranks[-1]))


def _sharing(program: Program, rank: int) -> Iterator[_Group]:
    """Yield the groups of a rank that share collectives, a group for each kind and section of a stage."""
    topology = program.topology
    sections = {
        info.stage: [bucket.section for bucket in buckets_of(topology, info, rank)]
        for info in topology.role(rank).stages
    }
    shared: dict[Hashable, list[Collective]] = {}
    for each in program.collectives(rank):
        section = sections[each.stage][each.bucket]
        shared.setdefault((type(each), each.stage, section), []).append(each)
    for alike in shared.values():
        buckets = ",".join(str(each.bucket) for each in alike)
        yield _Group(f"{alike[0]} of {buckets}", program.joint(rank, alike[0]))


def _sizes(program: Program, rank: int) -> Iterator[Hashable]:
    """Yield the sizes of what a rank computes on and exchanges, of microbatches that are alike only for the first.

    Peers are numbered as they come: a message is over where its peer answers, which another peer does not.
    """
    topology, routes, step = program.topology, program.routes, program.routes.step
    peers = {rank: 0}
    for info in topology.role(rank).stages:
        module = topology.modules[info.stage.module]
        dp_rank = module.dp_rank_of(rank)
        for k in sorted(set(step.alike(module.microbatches))):
            yield step.shape(module.name, dp_rank, k)
        for link in (*topology.links_into(info.stage), *topology.links_from(info.stage)):
            at_source = link.source == info.stage
            for k, messages in routes.firsts_of(rank, link, at_source=at_source):
                sizes: dict[int, int] = collections.defaultdict(int)
                for message in messages:
                    peer = message.rank_target if at_source else message.rank_source
                    sizes[peers.setdefault(peer, len(peers))] += message_bytes(step, message)
                yield k, tuple(sizes.items())
