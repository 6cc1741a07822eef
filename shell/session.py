"""Sessions: from a place to a crew that can run steps, and back out.

The order is fixed: meet, compare the plan, join, make the planned groups, build this rank's stages. What a
session opened it closes, last first, also when a step fails.
"""

import contextlib
import warnings
from collections.abc import Iterator

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.digest import digest_of
from mimogrid.core.errors import PlanError, Problem
from mimogrid.shell import device as devices
from mimogrid.shell.device import Device
from mimogrid.shell.groups import Groups, open_groups
from mimogrid.shell.jobs import Job
from mimogrid.shell.megatron.cpu import on_device
from mimogrid.shell.place import Place
from mimogrid.shell.step import Crew
from mimogrid.shell.world import World, join, one_report


@attrs.frozen(eq=False)
class Session:
    """An open world with this rank's crew; an idle rank has none."""

    world: World
    groups: Groups
    device: Device
    crew: Crew | None


@contextlib.contextmanager
def open_session(place: Place, job: Job, *, transport: str | None = None) -> Iterator[Session]:
    """Enter the world of a job at a place. Raises PlanError where the world is too small for the job."""
    needed = job.topology.world_size
    if place.size < needed:
        raise PlanError([_too_small(place.size, needed)])
    torch.set_num_threads(job.spec.train.threads)
    device = devices.choose(place, transport)
    store = _meet(place)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(warnings.catch_warnings())
        world = enter(
            join(
                store=store,
                rank=place.rank,
                size=place.size,
                backend=device.backend,
                timeout_s=job.spec.train.timeout_s,
                digest=digest_of(job.topology, job.step(0)),
            )
        )
        enter(one_report(world))
        groups = enter(open_groups(job.topology, world, device))
        world.wait_for_all("connected")
        enter(on_device(device.torch, seed=job.spec.seed))
        hosts = place.rank in job.topology.ranks
        crew = Crew(job, place.rank, groups, device) if hosts else None
        yield Session(world, groups, device, crew)


def _meet(place: Place) -> dist.Store:
    if place.meeting:
        return dist.FileStore(place.meeting, place.size)
    store: dist.Store = next(dist.rendezvous("env://"))[0]
    return store


def _too_small(size: int, needed: int) -> Problem:
    return Problem(
        "world_size",
        f"the job needs {needed} ranks (0..{needed - 1}), the launcher started {size}.",
        f"Start {needed} processes (torchrun --nproc-per-node), or make the grids smaller.",
    )
