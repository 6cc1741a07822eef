"""Communication: links, sums of gradients and gathers of weights, measured by themselves between steps.

A link is measured with two messages: one value, and as many values as the job sends. The line through the two times
gives latency and bandwidth. The collectives of a stage are posted and waited for as in a step, with no computation
beside them.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Direction, Recv, Send
from mimogrid.core.step.routes import Message
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Link, Stage
from mimogrid.shell.run.probe.clock import WARM_UP, rounded, usual
from mimogrid.shell.runtime.exchange import gather_values
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import Session
from mimogrid.shell.runtime.transport import Transport


PINGS = 21
"""How many messages go there and back, for each size."""
LEAST_BYTES = 1 << 16
"""The size of the message that measures a bandwidth; a larger message of the job is used instead."""


def costs_of_edges(session: Session, runtime: RankRuntime, program: Program) -> dict[str, EdgeCosts]:
    """Measure every link, between the first two ranks that it joins; return the costs by edge or link."""
    found: dict[str, EdgeCosts] = {}
    transport = Transport(runtime.topology, session.groups, session.device)
    for link in runtime.topology.links:
        sent = _first_message(program, link)
        if sent is not None and str(link.edge or link) not in found:
            found[str(link.edge or link)] = _pinged(runtime, program, transport, *sent)
    return found


def _first_message(program: Program, link: Link) -> tuple[Send, Message] | None:
    """Return the first message with any bytes that a step sends forward over a link, and its action."""
    for k in range(program.topology.modules[link.target.module].microbatches):
        send = Send(link.source, Direction.FORWARD, k, link.target)
        for message in program.messages(send):
            if message_bytes(program.routes.step, message):
                return send, message
    return None


def _pinged(
    runtime: RankRuntime, program: Program, transport: Transport, send: Send, message: Message
) -> EdgeCosts:
    """Measure a link with one value and with as many as the job sends."""
    itemsize = runtime.stages[next(iter(runtime.stages))].dtype.itemsize
    size = max(message_bytes(program.routes.step, message), LEAST_BYTES) // itemsize
    one, all_ = (_round_s(runtime, transport, send, message, count) for count in (1, size))
    rate = (size - 1) * itemsize / (all_ - one) if all_ > one else math.inf
    return EdgeCosts(latency=rounded(one / 2), bytes_per_s=rounded(rate))


def _round_s(runtime: RankRuntime, transport: Transport, send: Send, message: Message, count: int) -> float:
    """Return on every rank how long it takes to send `count` values to the target of a message and get one back."""
    dtype = runtime.stages[next(iter(runtime.stages))].dtype
    recv = Recv(send.peer, send.direction, send.microbatch, send.stage)
    source, target = message.rank_source, message.rank_target
    dist.barrier(runtime.group)
    values = torch.zeros(count, dtype=dtype, device=runtime.device.torch)
    answer = torch.zeros(1, device=runtime.device.torch)
    seconds: list[float] = []
    for _ in range(PINGS):
        begin = time.perf_counter()
        if runtime.rank == source:
            transport.send(send, [(message, values)])
            transport.wait(send)
            dist.recv(answer, src=target, group=runtime.group)
        elif runtime.rank == target:
            transport.receive(recv, [(message, (count,))], dtype)
            transport.wait(recv)
            dist.send(answer, dst=source, group=runtime.group)
        seconds.append(time.perf_counter() - begin)
    mine = torch.tensor([usual(seconds)], dtype=torch.float64, device=runtime.device.torch)
    return float(gather_values(runtime, mine)[runtime.topology.ranks.index(source)])


def summing_s(runtime: RankRuntime, stage: Stage, repeat: int) -> float:
    """Return how long all sums of gradients of a stage take, posted one after the other and then waited for."""
    buckets = [reduce.bucket for reduce in _program(runtime).sums(runtime.rank) if reduce.stage == stage]
    mine = [
        runtime.buffers[stage].buffers[bucket] for bucket in buckets
    ]  # no buffers on a rank without the stage

    def exchange() -> None:
        for buffer in mine:
            buffer.reduce()
        for buffer in mine:
            buffer.wait()

    return _alone_s(runtime, exchange if mine else None, repeat)


def gathering_s(runtime: RankRuntime, stage: Stage, repeat: int) -> float:
    """Return how long all gathers of weights of a stage take, likewise; the weights do not change."""
    gathers = any(gather.stage == stage for gather in _program(runtime).gathers(runtime.rank))

    def exchange() -> None:
        runtime.buffers[stage].copy_main_to_model()
        runtime.buffers[stage].complete()

    return _alone_s(runtime, exchange if gathers else None, repeat)


def _program(runtime: RankRuntime) -> Program:
    return runtime.job.program_of(runtime.job.step(0))


def _alone_s(runtime: RankRuntime, exchange: Callable[[], None] | None, repeat: int) -> float:
    """Return the seconds of an exchange that begins on all ranks at once; 0 on a rank that has none."""
    seconds: list[float] = []
    for _ in range(WARM_UP + repeat):
        dist.barrier(runtime.group)
        begin = time.perf_counter()
        if exchange is not None:
            exchange()
        runtime.device.finish()
        seconds.append(time.perf_counter() - begin if exchange is not None else 0.0)
    return usual(seconds[WARM_UP:])
