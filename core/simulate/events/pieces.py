"""Pieces of time, each behind others, and the clock that gives the begin and the end of each.

Without a limit on cores a piece begins when the last piece that it is behind has ended. With a limit, compute actions
that run at once share the cores evenly, and the clock goes from event to event.
"""

import heapq
from collections.abc import Sequence

from mimogrid.core.schedule.actions import Action


Clock = tuple[Sequence[float], Sequence[float]]
"""The begin and the end of each piece, in seconds."""


class Pieces:
    """Pieces of time by number: each takes its seconds after all that it is behind have ended.

    A compute action uses `cores`. `labels` has the rank and the action that a piece belongs to. Piece 0 is the begin of
    the step.
    """

    def __init__(self) -> None:
        self.behind: list[tuple[int, ...]] = [()]
        self.seconds: list[float] = [0.0]
        self.cores: list[int] = [0]
        self.labels: list[tuple[int, Action] | None] = [None]

    def add(
        self,
        behind: tuple[int, ...],
        seconds: float = 0.0,
        label: tuple[int, Action] | None = None,
        cores: int = 0,
    ) -> int:
        """Add a piece, and return its number. A piece behind one other that takes no time is that other one."""
        if len(behind) == 1 and not seconds and not cores:
            return behind[0]
        self.behind.append(behind)
        self.seconds.append(seconds)
        self.cores.append(cores)
        self.labels.append(label)
        return len(self.behind) - 1


def unlimited(pieces: Pieces) -> Clock:
    """Return the clock of pieces that wait only for those that they are behind."""
    begins: list[float] = []
    ends: list[float] = []
    for behind, seconds in zip(pieces.behind, pieces.seconds, strict=True):
        begin = max([ends[other] for other in behind], default=0.0)
        begins.append(begin)
        ends.append(begin + seconds)
    return begins, ends


def shared(pieces: Pieces, cores: float) -> Clock:
    """Return the clock of pieces where those that compute share some cores evenly.

    All that compute run at one speed. So *progress*, the seconds of work that each could have done so far, is one
    number for all: a piece that begins at progress p with work w ends at p + w.
    """
    count = len(pieces.behind)
    after: list[list[int]] = [[] for _ in range(count)]
    missing = [len(behind) for behind in pieces.behind]
    for i, behind in enumerate(pieces.behind):
        for other in behind:
            after[other].append(i)
    begins, ends = [0.0] * count, [0.0] * count
    timed = [(0.0, 0)]
    computing: list[tuple[float, int]] = []
    now = progress = 0.0
    used = 0
    while timed or computing:
        speed = min(1.0, cores / used) if used else 1.0
        through = now + (computing[0][0] - progress) / speed if computing else None
        if through is not None and (not timed or through <= timed[0][0]):
            work, i = heapq.heappop(computing)
            now, progress = max(now, through), max(progress, work)
            used -= pieces.cores[i]
        else:
            until, i = heapq.heappop(timed)
            progress += (until - now) * speed
            now = until
        ends[i] = now
        for following in after[i]:
            missing[following] -= 1
            if not missing[following]:
                begins[following] = now
                if pieces.cores[following]:
                    used += pieces.cores[following]
                    heapq.heappush(computing, (progress + pieces.seconds[following], following))
                else:
                    heapq.heappush(timed, (now + pieces.seconds[following], following))
    return begins, ends
