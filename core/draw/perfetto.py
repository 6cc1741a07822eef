"""Perfetto: a timeline in the JSON trace format that Perfetto and Chrome open.

A process is a rank. It has a track for what it computes, one for its transfers, and a counter for the bytes that it
holds. An arrow (a *flow*) leads from the action that makes a message to the one that reads it. Names are those of the
notation; times are in microseconds. Records are written rank by rank, so a trace of any length needs little memory.

Format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from mimogrid.core.draw.marks import LETTERS
from mimogrid.core.schedule.actions import Action, Compute, Recv, Send, Transfer, Wait
from mimogrid.core.simulate.memory import trace, transfer_bytes
from mimogrid.core.simulate.timeline import Event, Timeline, sent_as


Record = Mapping[str, Any]

COMPUTING, MOVING = 0, 1
"""The two tracks of a rank."""
WITHIN = 0.01
"""An arrow belongs to the action that its end lies in. So it ends this part of the action's length from the border."""


def lines(timeline: Timeline, ranks: Iterable[int] | None = None) -> Iterator[str]:
    """Yield a trace as lines of JSON text, of some ranks (default: all)."""
    yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
    between = ""
    for record in records(timeline, ranks):
        yield between + json.dumps(record)
        between = ",\n"
    yield "\n]}\n"


def records(timeline: Timeline, ranks: Iterable[int] | None = None) -> Iterator[Record]:
    """Yield the records of a trace. For a peer that is not among `ranks`, the leader of its class stands."""
    chosen = tuple(timeline.classes.leader if ranks is None else ranks)
    drawn = frozenset(chosen)
    sizes: dict[Hashable, int] = {}
    for rank in chosen:
        yield from _names(timeline, rank, alone=ranks is None)
        for event in timeline.events_of(rank):
            yield _slice(timeline, event, sizes)
        yield from _ends(timeline, rank, drawn)
        yield from _counter(timeline, rank)


def _names(timeline: Timeline, rank: int, *, alone: bool) -> Iterator[Record]:
    stages = " ".join(str(info.stage) for info in timeline.program.topology.role(rank).stages)
    count = 1 if alone else len(timeline.classes.members.get(rank, (rank,)))
    name = f"rank {rank}{f' x {count}' if count > 1 else ''}: {stages}"
    yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
    for track, name in ((COMPUTING, "compute"), (MOVING, "transfers")):
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}}
        yield {
            "ph": "M",
            "name": "thread_sort_index",
            "pid": rank,
            "tid": track,
            "args": {"sort_index": track},
        }


def _slice(timeline: Timeline, event: Event, sizes: dict[Hashable, int]) -> Record:
    action = event.action
    moved = action.transfer if isinstance(action, Wait) else action
    args: dict[str, Any] = {}
    if isinstance(moved, Compute | Transfer):
        stage = moved.stage
        args = {"module": stage.module, "stage": str(stage), "microbatch": moved.microbatch}
    if isinstance(moved, Transfer):
        args |= {"peer": str(moved.peer), "bytes": transfer_bytes(timeline.program, event.rank, moved, sizes)}
    return {
        "ph": "X",
        "name": str(action),
        "cat": _category(action),
        "pid": event.rank,
        "tid": MOVING if isinstance(moved, Transfer) else COMPUTING,
        "ts": event.begin_s * 1e6,
        "dur": (event.end_s - event.begin_s) * 1e6,
        "args": args,
    }


def _category(action: Action) -> str:
    match action:
        case Compute():
            return LETTERS[action.kind]
        case Wait():
            return "wait"
        case Send() | Recv():
            return "post"
        case _:
            return "finish"


def _ends(timeline: Timeline, rank: int, drawn: frozenset[int]) -> Iterator[Record]:
    """Yield this rank's ends of its messages; both ends of one have the same id."""
    made: Event | None = None
    waited: list[Recv] = []
    for event in timeline.events_of(rank):
        match event.action:
            case Compute(stage=stage):
                made = event
                reads = [recv for recv in waited if recv.stage == stage]
                waited = [recv for recv in waited if recv.stage != stage]
                for recv in reads:
                    yield from _arrows(timeline, event, recv, drawn)
            case Send() if made:
                yield from _arrows(timeline, made, event.action, drawn)
            case Wait(transfer=Recv() as recv):
                waited.append(recv)
            case _:
                pass


def _arrows(timeline: Timeline, event: Event, transfer: Transfer, drawn: frozenset[int]) -> Iterator[Record]:
    """Yield the ends of a transfer's messages, at the action that makes or reads them."""
    sends, rank, leader = isinstance(transfer, Send), event.rank, timeline.classes.leader
    within = WITHIN * (event.end_s - event.begin_s)
    at = event.end_s - within if sends else event.begin_s + within
    peers = (leader[peer] if peer not in drawn else peer for peer in _peers(timeline, rank, transfer))
    for peer in dict.fromkeys(peers):
        source, target = (rank, peer) if sends else (peer, rank)
        if peer in drawn and peer != rank:
            yield {
                "ph": "s" if sends else "f",
                **({} if sends else {"bp": "e"}),
                "name": str(sent_as(transfer)),
                "cat": "message",
                "id": f"{source}>{target} {sent_as(transfer)}",
                "pid": rank,
                "tid": COMPUTING,
                "ts": at * 1e6,
            }


def _peers(timeline: Timeline, rank: int, transfer: Transfer) -> Iterator[int]:
    """Yield the ranks at the other ends of a transfer; for a rank that stands for its dp rank, of all its ranks."""
    program = timeline.program
    module = program.topology.modules[transfer.stage.module]
    dp_rank = module.tp_cp_ranks(transfer.stage, module.dp_rank_of(rank)) if timeline.by_dp_ranks else (rank,)
    for each in dp_rank:
        yield from (peer for peer in program.peers_of(each, transfer) if peer != each)


def _counter(timeline: Timeline, rank: int) -> Iterator[Record]:
    """Yield what a rank holds over time."""
    for level in trace(timeline, rank):
        args = {
            "kept": level.kept.bytes,
            "activations": level.activations,
            "buffers": level.buffers,
            "temporaries": level.temporaries,
        }
        yield {"ph": "C", "name": "memory", "pid": rank, "tid": 0, "ts": level.at_s * 1e6, "args": args}
