"""Diagnosis: which rank brought a world to a halt, and the report that says so.

Each rank keeps a record of what it does (`HeartbeatRecord`). A rank that was cut off reads the records of all ranks. A
process that is gone or stopped is faulty. Where all processes run, one has fallen behind. Every rank knows the programs
of all ranks, so the waits can be followed from rank to rank: from the action in which this rank waited to a rank that
waits for no other.

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
    Gather,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Wait,
    WaitCollective,
    WaitGather,
    WaitReduce,
    matching_op,
    parse,
)
from mimogrid.core.topology.topology import Stage


RUNNING, STOPPED, GONE, UNKNOWN = "running", "stopped", "gone", "unknown"
LEFT = "left"
"""What the record of a rank says after the rank has ended by itself, well or with an error."""


@attrs.frozen(kw_only=True)
class HeartbeatRecord:
    """What a rank does, as it has noted itself.

    Attributes:
        rank, host, pid: the process.
        step: the step that it is in.
        doing: the action or the phase.
        since_s: when that began, by the clock of its host.
        index: which action of its program that is; -1 outside of programs.
        count: how many actions the program has.
        waits: whether it has done its own part of a joint action, and waits for the others.
        state: the state of the process, if it is on this host.
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
    """Why a world ended: the faulty rank, and the rank that noticed.

    Attributes:
        faulty: the record of the faulty rank.
        cause: what happened to it, such as ``failed``.
        now_s: when the diagnosis was made.
        stages: the stages of the faulty rank.
        waiting: the record of the rank that made the diagnosis, if that is another rank.
        awaited: the action of the faulty rank that this rank waited for, if the program tells.
    """

    faulty: HeartbeatRecord
    cause: str
    now_s: float
    stages: tuple[Stage, ...] = ()
    waiting: HeartbeatRecord | None = None
    awaited: str = ""

    def __str__(self) -> str:
        faulty, waiting = self.faulty, self.waiting
        text = f"{_who(faulty, self.stages)} {self.cause} at step {faulty.step} in {_what(faulty)}"
        text += f", begun {max(0.0, self.now_s - faulty.since_s):.1f} s before"
        if waiting:
            waited_s = max(0.0, self.now_s - waiting.since_s)
            text += f"; {_who(waiting)} waited {waited_s:.1f} s in {_what(waiting)}"
            text += f" for its '{self.awaited}'" if self.awaited else ""
        return text


class DiagnosedError(WorldError):
    """A world that ended, with the diagnosis of why; `details` are what the rank itself adds to it."""

    def __init__(self, diagnosis: Diagnosis, details: str = "") -> None:
        self.diagnosis, self.details = diagnosis, details
        super().__init__(f"{diagnosis}{details}")

    def __reduce__(self) -> tuple[type["DiagnosedError"], tuple[Diagnosis, str]]:
        return type(self), (self.diagnosis, self.details)

    def with_cause(self, rank: int, cause: str) -> "DiagnosedError":
        """Return the same with a better known cause, if `rank` is the faulty one."""
        if rank != self.diagnosis.faulty.rank:
            return self
        return DiagnosedError(attrs.evolve(self.diagnosis, cause=cause), self.details)


def diagnose(
    me: int, records: HeartbeatRecords, program: Program | None, *, now_s: float, suspects: Iterable[int] = ()
) -> Diagnosis:
    """Return why rank `me` was cut off. `program` is the program of the step that it was in, if it was in one.

    If there are `suspects`, one of them is the faulty rank.
    """
    rank = faulty_rank(me, records, program, suspects)
    faulty = records.get(rank) or HeartbeatRecord(
        rank=rank, host="unknown", step=0, doing="nothing", since_s=now_s
    )
    stages = tuple(info.stage for info in program.topology.role(rank).stages) if program else ()
    return Diagnosis(
        faulty,
        _CAUSES.get(faulty.state, "stopped answering"),
        now_s,
        stages,
        waiting=records[me] if rank != me else None,
        awaited=_awaited(program, records[me], rank) if program else "",
    )


_CAUSES = {GONE: "ended without a word", STOPPED: "is stopped", RUNNING: "fell behind"}


def faulty_rank(
    me: int, records: HeartbeatRecords, program: Program | None, suspects: Iterable[int] = ()
) -> int:
    """Return the rank that brought rank `me` to a halt."""
    named = tuple(suspects)
    others = [
        r for r in records.values() if r.rank != me and r.doing != LEFT and (not named or r.rank in named)
    ]
    for state in (GONE, STOPPED):
        if found := [r for r in others if r.state == state]:
            return min(found, key=lambda r: r.since_s).rank
    if without_record := [rank for rank in named if rank not in records]:
        return without_record[0]
    if program and records[me].index >= 0 and (last := _end_of_waits(me, records, program)) is not None:
        return last
    # Outside of programs all wait for the rank that is least far, has not done its part, or does something else.
    mine = records[me].doing
    return min(
        others, key=lambda r: (r.step, r.index < 0, r.waits, r.doing == mine, r.since_s), default=records[me]
    ).rank


def _end_of_waits(me: int, records: HeartbeatRecords, program: Program) -> int | None:
    """Follow the waits from rank to rank; return the rank that waits for no other, and longest does what it does."""
    step, queue, known = records[me].step, collections.deque([me]), {me}
    ends: list[HeartbeatRecord] = []
    while queue:
        rank = queue.popleft()
        awaited = _waits_for(rank, records, program, step)
        if not awaited and rank != me:
            ends.append(records[rank])
        fresh = [r for r in awaited if r not in known]
        known.update(fresh)
        queue.extend(fresh)
    if not ends:  # Both ends have posted: then it is a rank at the other end.
        partners = (records[r] for r in _partners(program, me, records[me].index) if r in records)
        ends = [record for record in partners if record.doing != LEFT]
    return min(ends, key=lambda r: r.since_s).rank if ends else None


def _waits_for(rank: int, records: HeartbeatRecords, program: Program, step: int) -> list[int]:
    """Return the ranks that have not done what the action of a rank waits for."""
    at = records[rank]
    if at.step != step or not 0 <= at.index < len(program.of(rank)):
        return []
    action = program.of(rank)[at.index]
    partners = _partners(program, rank, at.index)
    return [r for r in partners if r in records and _is_awaited(program, records[r], action, step)]


def _partners(program: Program, rank: int, index: int) -> list[int]:
    """Return the other ranks that an action is done with."""
    action = program.of(rank)[index]
    with_whom = (
        program.peers_of(rank, action.transfer) if isinstance(action, Wait) else program.joint(rank, action)
    )
    return [other for other in dict.fromkeys(with_whom) if other != rank]


def _is_awaited(program: Program, peer: HeartbeatRecord, action: Action, step: int) -> bool:
    """Whether a peer has not yet done its part of an action of another rank."""
    if peer.step != step:
        return peer.step < step
    if peer.index < 0:
        return False
    place = _part(program, peer.rank, action)
    if place is None or peer.index != place:
        return place is not None and peer.index < place
    # A message is posted once its action is over. In a joint action a rank may have work to do before it waits.
    return isinstance(action, Wait | WaitCollective) or (isinstance(action, Tie | Norm) and not peer.waits)


def _part(program: Program, peer: int, action: Action) -> int | None:
    """Return where in its program a peer does its part of an action of another rank."""
    if isinstance(action, Wait):
        wanted: Action = matching_op(action.transfer)
        return next((i for i, a in enumerate(program.of(peer)) if a == wanted), None)
    wanted = action.posted if isinstance(action, WaitCollective) else meeting(action)
    return next((i for i, a in enumerate(program.of(peer)) if meeting(a) == wanted), None)


def _awaited(program: Program, waiting: HeartbeatRecord, peer: int) -> str:
    actions = program.of(waiting.rank)
    if not 0 <= waiting.index < len(actions):
        return ""
    action = actions[waiting.index]
    if peer not in _partners(program, waiting.rank, waiting.index):
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
    with contextlib.suppress(ValueError):  # A phase is no action.
        facts += _facts(parse(record.doing))
    return f"'{record.doing}'" + (f" ({', '.join(facts)})" if facts else "")


def _facts(action: Action) -> list[str]:
    match action:
        case Compute(microbatch=microbatch):
            return [f"microbatch {microbatch}"]
        case Wait(transfer=Send() | Recv() as transfer) | (Send() | Recv() as transfer):
            ends = (transfer.stage, transfer.peer) if transfer.at_source else (transfer.peer, transfer.stage)
            return [f"microbatch {transfer.microbatch}", f"edge {ends[0]} -> {ends[1]}"]
        case Reduce() | WaitReduce() | Gather() | WaitGather() | Tie():
            return [f"stage {action.stage}"]
        case _:
            return []
