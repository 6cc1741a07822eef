"""Routes: who sends which rows to whom at the links of a step.

Along an edge both sides cut the rows of a microbatch into *parts*, one per rank: every dp rank has an
interval of the rows (`steps`), and the ranks along tp and cp that hold the dp rank divide its interval evenly.
A message is the overlap of a source part and a target part. So each row crosses once, every rank of both
boundary stages carries an equal share of the traffic, any ratio of dp ranks works, and the target's ranks
put the whole together with an all-gather among themselves.

    source dp ranks (dp=3)   |-- 0 --|-- 1 --|-- 2 --|      rows of the microbatch
    target dp ranks (dp=2)   |---- 0 ----|---- 1 ----|
    messages              0>0     1>0  1>1    2>1

Inside a module a stage hands the hidden states of a dp rank to the rank with the same position in the next
stage: one message, all of it. The backward sends the same messages from target to source: a route is one
value, and its transpose is read off it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.base.samples import overlapping, share
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Link, Module


@attrs.frozen
class Piece:
    """Rows ``start .. stop`` of the step that one microbatch of the source emits."""

    microbatch: int
    start: int
    stop: int


@attrs.frozen
class Message:
    """What one rank sends another on a link for one microbatch of the target.

    A bridge sends `pieces`, in order; a pipeline link sends the hidden states of a `dp_rank` whole and has no pieces.
    """

    link: Link
    microbatch: int
    rank_source: int
    rank_target: int
    dp_rank: int
    pieces: tuple[Piece, ...]

    @property
    def made_by(self) -> tuple[int, ...]:
        """The microbatches of the source whose forward makes this data, ascending."""
        return tuple(piece.microbatch for piece in self.pieces) or (self.microbatch,)

    @property
    def made_first(self) -> int:
        """The first of `made_by`."""
        return self.pieces[0].microbatch if self.pieces else self.microbatch

    @property
    def made_last(self) -> int:
        """The last of `made_by`."""
        return self.pieces[-1].microbatch if self.pieces else self.microbatch

    @property
    def rows(self) -> int:
        """How many rows a bridge's message carries."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@attrs.frozen
class Part:
    """The interval of a step's rows that one rank holds at a bridge, for one microbatch of its module."""

    start: int
    stop: int
    rank: int
    dp_rank: int
    microbatch: int


ByRank = Mapping[int, tuple[Message, ...]]
_Place = tuple[Link, int, int]


@attrs.frozen(eq=False)
class Routes:
    """All messages of a step, link by link.

    They are made dp rank by dp rank, when someone asks: a rank that asks for its own makes those of its dp ranks only.
    """

    step: Step
    _reaching: dict[_Place, ByRank] = attrs.field(factory=dict[_Place, ByRank], init=False, repr=False)
    _first: dict[Link, tuple[int, ...]] = attrs.field(
        factory=dict[Link, tuple[int, ...]], init=False, repr=False
    )
    _leaving: dict[_Place, ByRank] = attrs.field(factory=dict[_Place, ByRank], init=False, repr=False)

    def messages(self, link: Link, microbatch: int) -> tuple[Message, ...]:
        """Return the messages of a link for one microbatch of its target, dp rank by dp rank of the target."""
        dp_ranks = range(self.step.topology.modules[link.target.module].dp_size)
        return tuple(
            message
            for dp_rank in dp_ranks
            for messages in self.reaching(link, microbatch, dp_rank).values()
            for message in messages
        )

    def sent_by(self, rank: int, link: Link, microbatch: int) -> tuple[Message, ...]:
        """Return the messages that leave a rank forward, which are those that return to it backward."""
        dp_rank = self.step.topology.modules[link.source.module].dp_rank_of(rank)
        return self.leaving(link, microbatch, dp_rank).get(rank, ())

    def sent_to(self, rank: int, link: Link, microbatch: int) -> tuple[Message, ...]:
        """Return the messages that reach a rank forward, which are those that leave it backward."""
        dp_rank = self.step.topology.modules[link.target.module].dp_rank_of(rank)
        return self.reaching(link, microbatch, dp_rank).get(rank, ())

    def reaching(self, link: Link, microbatch: int, dp_rank: int) -> ByRank:
        """Return the messages into one dp rank of a link's target by the rank they reach, in order of rows."""
        place = (link, microbatch, dp_rank)
        if place not in self._reaching:
            first = self.first(link, microbatch)
            if first != microbatch:
                known = self.reaching(link, first, dp_rank).items()
                self._reaching[place] = {
                    rank: tuple(self._moved(m, microbatch) for m in messages) for rank, messages in known
                }
            else:
                found = self._bridge_messages if link.edge else self._pipeline_messages
                self._reaching[place] = _grouped((m.rank_target, m) for m in found(link, microbatch, dp_rank))
        return self._reaching[place]

    def leaving(self, link: Link, microbatch: int, dp_rank: int) -> ByRank:
        """Return the messages out of one dp rank of a link's source by the rank they leave, in order of rows."""
        place = (link, microbatch, dp_rank)
        if place not in self._leaving:
            senders = self.step.topology.modules[link.source.module].tp_cp_ranks(link.source, dp_rank)
            self._leaving[place] = _grouped(
                (m.rank_source, m)
                for other in self._targets(link, microbatch, dp_rank)
                for messages in self.reaching(link, microbatch, other).values()
                for m in messages
                if m.rank_source in senders
            )
        return self._leaving[place]

    def first(self, link: Link, microbatch: int) -> int:
        """Return the first microbatch of a link's target whose messages differ from these in their numbers only."""
        if link not in self._first:
            parts, _, each = self._parts(link)
            firsts = self.step.alike(parts)
            self._first[link] = tuple(first * each + place for first in firsts for place in range(each))
        return self._first[link][microbatch]

    def firsts(self, link: Link) -> tuple[int, ...]:
        """Return the microbatches of a link's target that are the first of those that are alike."""
        parts, _, each = self._parts(link)
        return tuple(
            part * each + place for part in sorted(set(self.step.alike(parts))) for place in range(each)
        )

    def made_from(self, link: Link, microbatch: int) -> int:
        """Return the first microbatch of a link's source with samples of the part that a target's one is of."""
        _, made, each = self._parts(link)
        return microbatch // each * made

    def _parts(self, link: Link) -> tuple[int, int, int]:
        """Into how many parts the microbatches of both ends cut a step, and how many each end has in a part."""
        modules = self.step.topology.modules
        source, target = modules[link.source.module].microbatches, modules[link.target.module].microbatches
        parts = math.gcd(source, target)
        return parts, source // parts, target // parts

    def _moved(self, message: Message, microbatch: int) -> Message:
        """Return what becomes of a message in a microbatch that is alike."""
        link = message.link
        there, here = self.made_from(link, message.microbatch), self.made_from(link, microbatch)
        rows = 0
        if link.edge:
            parts, made, _ = self._parts(link)
            starts, size = self.step.rows_start[link.edge.source], len(self.step.samples) // parts
            rows = starts[here // made * size] - starts[there // made * size]
        pieces = tuple(
            Piece(p.microbatch + here - there, p.start + rows, p.stop + rows) for p in message.pieces
        )
        return Message(link, microbatch, message.rank_source, message.rank_target, message.dp_rank, pieces)

    def _targets(self, link: Link, microbatch: int, dp_rank: int) -> Iterable[int]:
        """The dp ranks of a link's target that share samples of its microbatch with a dp rank of its source."""
        if link.edge is None:
            return (dp_rank,)
        modules, total = self.step.topology.modules, len(self.step.samples)
        source, target = modules[link.source.module], modules[link.target.module]
        met = {
            other
            for k in overlapping(microbatch, target.microbatches, source.microbatches)
            for other in target.dp_ranks_over(source.samples(dp_rank, k, total), microbatch, total)
        }
        return sorted(met)

    def _pipeline_messages(self, link: Link, microbatch: int, dp_rank: int) -> Iterator[Message]:
        module = self.step.topology.modules[link.source.module]
        if self.step.has_rows(link.source.module, dp_rank, microbatch):
            ends = zip(
                module.tp_cp_ranks(link.source, dp_rank),
                module.tp_cp_ranks(link.target, dp_rank),
                strict=True,
            )
            for source, target in ends:
                yield Message(link, microbatch, source, target, dp_rank, ())

    def _bridge_messages(self, link: Link, microbatch: int, dp_rank: int) -> Iterator[Message]:
        modules, total = self.step.topology.modules, len(self.step.samples)
        source, target = modules[link.source.module], modules[link.target.module]
        samples = target.samples(dp_rank, microbatch, total)
        wanted = list(dp_rank_parts(self.step, target, link, microbatch, dp_rank))
        given = [
            part
            for k in overlapping(microbatch, target.microbatches, source.microbatches)
            for other in source.dp_ranks_over(samples, k, total)
            for part in dp_rank_parts(self.step, source, link, k, other)
        ]
        overlaps: dict[tuple[int, int], list[Piece]] = {}
        for mine, yours, start, stop in _sweep(given, wanted):
            overlaps.setdefault((mine.rank, yours.rank), []).append(Piece(mine.microbatch, start, stop))
        for (rank_source, rank_target), pieces in overlaps.items():
            yield Message(link, microbatch, rank_source, rank_target, dp_rank, tuple(pieces))


def _grouped(messages: Iterable[tuple[int, Message]]) -> ByRank:
    groups: dict[int, list[Message]] = {}
    for rank, message in messages:
        groups.setdefault(rank, []).append(message)
    return {rank: tuple(group) for rank, group in groups.items()}


def dp_rank_parts(step: Step, module: Module, link: Link, microbatch: int, dp_rank: int) -> Iterator[Part]:
    """Yield what each rank that holds a dp rank has of it at one end of a bridge, in order of rows.

    The end is the one that `module` is: the source's last stage or the target's first.
    """
    assert link.edge
    stage = link.source if module.name == link.edge.source else link.target
    samples = module.samples(dp_rank, microbatch, len(step.samples))
    start, stop = step.rows_of(link.edge.source, samples)
    ranks = module.tp_cp_ranks(stage, dp_rank)
    for i, rank in enumerate(ranks):
        mine = share(i, len(ranks), stop - start)
        yield Part(start + mine.start, start + mine.stop, rank, dp_rank, microbatch)


def _sweep(given: list[Part], wanted: list[Part]) -> Iterator[tuple[Part, Part, int, int]]:
    """Yield the overlaps of two ascending lists of intervals, in order."""
    i = j = 0
    while i < len(given) and j < len(wanted):
        start = max(given[i].start, wanted[j].start)
        stop = min(given[i].stop, wanted[j].stop)
        if start < stop:
            yield given[i], wanted[j], start, stop
        if given[i].stop <= wanted[j].stop:
            i += 1
        else:
            j += 1
