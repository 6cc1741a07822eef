"""Blame: of a world that has come to a halt, who was the first to, and in which words that is said.

Each rank keeps on record what it is doing (`HeartbeatRecord`). A rank that was cut off reads the records of all and
asks `faulty_rank`: a process that is gone or stopped is one. Where all processes run, somebody has fallen behind:
since every rank knows the programs of all, the waits can be followed from rank to rank, from the action in which
this one waited to one that waits for nobody.

>>> seen = HeartbeatRecord(rank=3, host="a", step=12, doing="NORM", index=7, count=9, since_s=1.0)
>>> print(Diagnosis(seen, "failed", now_s=1.5))
rank 3 (host a) failed at step 12 in 'NORM' (action 8 of 9), begun 0.5 s before
"""

import collections
import contextlib
from collections.abc import Iterable, Mapping

import attrs

from mimogrid.core.base.errors import WorldError
from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import meeting
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Wait,
    WaitReduce,
    matching_op,
    parse,
)
from mimogrid.core.topology.topology import Stage


RUNNING, STOPPED, GONE, UNKNOWN = "running", "stopped", "gone", "unknown"
LEFT = "left"
"""What a rank is doing that has ended by itself, in whatever way."""


@attrs.frozen(kw_only=True)
class HeartbeatRecord:
    """What a rank was last seen doing, and since when, in seconds of its host's clock.

    `index` counts the actions of the step's program of `count` actions; it is -1 outside of any. `waits` says that
    it has done its own part of a joint action. `state` is that of the process, where it is on the same host.
    """

    rank: int
    host: str
    step: int
    doing: str
    since_s: float
    index: int = -1
    count: int = 0
    waits: bool = False
    pid: int = 0
    state: str = UNKNOWN


HeartbeatRecords = Mapping[int, HeartbeatRecord]


@attrs.frozen
class Diagnosis:
    """Why a world ended: the rank that is to blame, and the one that noticed.

    Attributes:
        about: what the rank to blame was last seen doing.
        how: what became of it, such as ``failed``.
        now_s: when that was found.
        stages: those of the rank to blame.
        witness: what the rank that found it was doing, if that is another.
        owed: the action of the rank to blame that the witness waited for, if the plan tells.
    """

    about: HeartbeatRecord
    how: str
    now_s: float
    stages: tuple[Stage, ...] = ()
    witness: HeartbeatRecord | None = None
    owed: str = ""

    def __str__(self) -> str:
        text = f"{_who(self.about, self.stages)} {self.how} at step {self.about.step} in {_what(self.about)}"
        text += f", begun {max(0.0, self.now_s - self.about.since_s):.1f} s before"
        if self.witness:
            waited = max(0.0, self.now_s - self.witness.since_s)
            text += f"; {_who(self.witness)} waited {waited:.1f} s in {_what(self.witness)}"
            text += f" for its '{self.owed}'" if self.owed else ""
        return text


class DiagnosedError(WorldError):
    """A world that ended, with the finding of why; `details` are what else the rank itself has to say."""

    def __init__(self, finding: Diagnosis, details: str = "") -> None:
        self.finding, self.details = finding, details
        super().__init__(f"{finding}{details}")

    def __reduce__(self) -> tuple[type["DiagnosedError"], tuple[Diagnosis, str]]:
        return type(self), (self.finding, self.details)

    def told(self, rank: int, how: str) -> "DiagnosedError":
        """Return the same with better knowledge of what became of a rank, if it is the one to blame."""
        if rank != self.finding.about.rank:
            return self
        return DiagnosedError(attrs.evolve(self.finding, how=how), self.details)


def find(
    me: int, seen: HeartbeatRecords, program: Program | None, *, now_s: float, suspects: Iterable[int] = ()
) -> Diagnosis:
    """Return why a rank was cut off. `program` is that of the step in which it was, if it was in one.

    If there are `suspects` it is one of them.
    """
    rank = faulty_rank(me, seen, program, suspects)
    about = seen.get(rank) or HeartbeatRecord(
        rank=rank, host="unknown", step=0, doing="nothing", since_s=now_s
    )
    stages = tuple(info.stage for info in program.topology.role(rank).stages) if program else ()
    return Diagnosis(
        about,
        _HOW.get(about.state, "stopped answering"),
        now_s,
        stages,
        witness=seen[me] if rank != me else None,
        owed=_owed(program, seen[me], rank) if program else "",
    )


_HOW = {GONE: "ended without a word", STOPPED: "is stopped", RUNNING: "fell behind"}


def faulty_rank(
    me: int, seen: HeartbeatRecords, program: Program | None, suspects: Iterable[int] = ()
) -> int:
    """Return the rank to blame for the halt of rank `me`."""
    named = tuple(suspects)
    others = [s for s in seen.values() if s.rank != me and s.doing != LEFT and (not named or s.rank in named)]
    for state in (GONE, STOPPED):
        if found := [s for s in others if s.state == state]:
            return min(found, key=lambda s: s.since_s).rank
    if unseen := [rank for rank in named if rank not in seen]:
        return unseen[0]
    if program and seen[me].index >= 0 and (last := _end_of_waits(me, seen, program)) is not None:
        return last
    # Outside of programs all wait for the one that has come least far, has not done its part, or is at something else.
    alike = seen[me].doing
    return min(
        others, key=lambda s: (s.step, s.index < 0, s.waits, s.doing == alike, s.since_s), default=seen[me]
    ).rank


def _end_of_waits(me: int, seen: HeartbeatRecords, program: Program) -> int | None:
    """Follow the waits from rank to rank; return one that waits for nobody, the longest at what it does."""
    step, queue, known = seen[me].step, collections.deque([me]), {me}
    ends: list[HeartbeatRecord] = []
    while queue:
        rank = queue.popleft()
        awaited = _waits_for(rank, seen, program, step)
        if not awaited and rank != me:
            ends.append(seen[rank])
        fresh = [r for r in awaited if r not in known]
        known.update(fresh)
        queue.extend(fresh)
    if not ends:  # Both ends have posted: then it is one of those at the other end.
        partners = (seen[r] for r in _partners(program, me, seen[me].index) if r in seen)
        ends = [record for record in partners if record.doing != LEFT]
    return min(ends, key=lambda s: s.since_s).rank if ends else None


def _waits_for(rank: int, seen: HeartbeatRecords, program: Program, step: int) -> list[int]:
    """Return the ranks that have not done what an action waits for."""
    at = seen[rank]
    if at.step != step or not 0 <= at.index < len(program.of(rank)):
        return []
    action = program.of(rank)[at.index]
    partners = _partners(program, rank, at.index)
    return [r for r in partners if r in seen and _is_owed(program, seen[r], action, step)]


def _partners(program: Program, rank: int, index: int) -> list[int]:
    """Return the other ranks that an action is done with."""
    action = program.of(rank)[index]
    with_whom = (
        program.peers_of(rank, action.transfer) if isinstance(action, Wait) else program.joint(rank, action)
    )
    return [other for other in dict.fromkeys(with_whom) if other != rank]


def _is_owed(program: Program, peer: HeartbeatRecord, action: Action, step: int) -> bool:
    """Whether a peer has not yet done its part of an action of another."""
    if peer.step != step:
        return peer.step < step
    if peer.index < 0:
        return False
    place = _part(program, peer.rank, action)
    if place is None or peer.index != place:
        return place is not None and peer.index < place
    # What is posted is so once its action is over. In a joint action a rank may have work to do before it waits.
    return isinstance(action, Wait | WaitReduce) or (isinstance(action, Tie | Norm) and not peer.waits)


def _part(program: Program, peer: int, action: Action) -> int | None:
    """Return where in its program a peer does its part of another's action."""
    if isinstance(action, Wait):
        wanted: Action = matching_op(action.transfer)
        return next((i for i, a in enumerate(program.of(peer)) if a == wanted), None)
    wanted = action.posted if isinstance(action, WaitReduce) else meeting(action)
    return next((i for i, a in enumerate(program.of(peer)) if meeting(a) == wanted), None)


def _owed(program: Program, witness: HeartbeatRecord, peer: int) -> str:
    actions = program.of(witness.rank)
    if not 0 <= witness.index < len(actions):
        return ""
    action = actions[witness.index]
    if peer not in _partners(program, witness.rank, witness.index):
        return ""
    place = _part(program, peer, action)
    return "" if place is None else str(program.of(peer)[place])


def _who(record: HeartbeatRecord, stages: tuple[Stage, ...] = ()) -> str:
    facts = [f"host {record.host}"]
    modules = list(dict.fromkeys(stage.module for stage in stages))
    if modules:
        facts.append(f"module{'s' * (len(modules) > 1)} {', '.join(modules)}")
        facts.append(f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}")
    return f"rank {record.rank} ({', '.join(facts)})"


def _what(record: HeartbeatRecord) -> str:
    facts = [f"action {record.index + 1} of {record.count}"] if record.index >= 0 else []
    with contextlib.suppress(ValueError):  # of moments that are no action
        facts += _facts(parse(record.doing))
    return f"'{record.doing}'" + (f" ({', '.join(facts)})" if facts else "")


def _facts(action: Action) -> list[str]:
    match action:
        case Compute(microbatch=microbatch):
            return [f"microbatch {microbatch}"]
        case Wait(transfer=Send() | Recv() as transfer) | (Send() | Recv() as transfer):
            ends = (transfer.stage, transfer.peer) if transfer.at_source else (transfer.peer, transfer.stage)
            return [f"microbatch {transfer.microbatch}", f"edge {ends[0]} -> {ends[1]}"]
        case Reduce() | WaitReduce() | Tie():
            return [f"stage {action.stage}"]
        case _:
            return []
