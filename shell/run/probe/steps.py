"""Steps in turns: of every action of a rank a reading per repetition, under each way to run a backward.

A job's own schedule runs its backwards whole or in two halves. What the other way costs, only another schedule shows;
the two take turns step by step, so that they find the same machine.
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
from mimogrid.core.schedule.work import may_split
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.probe.clock import WARM_UP, Clock, Reading, usual
from mimogrid.shell.run.probe.turns import Turns, turns_of
from mimogrid.shell.runtime.rank import RankRuntime


WHOLE, HALVES = ONE_F_ONE_B, ZB_H1
"""Schedules under which a backward is timed the way that the job's own schedule does not run it."""


@attrs.frozen
class Steps:
    """Steps in turns on one rank: of each action a reading per repetition, and seconds of planning a step."""

    actions: Mapping[Action, list[Reading]] = attrs.field(factory=lambda: defaultdict(list))
    planning: list[float] = attrs.field(factory=list)

    def lasted(self, action: Action) -> float:
        """Return how long an action takes."""
        return usual([reading.lasted for reading in self.actions[action]])

    def worked(self, action: Action) -> float:
        """Return how long an action computes."""
        return usual([reading.worked for reading in self.actions[action]])


def in_turns(runtime: RankRuntime, jobs: Sequence[Job], repeat: int) -> list[Steps]:
    """Run steps of a job under several schedules, one after the other, so that all have the same machine."""
    found = [Steps() for _ in jobs]
    for index in range(WARM_UP + repeat):
        for job, steps in zip(jobs, found, strict=True):
            step = job.step(index)
            turns = Turns(
                turns_of(plan_step(step, job.order))[runtime.rank], runtime.group, Clock(runtime.device)
            )
            dist.barrier(runtime.group)
            begin = time.thread_time()
            following = job.step(index + 1)
            plan_step(following, job.order).of(runtime.rank)
            planned = time.thread_time() - begin
            runtime.run(index, step, following, runs=turns, order=job.order)
            if index >= WARM_UP:
                steps.planning.append(planned)
                for action, reading in turns.readings.items():
                    steps.actions[action].append(reading)
    return found


def other_way(job: Job, program: Program) -> Job | None:
    """Return the job under a schedule that splits its backwards if its own does not, and whole ones if it does."""
    stages = program.order.backward
    if not any(may_split(job.topology, stage) for stage in stages):
        return None
    name = WHOLE if program.order.split else HALVES
    try:
        return open_job(job.path, (*job.overrides, f"schedule.name={name}"))
    except PlanError:
        return None
