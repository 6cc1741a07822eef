"""Halves: steps whose backwards are split in two, beside the same steps with whole ones."""

import collections
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import attrs
import torch
from torch.utils.flop_counter import FlopCounterMode

from mimogrid.core.job.models import Own
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.schedule.order import Order
from mimogrid.core.step.routes import Routes
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Stage, Topology
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime import train_step as shell_step
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.stage import StageStep
from mimogrid.shell.runtime.train_step import train_step


LAST = 1 << 30
"""More microbatches than there are: every second half comes after all the first ones of its stage."""


def halved(program: Program, delay: int) -> Program:
    """Return a program in which every stage that may be split has as many first halves before a second one."""
    order, topology = program.order, program.topology
    split = frozenset(stage for stage in order.backward if _may_be_split(topology, stage))
    actions = tuple(_halved(order, split, delay))
    more = {stage: most + delay * (stage in split) for stage, most in order.max_in_flight.items()}
    whole = attrs.evolve(order, actions=actions, split=split, max_in_flight=more)
    return Program(whole, Routes(program.routes.step))


def _halved(order: Order, split: frozenset[Stage], delay: int) -> Iterator[Compute]:
    left: dict[Stage, collections.deque[int]] = collections.defaultdict(collections.deque)
    for action in order.actions:
        stage = action.stage
        if action.kind is not Kind.BACKWARD or stage not in split:
            yield action
            continue
        yield attrs.evolve(action, kind=Kind.INPUT_GRADIENT)
        left[stage].append(action.microbatch)
        if len(left[stage]) > delay:
            yield Compute(Kind.WEIGHT_GRADIENT, stage, left[stage].popleft())
    for stage, microbatches in left.items():
        yield from (Compute(Kind.WEIGHT_GRADIENT, stage, k) for k in microbatches)


def _may_be_split(topology: Topology, stage: Stage) -> bool:
    built_in = not isinstance(topology.modules[stage.module].model, Own)
    return built_in and bool(topology.stages[stage].trainable)


@contextmanager
def halving(delay: int) -> Iterator[None]:
    """Let steps have halves while open."""

    def plan(step: Step, order: Order) -> Program:
        return halved(plan_step(step, order), delay)

    with patch.object(shell_step, "plan_step", plan):
        yield


# -- gradients ---------------------------------------------------------------------------------------------


def apart_in_world(place: RankPlace, job: Job, delay: int) -> dict[str, float]:
    """Run on every rank: return which of its gradients are not the same bits in halves as in whole.

    How far, relative to the largest value, by stage and name.
    """
    with open_session(place, job) as session:
        if session.runtime is None:
            return {}
        whole = _gradients(session, job)
        with halving(delay):
            halves = _gradients(session, job)
    assert whole.keys() == halves.keys()
    return {
        name: float((gradient - halves[name]).abs().max() / gradient.abs().max())
        for name, gradient in whole.items()
        if not torch.equal(gradient, halves[name])
    }


def _gradients(session: Session, job: Job) -> dict[str, torch.Tensor]:
    assert session.runtime
    train_step(session.runtime, 0, job.step(0), job.step(0), update=False)
    return {
        f"{stage}.{name}": weight.grad.clone()
        for stage, buffer in session.runtime.buffers.items()
        for name, weight in buffer.weights.items()
        if weight.grad is not None
    }


# -- work and memory ---------------------------------------------------------------------------------------


@attrs.frozen
class Work:
    """What the compute actions of a step did on a rank.

    `flops` are those of matrix products by kind; `touched` the weights whose gradient was not zero when the first
    weight gradient was to be computed; `saved` how many tensors autograd held for the backward then, and
    `products` how many products were noted, then and at the end.
    """

    flops: Mapping[str, int]
    touched: frozenset[str]
    saved: int
    products: tuple[int, int]


def work_in_world(place: RankPlace, job: Job) -> tuple[Work, Work] | None:
    """Run on every rank: a step with whole backwards, and one with halves, all the second ones last."""
    with open_session(place, job) as session:
        if session.runtime is None:
            return None
        whole = _work(session, job)
        with halving(LAST):
            return whole, _work(session, job)


def _work(session: Session, job: Job) -> Work:
    assert session.runtime
    flops: collections.Counter[str] = collections.Counter()
    seen: list[tuple[frozenset[str], int, int]] = []
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
    stages: set[StageStep] = set()
    compute = StageStep.compute

    def noting(self: StageStep, action: Compute) -> None:
        stages.add(self)
        if action.kind is Kind.WEIGHT_GRADIENT and not seen:
            seen.append((_touched(session), len(saved), _noted(stages)))
        with FlopCounterMode(display=False) as counter, _watching(saved):
            compute(self, action)
        flops[action.kind.value] += counter.get_total_flops()

    with patch.object(StageStep, "compute", noting):
        train_step(session.runtime, 0, job.step(0), job.step(0), update=False)
    touched, held, noted = seen[0] if seen else (frozenset[str](), len(saved), 0)
    return Work(dict(flops), touched, held, (noted, _noted(stages)))


def _touched(session: Session) -> frozenset[str]:
    assert session.runtime
    return frozenset(
        f"{stage}.{name}"
        for stage, buffer in session.runtime.buffers.items()
        for name, weight in buffer.weights.items()
        if weight.grad is not None and bool(weight.grad.any())
    )


def _noted(stages: Iterable[StageStep]) -> int:
    return sum(len(products) for stage in stages for products in stage.weight_grads.values())


class _Saved:
    """A tensor that autograd holds."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _watching(saved: "weakref.WeakSet[_Saved]") -> Any:
    """Remember what autograd saves while open, as long as it holds it."""

    def pack(tensor: torch.Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    unpack: Callable[[_Saved], torch.Tensor] = lambda holder: holder.tensor  # noqa: E731
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
