"""Bodies: what tests run on every rank of a world, ``bodies:function``. Each returns what it saw."""

import contextlib
import datetime
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import pretended
from mimogrid.core.base.errors import WorldError
from mimogrid.core.schedule.actions import Action, Compute, Norm, Reduce, Send, Transfer
from mimogrid.core.topology.topology import Stage
from mimogrid.shell.checkpoint import files as checkpoint
from mimogrid.shell.checkpoint import saving
from mimogrid.shell.checkpoint.manifest import folder_of
from mimogrid.shell.checkpoint.state import (
    gather,
    manifest_of,
    restore,
    scatter,
    slices_to_load,
    slices_to_save,
)
from mimogrid.shell.device import device as devices
from mimogrid.shell.device.device import Device
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.device.streams import CudaStreams
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron import engine
from mimogrid.shell.run.parity import full_gradients, on_one_process
from mimogrid.shell.runtime.agreement import check_batch
from mimogrid.shell.runtime.execute import RankContext, Timed, execute
from mimogrid.shell.runtime.forward_only import evaluate, predict
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.stage import StageStep
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.runtime.transport import Transport
from ordered import OrderedStreams


@attrs.frozen
class Taken:
    """What a rank saw of a training step; `changed`: whether any of its weights did."""

    loss: float
    norm: float
    taken: bool
    changed: bool


def train(place: RankPlace, job: Job, steps: int) -> list[Taken] | None:
    """Train some steps; an idle rank returns None."""
    with open_session(place, job) as session:
        return list(_steps(session, job, steps)) if session.runtime else None


def _steps(session: Session, job: Job, steps: int) -> Iterator[Taken]:
    assert session.runtime
    for index in range(steps):
        before = [w.detach().clone() for w in _weights(session)]
        outcome = train_step(session.runtime, index, job.step(index), job.step(index + 1))
        same = all(torch.equal(a, b) for a, b in zip(before, _weights(session), strict=True))
        yield Taken(outcome.loss, outcome.gradient_norm, outcome.taken, not same)


def _weights(session: Session) -> Iterator[torch.Tensor]:
    assert session.runtime
    for buffer in session.runtime.buffers.values():
        yield from buffer.weights.values()


def gradients(place: RankPlace, job: Job) -> tuple[float, Mapping[str, np.ndarray]] | None:
    """Return loss and full gradients of the first step from the first rank."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        step = job.step(0)
        loss = train_step(session.runtime, 0, step, step, update=False).loss
        found = full_gradients(session.runtime)
        return (loss, {name: g.numpy() for name, g in found.items()}) if found else None


def norms(place: RankPlace, job: Job) -> tuple[float, float] | None:
    """Return the global norm as this rank knows it, and that of the gradients of one process."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        step = job.step(0)
        norm = train_step(session.runtime, 0, step, step).gradient_norm
        _, alone = on_one_process(job, step, session.groups.alone(), session.device)
        return norm, float(sum(g.square().sum() for g in alone.values())) ** 0.5


def open_another(place: RankPlace, job: Job, other: Job, rank: int) -> None:
    """Open a session, on one rank that of another job; nothing may be open when it is refused."""
    try:
        with open_session(place, other if place.rank == rank else job):
            pass
    except BaseException:
        assert not dist.is_initialized()
        raise


def with_engine(place: RankPlace, job: Job, versions: Mapping[int, str]) -> None:
    """Open a session where some ranks' machines have transformer-engine of a version, as far as they can tell."""
    here = versions.get(place.rank, "")
    lacks = "" if here else "transformer-engine is not installed"
    has = patch.object(engine, "missing", lambda _: lacks), patch.object(engine, "version", lambda: here)
    with has[0], has[1], open_session(place, job):
        pass


def leftovers(place: RankPlace, job: Job) -> tuple[int, int]:
    """Train a step and leave; return how many groups and threads there are then."""
    train(place, job, 1)
    groups = len(dist.distributed_c10d._world.pg_map)
    return groups, threading.active_count() + _native_threads()


def _native_threads() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Threads:"))


# -- what is really sent -----------------------------------------------------------------------------------


@attrs.frozen
class Sent:
    """What a rank sent in a step: messages and bytes by (sender, receiver) module, other calls by name."""

    messages: Mapping[tuple[str, str], int]
    bytes: Mapping[tuple[str, str], int]
    planned: int
    calls: Mapping[str, int]


def sent(place: RankPlace, job: Job) -> Sent | None:
    """Count what a rank hands to gloo in the first step."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        step = job.step(0)
        with _counting() as (messages, volume, calls):
            train_step(session.runtime, 0, step, step)
        program = job.program_of(step)
        planned = sum(
            _peer(message, place.rank) != place.rank
            for action in program.of(place.rank)
            if isinstance(action, Send)
            for message in program.messages_of(place.rank, action)
        )
        return Sent(dict(messages), dict(volume), planned, dict(calls))


def _peer(message: Any, rank: int) -> int:
    return int(message.rank_target if message.rank_source == rank else message.rank_source)


@contextmanager
def _counting() -> Iterator[tuple[Counter[tuple[str, str]], Counter[tuple[str, str]], Counter[str]]]:
    messages: Counter[tuple[str, str]] = Counter()
    volume: Counter[tuple[str, str]] = Counter()
    calls: Counter[str] = Counter()
    current: list[tuple[str, str]] = []
    isend, send = dist.isend, Transport.send

    def counting_send(self: Transport, transfer: Transfer, payload: Any) -> None:
        current[:] = [(transfer.stage.module, transfer.peer.module)]
        send(self, transfer, payload)

    def counting_isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        messages[current[0]] += 1
        volume[current[0]] += tensor.numel() * tensor.element_size()
        return isend(tensor, *args, **kwargs)

    def counted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return patch.object(dist, name, call)

    others = ("irecv", "send", "recv", "broadcast", "barrier", "all_gather_object", "batch_isend_irecv")
    patches = [
        patch.object(Transport, "send", counting_send),
        patch.object(dist, "isend", counting_isend),
        *map(counted, others),
    ]
    for each in patches:
        each.start()
    try:
        yield messages, volume, calls
    finally:
        for each in patches:
            each.stop()


def holding(place: RankPlace, job: Job) -> tuple[dict[Stage, int], dict[Stage, int], int] | None:
    """Return of how many microbatches each stage holds tensors when it begins to compute, at most.

    First in a step of training, then of evaluation; and how many are held when each is over.
    """
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        runtime, step = session.runtime, job.step(0)
        most: tuple[dict[Stage, int], dict[Stage, int]] = ({}, {})
        stages: set[StageStep] = set()

        def noted(stage: StageStep, action: Compute) -> None:
            stages.add(stage)
            found = most[not stage.program.order.training]
            found[action.stage] = max(found.get(action.stage, 0), _held(stage))
            compute(stage, action)

        compute = StageStep.compute
        with patch.object(StageStep, "compute", noted):
            train_step(runtime, 0, step, step)
            evaluate(runtime, step)
        return *most, sum(map(_held, stages))


def _held(stage: StageStep) -> int:
    return len(
        {held.microbatch for held in stage.tensors} | {k for k, left in stage.weight_grads.items() if left}
    )


# -- what waits for what -----------------------------------------------------------------------------------


def ordered(
    place: RankPlace, job: Job, through_host: bool, without: str | None, too_early: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Train a step on streams that check; return which places ordered something, and what was wrong.

    `too_early`: sums are posted before the last thing that their rank computes.
    """
    streams = OrderedStreams(without=without)
    device = Device(torch.device("cpu"), "gloo", streams, stages_through_host=through_host)
    with patch.object(devices, "choose", lambda *_: device), open_session(place, job) as session:
        assert session.runtime
        for buffer in session.runtime.buffers.values():
            buffer.copy_main_to_model()  # as after an update, so that there is something to gather
        with streams.watching():
            executor = _summing_too_early if too_early else execute
            train_step(session.runtime, 0, job.step(0), job.step(1), executor=executor)
    return tuple(streams.places), tuple(streams.wrong)


def _summing_too_early(actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
    last = max(i for i, action in enumerate(actions) if isinstance(action, Compute))
    sums = tuple(action for action in actions[last:] if isinstance(action, Reduce))
    rest = tuple(action for action in actions[last:] if not isinstance(action, Reduce))
    return execute((*actions[:last], *sums, *rest), context)


def connected(place: RankPlace, job: Job) -> tuple[list[tuple[str, int]], float, str]:
    """Train a step with a backend that has no tags and connects lazily, on gloo.

    Return which calls connected this rank to how many ranks, the loss, and what is said of one who does not come.
    """
    device = attrs.evolve(devices.of(torch.device("cpu")), has_tags=False, connects_lazily=True)
    calls: list[tuple[str, int]] = []

    def noted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
            calls.append((name, group.size()))
            return original(*args, group=group, **kwargs)

        return patch.object(dist, name, call)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(devices, "choose", lambda *_: device))
        with noted("all_reduce"), noted("isend"), noted("irecv"):
            session = stack.enter_context(open_session(place, job))
        assert session.runtime
        loss = train_step(session.runtime, 0, job.step(0), job.step(1)).loss
        said = ""
        if place.rank == 0:
            work = dist.irecv(torch.zeros(1), src=1, tag=1 << 20)
            assert work is not None
            try:
                device.streams.complete(work, datetime.timedelta(seconds=0.1), "a message")
            except WorldError as error:
                said = str(error)
    return calls, loss, said


def marked(place: RankPlace, job: Job) -> list[str]:
    """Train two steps with marks on a device; return in which order they were made, agreed on and read."""
    said: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            said.append(f"marked on {stream}")

        def synchronize(self) -> None:
            said.append("read")

        def elapsed_time(self, _: "Event") -> float:
            return 0.0

    def noting(actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
        end = next(i for i, action in enumerate(actions) if isinstance(action, Norm))
        timeline = execute(actions[:end], context)
        said.append("agreeing")
        return (*timeline, *execute(actions[end:], context, first=end))

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "Event", Event))
        stack.enter_context(patch.object(torch.cuda, "current_stream", lambda _: "the current stream"))
        device = Device(torch.device("cpu"), "gloo", CudaStreams(torch.device("cpu")))
        stack.enter_context(patch.object(devices, "choose", lambda *_: device))
        session = stack.enter_context(open_session(place, job))
        assert session.runtime
        for index in range(2):
            train_step(session.runtime, index, job.step(index), job.step(index + 1), executor=noting)
            said.append("done")
    return said


# -- as on a GPU -------------------------------------------------------------------------------------------


def usual(place: RankPlace, job: Job) -> tuple[float, float] | None:
    """Train a step on the CPU, for `placed` to be compared with; return loss and norm."""
    with sdpa_kernel(SDPBackend.MATH):
        seen = train(place, job, 1)
    return (seen[0].loss, seen[0].norm) if seen else None


def placed(place: RankPlace, job: Job) -> tuple[float, float, set[str]] | None:
    """Train a step on a device that is said to be CUDA's, then do all else that reads or writes weights there.

    Return loss and norm, and what the host would wait for the device with before NORM.

    Here and in `usual` attention has the one kernel that runs on any tensor: others sum in an order of their own,
    which depends on the machine.
    """
    device = patch.object(devices, "choose", lambda *_: pretended.device())
    layers = patch.object(engine, "missing", lambda *_: "the device only says that it is CUDA's")
    kernel = sdpa_kernel(SDPBackend.MATH)
    with kernel, pretended.pretending() as cuda, device, layers, open_session(place, job) as session:
        if session.runtime is None:
            return None
        waits: list[str] = []

        def noting(actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
            end = next(i for i, action in enumerate(actions) if isinstance(action, Norm))
            cuda.waits.clear()
            timeline = execute(actions[:end], context)
            waits.extend(cuda.waits)
            return (*timeline, *execute(actions[end:], context, first=end))

        step, runtime = job.step(0), session.runtime
        outcome = train_step(runtime, 0, step, job.step(1), executor=noting)
        _also(runtime, job, Path(place.meeting or "").parent / "saved")
        return outcome.loss, outcome.gradient_norm, set(waits)


def _also(runtime: RankRuntime, job: Job, folder: Path) -> None:
    """Evaluate, compare the data, collect gradients, and let weights and states leave and come back."""
    assert job.source
    step = job.step(1)
    check_batch(runtime, step)
    evaluate(runtime, step)
    if runtime.topology.graph.texts:
        predict(runtime, step, job.source)
    full_gradients(runtime)
    facts = manifest_of(runtime, 1)
    scatter(runtime, gather(runtime), facts)
    saving.save(folder, slices_to_save(runtime), facts, runtime.group, keep=1)
    checkpoint.load(folder_of(folder, 1), slices_to_load(runtime, facts), runtime.group)
    restore(runtime, facts)


def alive(place: RankPlace) -> bool:
    """Return that this rank runs."""
    return place.rank >= 0
