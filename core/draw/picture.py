"""Picture: what a drawn timeline shows: which ranks, in which order, and how many ranks each stands for.

Up to `EACH` ranks, each has a row. In a larger world one row stands for all ranks that compute the same at the same
times. Of two timelines of one program, each rank of the first stands above the same rank of the second.

Where a step is too long for most of its numbers, `zooms` shows its begin and its end once more, on a scale that has
room.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import attrs

from mimogrid.core.schedule.actions import Compute
from mimogrid.core.simulate.memory import Level, trace
from mimogrid.core.simulate.timeline import Event, Idle, MessageInterval, PathSegment, Timeline
from mimogrid.core.topology.topology import StageInfo, Topology


EACH = 16
"""In a larger world ranks that are alike share a row."""
MOST = 64
"""The most rows that are drawn."""
ALIKE = 1e6
"""Times that differ by less than this part of a step are drawn at one place."""
Window = tuple[float, float]
"""From one second of a step to another."""


Part = TypeVar("Part", Event, Idle, PathSegment)


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
        window: the part of the step that is shown; None: all of it.
    """

    timeline: Timeline
    rank: int
    count: int
    critical: tuple[PathSegment, ...]
    source: str = ""
    has_memory: bool = True
    window: Window | None = None

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        """The stages that the rank hosts."""
        return self._topology.role(self.rank).stages

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that the rank hosts."""
        return tuple(dict.fromkeys(info.stage.module for info in self.stages))

    @property
    def name(self) -> str:
        """The rank with its stages, and how many ranks it stands for."""
        stages = " ".join(str(info.stage) for info in self.stages)
        return f"rank {self.rank}{f' x {self.count}' if self.count > 1 else ''}  {stages}"

    @property
    def extent(self) -> Window:
        """From when to when the row is shown, in seconds."""
        return self.window or (0.0, self.timeline.step_s)

    @functools.cached_property
    def events(self) -> tuple[Event, ...]:
        """The events of the rank, as far as they are shown."""
        return tuple(self._within(self.timeline.events_of(self.rank)))

    @property
    def computes(self) -> Iterator[tuple[Event, Compute]]:
        """The events in which the rank computes, with their actions."""
        return ((event, event.action) for event in self.events if isinstance(event.action, Compute))

    @functools.cached_property
    def idles(self) -> tuple[Idle, ...]:
        """When the rank computes nothing, and why."""
        return tuple(self._within(self.timeline.idles_of(self.rank)))

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """What the rank holds over time, if that is shown."""
        if not self.has_memory:
            return ()
        levels, (begin, end) = trace(self.timeline, self.rank), self.extent
        before = [level for level in levels if level.at_s <= begin][-1:]
        first = [attrs.evolve(level, at_s=begin) for level in before]
        return (*first, *(level for level in levels if begin < level.at_s <= end))

    @functools.cached_property
    def outlined(self) -> tuple[PathSegment, ...]:
        """The segments of the critical path, as far as they are shown."""
        return tuple(self._within(self.critical))

    def _within(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Yield parts of a timeline, cut to what is shown."""
        if self.window is None:
            yield from parts
            return
        begin, end = self.window
        for part in parts:
            if part.begin_s < end and part.end_s > begin:
                yield attrs.evolve(part, begin_s=max(part.begin_s, begin), end_s=min(part.end_s, end))

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
        stands_for: for every rank that is not drawn, the one that is drawn for it.
        window: the part of the step that is shown; None: all of it.
    """

    title: str
    rows: tuple[Row, ...]
    note: str = ""
    arrows: bool = True
    stands_for: Mapping[int, int] = attrs.field(factory=dict[int, int])
    window: Window | None = None

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
            known: set[MessageInterval] = set()
            begin, end = row.extent
            for message in row.timeline.message_intervals_of(row.rank):
                if message.begin_s < begin or message.end_s > end:
                    continue
                target = self.stands_for.get(message.rank_target, message.rank_target)
                drawn = attrs.evolve(message, rank_target=target)
                if target in rows and target != row.rank and drawn not in known:
                    known.add(drawn)
                    yield drawn


def picture(timeline: Timeline, title: str = "", most: int = MOST) -> Picture:
    """Return the picture of a timeline, with so many rows at most."""
    stands_for = _folded(timeline)
    counts = collections.Counter(stands_for.values())
    segments = _segments(timeline)
    chosen = [*counts][:most]
    rows = (
        Row(timeline, rank, counts[rank], tuple(segments[timeline.classes.leader[rank]])) for rank in chosen
    )
    return Picture(title, tuple(rows), _note(counts, most), stands_for=stands_for)


def above(planned: Timeline, measured: Timeline, title: str = "") -> Picture:
    """Return the picture of a planned timeline above the measured one, rank by rank. Both are of one program."""
    segments = _segments(planned)
    members = planned.classes.members
    many = len(planned.classes.leader) > MOST
    counts = (
        {rank: len(ranks) for rank, ranks in members.items()}
        if many
        else dict.fromkeys(planned.classes.leader, 1)
    )
    rows: list[Row] = []
    for rank, count in itertools.islice(counts.items(), MOST):
        critical = tuple(segments[planned.classes.leader[rank]])
        rows.append(Row(planned, rank, count, critical, "planned", has_memory=False))
        rows.append(Row(measured, rank, 1, (), "measured"))
    return Picture(title, tuple(rows), _note(counts, MOST), arrows=False)


def zooms(whole: Picture, seconds: float) -> tuple[Picture, ...]:
    """Return the first and the last seconds of a picture as pictures of their own."""
    step_s = max((row.timeline.step_s for row in whole.rows), default=0.0)
    windows = {"warm-up, the first": (0.0, seconds), "drain, the last": (step_s - seconds, step_s)}
    return tuple(
        attrs.evolve(
            whole,
            title=f"{what} {seconds:.3g} s",
            note="",
            rows=tuple(attrs.evolve(row, window=window) for row in whole.rows),
            window=window,
        )
        for what, window in windows.items()
    )


def _folded(timeline: Timeline) -> Mapping[int, int]:
    """Return, for every rank, the one that is drawn for it: the first that computes the same at the same times."""
    leader = timeline.classes.leader
    if len(leader) <= EACH:
        return {rank: rank for rank in leader}
    first: dict[object, int] = {}
    drawn = {each: first.setdefault(_looks(timeline, each), each) for each in timeline.classes.members}
    return {rank: drawn[leader[rank]] for rank in leader}


def _looks(timeline: Timeline, rank: int) -> tuple[object, ...]:
    """Return what tells the row of a rank from others."""
    scale = ALIKE / timeline.step_s if timeline.step_s else 0.0
    stages = tuple(info.stage for info in timeline.program.topology.role(rank).stages)
    computes = (event for event in timeline.events_of(rank) if isinstance(event.action, Compute))
    return stages, tuple(
        (each.action, round(each.begin_s * scale), round(each.end_s * scale)) for each in computes
    )


def _note(counts: Mapping[int, int], most: int) -> str:
    """Say what is not drawn."""
    ranks = sum(counts.values())
    if len(counts) > most:
        rest = sum(itertools.islice(counts.values(), most, None))
        return f"of {len(counts):,} kinds of ranks the first {most} are drawn; {rest:,} ranks are not"
    return (
        f"of {ranks:,} ranks, those that do the same at the same times share a row"
        if len(counts) < ranks
        else ""
    )


def _segments(timeline: Timeline) -> Mapping[int, list[PathSegment]]:
    """Return the segments of the critical path that each leader takes part in, or a rank of its class."""
    found: dict[int, list[PathSegment]] = collections.defaultdict(list)
    for segment in timeline.critical_path:
        for leader in timeline.classes.leaders_of(timeline.program.joint(segment.rank, segment.action)):
            found[leader].append(segment)
    return found
