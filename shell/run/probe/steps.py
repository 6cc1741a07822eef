"""Steps in turns: a measurement of every action of a rank per repetition, with whole backwards and with split ones.

A job's own schedule runs its backwards either whole or in two halves. Another schedule is needed to time the other
kind. The two schedules alternate step by step, so that both run under the same conditions.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import attrs
import torch.distributed as dist

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.schedules import ONE_F_ONE_B, ZB_H1
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.schedule.actions import Action
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.work import may_split
from mimogrid.core.step.step import Step
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.probe.clock import WARM_UP, Clock, Measurement, usual
from mimogrid.shell.run.probe.turns import Turns, turns_of
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.train_step import train_step


WHOLE, HALVES = ONE_F_ONE_B, ZB_H1
"""The schedules that time the kind of backward that the job's own schedule does not have."""


@attrs.frozen
class Steps:
    """Steps in turns on one rank: the measurements of each action, and the seconds of planning a step."""

    actions: Mapping[Action, list[Measurement]] = attrs.field(factory=lambda: defaultdict(list))
    planning: list[float] = attrs.field(factory=list)

    def elapsed_s(self, action: Action) -> float:
        """Return how long an action takes from begin to end."""
        return usual([measurement.elapsed_s for measurement in self.actions[action]])

    def busy_s(self, action: Action) -> float:
        """Return how long an action computes."""
        return usual([measurement.busy_s for measurement in self.actions[action]])


def in_turns(runtime: RankRuntime, jobs: Sequence[Job], repeat: int) -> list[Steps]:
    """Run steps of a job under several schedules, which alternate; backwards are not cut."""
    found = [Steps() for _ in jobs]
    for index in range(WARM_UP + repeat):
        for job, steps in zip(jobs, found, strict=True):
            step = job.step(index)
            planned = plan_step(step, _uncut(job, step))
            turns = Turns(turns_of(planned)[runtime.rank], runtime.group, Clock(runtime.device))
            dist.barrier(runtime.group)
            begin = time.thread_time()
            following = job.step(index + 1)
            plan_step(following, _uncut(job, following)).of(runtime.rank)
            planning_s = time.thread_time() - begin
            train_step(runtime, index, step, following, executor=turns, order=planned.order)
            if index >= WARM_UP:
                steps.planning.append(planning_s)
                for action, measurement in turns.measurements.items():
                    steps.actions[action].append(measurement)
    return found


def _uncut(job: Job, step: Step) -> Order:
    return attrs.evolve(job.order_of(step), cuts={})


def other_schedule(job: Job, program: Program) -> Job | None:
    """Return the job under a schedule that splits its backwards if its own does not, and whole ones if it does."""
    stages = program.order.backward
    if not any(may_split(job.topology, stage) for stage in stages):
        return None
    name = WHOLE if program.order.split else HALVES
    try:
        return open_job(job.path, (*job.overrides, f"schedule.name={name}"))
    except PlanError:
        return None
