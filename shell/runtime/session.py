"""Sessions: a rank's world and runtime, open from the rendezvous to the end of a run.

The order is fixed: meet, compare the plan, join, make the planned groups, build this rank's stages. A session closes
what it opened, last first, also when a step fails.
"""

import contextlib
import datetime
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

from mimogrid.core.base.errors import PlanError
from mimogrid.core.program.digest import digest_of
from mimogrid.shell.device import device as devices
from mimogrid.shell.device.device import Device
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.cpu import on_device
from mimogrid.shell.megatron.names import without_known_words
from mimogrid.shell.runtime.rank import RankRuntime, build_runtime
from mimogrid.shell.world.failure import one_report
from mimogrid.shell.world.groups import ProcessGroups, open_groups
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.phases import BUILDING, RENDEZVOUS
from mimogrid.shell.world.preemption import StopRequest
from mimogrid.shell.world.preflight import device_problems, too_small
from mimogrid.shell.world.waiting import phase_in_words, waiting
from mimogrid.shell.world.world import World, join, meet, serve_rendezvous


@attrs.frozen(eq=False)
class Session:
    """An open world with this rank's runtime; an idle rank has none."""

    world: World
    groups: ProcessGroups
    device: Device
    runtime: RankRuntime | None
    heartbeat: Heartbeat
    stop_request: StopRequest


@contextlib.contextmanager
def open_session(
    place: RankPlace,
    job: Job,
    *,
    transport: str | None = None,
    stop_request: StopRequest | None = None,
    speaks: bool = False,
) -> Iterator[Session]:
    """Enter the world of a job at a place in it. Raises PlanError where the world is too small for the job.

    If it `speaks`, the first rank of the job says what it is at where that takes long.
    """
    stop_request = stop_request or StopRequest()
    needed = job.topology.world_size
    if place.size < needed:
        raise PlanError([too_small(place.size, needed)])
    torch.set_num_threads(job.spec.train.threads)
    device = devices.choose(place, transport)
    if problems := [*device_problems(job.topology, place.rank, device.name, device.memory_bytes)]:
        raise PlanError(problems)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(warnings.catch_warnings())
        enter(without_known_words())
        heartbeat = enter(_heartbeat(place))
        silent = not speaks or place.rank != job.topology.ranks[0]
        enter(waiting(lambda: phase_in_words(heartbeat.record()), silent=silent, in_place=False))
        world = meet(place, datetime.timedelta(seconds=job.spec.train.timeout_s))
        enter(one_report(world, heartbeat, job))
        heartbeat.enter(RENDEZVOUS)
        if place.meeting is None:
            serve_rendezvous(world)
        enter(join(world, backend=device.backend, digest=digest_of(job.program_of(job.step(0)))))
        heartbeat.enter(BUILDING)
        world.compare_clocks("joined")
        groups = enter(open_groups(job.topology, world, device))
        world.wait_for_all("connected")
        if place.meeting is None and place.rank == 0 and (problem := world.clock_problem()):
            print(f"warning: {problem}", file=sys.stderr, flush=True)  # noqa: T201
        enter(on_device(device.torch, seed=job.spec.seed))
        # Again, so that a failure is reported before the groups are destroyed, which others see as a failure.
        enter(one_report(world, heartbeat, job))
        runtime = (
            build_runtime(job, place.rank, groups, device, heartbeat=heartbeat, stop_request=stop_request)
            if place.rank in job.topology.ranks
            else None
        )
        yield Session(world, groups, device, runtime, heartbeat, stop_request)


@contextlib.contextmanager
def _heartbeat(place: RankPlace) -> Iterator[Heartbeat]:
    """Open this rank's heartbeat; a local world keeps its heartbeats where it meets."""
    heartbeat = Heartbeat(place.rank)
    if place.meeting:
        heartbeat.keep_in(Path(place.meeting).parent)
    try:
        yield heartbeat
    except BaseException:
        heartbeat.close(well=False)
        raise
    heartbeat.close(well=True)
