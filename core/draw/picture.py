"""Picture: what a drawn timeline shows: which ranks, in which order, and how many ranks each stands for.

Up to `MOST` ranks, each has a row. In a larger world only the leader of each rank class has one. Of two timelines of
one program, each rank of the first stands above the same rank of the second.
"""

import collections
import functools
import itertools
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.schedule.actions import Compute
from mimogrid.core.simulate.memory import Level, trace
from mimogrid.core.simulate.timeline import Event, Idle, MessageInterval, PathSegment, Timeline
from mimogrid.core.topology.topology import Topology


MOST = 64
"""The most ranks, or rank classes, that are drawn."""


@attrs.frozen(eq=False)
class Row:
    """A rank of a timeline.

    Attributes:
        timeline: of the whole step.
        rank: the rank.
        count: how many ranks it stands for, itself included.
        critical: the segments of the critical path that it takes part in.
        source: which of several timelines this is, if there are several.
        has_memory: whether the memory of the rank is shown.
    """

    timeline: Timeline
    rank: int
    count: int
    critical: tuple[PathSegment, ...]
    source: str = ""
    has_memory: bool = True

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that the rank hosts."""
        return tuple(dict.fromkeys(info.stage.module for info in self._topology.role(self.rank).stages))

    @property
    def name(self) -> str:
        """The rank with its stages, and how many ranks it stands for."""
        stages = " ".join(str(info.stage) for info in self._topology.role(self.rank).stages)
        return f"rank {self.rank}{f' x {self.count}' if self.count > 1 else ''}  {stages}"

    @functools.cached_property
    def events(self) -> tuple[Event, ...]:
        """The events of the rank."""
        return self.timeline.events_of(self.rank)

    @property
    def computes(self) -> Iterator[tuple[Event, Compute]]:
        """The events in which the rank computes, with their actions."""
        return ((event, event.action) for event in self.events if isinstance(event.action, Compute))

    @functools.cached_property
    def idles(self) -> tuple[Idle, ...]:
        """When the rank computes nothing, and why."""
        return self.timeline.idles_of(self.rank)

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """What the rank holds over time, if that is shown."""
        return trace(self.timeline, self.rank) if self.has_memory else ()

    @property
    def _topology(self) -> Topology:
        return self.timeline.program.topology


@attrs.frozen(eq=False)
class Picture:
    """Rows from top to bottom.

    Attributes:
        title: the text above them.
        rows: the ranks.
        note: what is not shown, in words.
        arrows: whether messages are shown.
    """

    title: str
    rows: tuple[Row, ...]
    note: str = ""
    arrows: bool = True

    @property
    def groups(self) -> Iterator[tuple[tuple[str, ...], tuple[Row, ...]]]:
        """Yield rows next to each other that host the same modules, with these modules."""
        for modules, rows in itertools.groupby(self.rows, key=lambda row: row.modules):
            yield modules, tuple(rows)

    @property
    def messages(self) -> Iterator[MessageInterval]:
        """Yield the messages between ranks that are drawn; messages of other ranks are those of their leaders."""
        if not self.arrows:
            return
        rows = {row.rank: row for row in self.rows}
        for row in self.rows:
            leader = row.timeline.classes.leader
            known: set[MessageInterval] = set()
            for message in row.timeline.message_intervals_of(row.rank):
                target = message.rank_target if message.rank_target in rows else leader[message.rank_target]
                drawn = attrs.evolve(message, rank_target=target)
                if target in rows and target != row.rank and drawn not in known:
                    known.add(drawn)
                    yield drawn


def picture(timeline: Timeline, title: str = "") -> Picture:
    """Return the picture of a timeline."""
    chosen, note = _chosen(timeline)
    segments = _segments(timeline)
    rows = (
        Row(timeline, rank, count, tuple(segments[timeline.classes.leader[rank]]))
        for rank, count in chosen.items()
    )
    return Picture(title, tuple(rows), note)


def above(planned: Timeline, measured: Timeline, title: str = "") -> Picture:
    """Return the picture of a planned timeline above the measured one, rank by rank. Both are of one program."""
    chosen, note = _chosen(planned)
    segments = _segments(planned)
    rows: list[Row] = []
    for rank, count in chosen.items():
        critical = tuple(segments[planned.classes.leader[rank]])
        rows.append(Row(planned, rank, count, critical, "planned", has_memory=False))
        rows.append(Row(measured, rank, 1, (), "measured"))
    return Picture(title, tuple(rows), note, arrows=False)


def _segments(timeline: Timeline) -> Mapping[int, list[PathSegment]]:
    """Return the segments of the critical path that each leader takes part in, or a rank of its class."""
    found: dict[int, list[PathSegment]] = collections.defaultdict(list)
    for segment in timeline.critical_path:
        for leader in timeline.classes.leaders_of(timeline.program.joint(segment.rank, segment.action)):
            found[leader].append(segment)
    return found


def _chosen(timeline: Timeline) -> tuple[Mapping[int, int], str]:
    """Return the ranks that are drawn, with how many ranks each stands for, and what is not drawn, in words."""
    classes = timeline.classes
    if len(classes.leader) <= MOST:
        return dict.fromkeys(classes.leader, 1), ""
    counts = {rank: len(ranks) for rank, ranks in classes.members.items()}
    chosen = dict(itertools.islice(counts.items(), MOST))
    if len(counts) > MOST:
        rest = sum(counts.values()) - sum(chosen.values())
        return (
            chosen,
            f"of {len(counts):,} classes of ranks the first {MOST} are drawn; {rest:,} ranks are not",
        )
    return chosen, f"of {len(classes.leader):,} ranks, one of each class is drawn, and how many are like it"
