"""Routes: who sends which rows to whom on the links of a step.

At a bridge both ends cut the rows of a microbatch into ranges, one per rank. Every dp rank has an interval of
the rows (`step`), and its tp and cp ranks divide that interval evenly. A message is the overlap of a range of
the source and a range of the target. So each row crosses once, all ranks of both stages carry equal shares of
the traffic, and any ratio of dp sizes works. The target's tp and cp ranks then all-gather the rows. ::

    source dp ranks (dp=3)   |-- 0 --|-- 1 --|-- 2 --|      rows of the microbatch
    target dp ranks (dp=2)   |---- 0 ----|---- 1 ----|
    messages              0>0     1>0  1>1    2>1

On a pipeline link a rank sends the hidden states of its dp rank to the rank at the same position of the next
stage, in one message. The backward sends the same messages from target to source, so a route is stored once.
"""

import collections
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import overlapping, share
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Link, Module


@attrs.frozen
class RowSlice:
    """Rows ``start .. stop`` of the step, emitted by one microbatch of the source."""

    microbatch: int
    start: int
    stop: int


@attrs.frozen
class Message:
    """What one rank sends another on a link for one microbatch of the target.

    At a bridge a message has `pieces`, in order of rows. On a pipeline link it has none: it carries all hidden
    states of `dp_rank`.
    """

    link: Link
    microbatch: int
    rank_source: int
    rank_target: int
    dp_rank: int
    pieces: tuple[RowSlice, ...]

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
        """Number of rows in a message of a bridge."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@attrs.frozen
class RowRange:
    """Rows ``start .. stop`` of the step, held by one rank at a bridge for one microbatch of its module."""

    start: int
    stop: int
    rank: int
    dp_rank: int
    microbatch: int


ByRank = Mapping[int, tuple[Message, ...]]
_Key = tuple[Link, int, int]
"""A link, a microbatch of its target, and a dp rank at one of its ends."""


@attrs.frozen(eq=False)
class Repeats:
    """Which microbatches of a link repeat an earlier one.

    The microbatches of both ends cut the step into `parts`, each of which holds complete microbatches of both. Two
    parts whose samples have the same rows have the same messages, at other microbatches and other rows of the step.

    Attributes:
        first: For each microbatch of the target, the first one with the same messages but for their numbers.
        rows_start: For each part, the first row of the source module; zeros on a pipeline link.
        sources: Microbatches of the link's source in a part.
        targets: Microbatches of the link's target in a part.
    """

    first: tuple[int, ...]
    rows_start: tuple[int, ...]
    sources: int
    targets: int

    @classmethod
    def of(cls, step: Step, link: Link) -> "Repeats":
        """Compare the parts of a step."""
        modules = step.topology.modules
        source, target = modules[link.source.module].microbatches, modules[link.target.module].microbatches
        parts = math.gcd(source, target)
        targets = target // parts
        first = tuple(part * targets + place for part in step.alike(parts) for place in range(targets))
        starts = [
            step.rows_start[link.edge.source][step.part(i, parts).start] if link.edge else 0
            for i in range(parts)
        ]
        return cls(first, tuple(starts), source // parts, targets)

    @functools.cached_property
    def firsts(self) -> tuple[int, ...]:
        """The microbatches of the target that repeat no earlier one, ascending."""
        return tuple(sorted(set(self.first)))

    @functools.cached_property
    def times(self) -> Mapping[int, int]:
        """How many microbatches each of `firsts` stands for, itself included."""
        return collections.Counter(self.first)

    def source_start(self, microbatch: int) -> int:
        """Return the first microbatch of the source in the part of a microbatch of the target."""
        return microbatch // self.targets * self.sources

    def moved(self, message: Message, microbatch: int) -> Message:
        """Return the message of a microbatch that repeats the message's own."""
        pieces = message.pieces
        if pieces:
            before, after = message.microbatch // self.targets, microbatch // self.targets
            made, rows = (after - before) * self.sources, self.rows_start[after] - self.rows_start[before]
            pieces = tuple(RowSlice(p.microbatch + made, p.start + rows, p.stop + rows) for p in pieces)
        ends = message.rank_source, message.rank_target
        return Message(message.link, microbatch, *ends, message.dp_rank, pieces)


@attrs.frozen(eq=False)
class Routes:
    """All messages of a step, link by link.

    They are made when they are asked for, one dp rank at a time: a rank that asks for its own messages makes
    those of its own dp ranks only.
    """

    step: Step
    _repeats: dict[Link, Repeats] = attrs.field(factory=dict[Link, Repeats], init=False, repr=False)
    _reaching: dict[_Key, ByRank] = attrs.field(factory=dict[_Key, ByRank], init=False, repr=False)
    _leaving: dict[_Key, ByRank] = attrs.field(factory=dict[_Key, ByRank], init=False, repr=False)
    _senders: dict[_Key, ByRank] = attrs.field(factory=dict[_Key, ByRank], init=False, repr=False)

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
        """Return the messages that a rank sends in the forward and receives in the backward."""
        dp_rank = self.step.topology.modules[link.source.module].dp_rank_of(rank)
        return self.leaving(link, microbatch, dp_rank).get(rank, ())

    def sent_to(self, rank: int, link: Link, microbatch: int) -> tuple[Message, ...]:
        """Return the messages that a rank receives in the forward and sends in the backward."""
        dp_rank = self.step.topology.modules[link.target.module].dp_rank_of(rank)
        return self.reaching(link, microbatch, dp_rank).get(rank, ())

    def reaching(self, link: Link, microbatch: int, dp_rank: int) -> ByRank:
        """Return the messages into one dp rank of a link's target, by receiving rank, in order of rows."""
        key = (link, microbatch, dp_rank)
        if key not in self._reaching:
            repeats = self.repeats(link)
            first = repeats.first[microbatch]
            if first != microbatch:
                self._reaching[key] = {
                    rank: tuple(repeats.moved(m, microbatch) for m in messages)
                    for rank, messages in self.reaching(link, first, dp_rank).items()
                }
            else:
                found = self._bridge_messages if link.edge else self._pipeline_messages
                self._reaching[key] = _grouped((m.rank_target, m) for m in found(link, microbatch, dp_rank))
        return self._reaching[key]

    def leaving(self, link: Link, microbatch: int, dp_rank: int) -> ByRank:
        """Return the messages out of one dp rank of a link's source, by sending rank, in order of rows."""
        key = (link, microbatch, dp_rank)
        if key not in self._leaving:
            senders = self.step.topology.modules[link.source.module].tp_cp_ranks(link.source, dp_rank)
            self._leaving[key] = _grouped(
                (rank, message)
                for other in self.receivers(link, microbatch, dp_rank)
                for rank in senders
                for message in self._by_sender(link, microbatch, other).get(rank, ())
            )
        return self._leaving[key]

    def _by_sender(self, link: Link, microbatch: int, dp_rank: int) -> ByRank:
        """Return the messages into one dp rank of a link's target, by sending rank."""
        key = (link, microbatch, dp_rank)
        if key not in self._senders:
            reaching = self.reaching(link, microbatch, dp_rank).values()
            self._senders[key] = _grouped((m.rank_source, m) for messages in reaching for m in messages)
        return self._senders[key]

    def repeats(self, link: Link) -> Repeats:
        """Return which microbatches of a link repeat an earlier one."""
        if link not in self._repeats:
            self._repeats[link] = Repeats.of(self.step, link)
        return self._repeats[link]

    def first(self, link: Link, microbatch: int) -> int:
        """Return the first microbatch of a link's target with the same messages but for their numbers."""
        return self.repeats(link).first[microbatch]

    def firsts(self, link: Link) -> tuple[int, ...]:
        """Return the microbatches of a link's target that repeat no earlier one."""
        return self.repeats(link).firsts

    def firsts_of(
        self, rank: int, link: Link, *, at_source: bool
    ) -> Iterator[tuple[int, tuple[Message, ...]]]:
        """Yield a rank's messages at one end of a link for each of `firsts`; not where it has none."""
        module = self.step.topology.modules[(link.source if at_source else link.target).module]
        dp_rank = module.dp_rank_of(rank)
        side, ks = (
            (self.leaving, self.fed(link, dp_rank)) if at_source else (self.reaching, self.firsts(link))
        )
        for k in ks:
            messages = side(link, k, dp_rank).get(rank)
            if messages:
                yield k, messages

    def fed(self, link: Link, dp_rank: int) -> Sequence[int]:
        """Return those of `firsts` that have samples of a dp rank of the source, or a few more."""
        modules, firsts = self.step.topology.modules, self.firsts(link)
        source, target = modules[link.source.module], modules[link.target.module]
        if len(firsts) <= source.microbatches:
            return firsts
        total, count = self.step.cell_count, target.microbatches
        cells = (cell for j in range(source.microbatches) for cell in source.samples(dp_rank, j, total))
        fed = {((cell + 1) * count - 1) // total for cell in cells}
        return [k for k in firsts if k in fed]

    def receivers(self, link: Link, microbatch: int, dp_rank: int) -> Iterable[int]:
        """Return the dp ranks of a link's target that share samples of its microbatch with a dp rank of its source."""
        if link.edge is None:
            return (dp_rank,)
        modules, total = self.step.topology.modules, self.step.cell_count
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
        modules, total = self.step.topology.modules, self.step.cell_count
        source, target = modules[link.source.module], modules[link.target.module]
        cells = target.samples(dp_rank, microbatch, total)
        wanted = list(row_ranges(self.step, target, link, microbatch, dp_rank))
        emitted = [
            held
            for k in overlapping(microbatch, target.microbatches, source.microbatches)
            for other in source.dp_ranks_over(cells, k, total)
            for held in row_ranges(self.step, source, link, k, other)
        ]
        overlaps: dict[tuple[int, int], list[RowSlice]] = {}
        for mine, yours, start, stop in _overlaps(emitted, wanted):
            overlaps.setdefault((mine.rank, yours.rank), []).append(RowSlice(mine.microbatch, start, stop))
        for (rank_source, rank_target), pieces in overlaps.items():
            yield Message(link, microbatch, rank_source, rank_target, dp_rank, tuple(pieces))


def _grouped(messages: Iterable[tuple[int, Message]]) -> ByRank:
    groups: dict[int, list[Message]] = {}
    for rank, message in messages:
        groups.setdefault(rank, []).append(message)
    return {rank: tuple(group) for rank, group in groups.items()}


def row_ranges(step: Step, module: Module, link: Link, microbatch: int, dp_rank: int) -> Iterator[RowRange]:
    """Yield the rows of a dp rank at one end of a bridge, cut over its tp and cp ranks, in order of rows.

    `module` is the source or the target of the bridge; its end is the source's last stage or the target's first.
    """
    assert link.edge
    stage = link.source if module.name == link.edge.source else link.target
    start, stop = step.rows_of(link.edge.source, step.samples_of(module.name, dp_rank, microbatch))
    ranks = module.tp_cp_ranks(stage, dp_rank)
    for i, rank in enumerate(ranks):
        mine = share(i, len(ranks), stop - start)
        yield RowRange(start + mine.start, start + mine.stop, rank, dp_rank, microbatch)


def _overlaps(
    emitted: list[RowRange], wanted: list[RowRange]
) -> Iterator[tuple[RowRange, RowRange, int, int]]:
    """Yield the overlaps of two ascending lists of ranges, in order: both ranges, start and stop."""
    i = j = 0
    while i < len(emitted) and j < len(wanted):
        start = max(emitted[i].start, wanted[j].start)
        stop = min(emitted[i].stop, wanted[j].stop)
        if start < stop:
            yield emitted[i], wanted[j], start, stop
        if emitted[i].stop <= wanted[j].stop:
            i += 1
        else:
            j += 1
