"""Rehearsal: the preflight of a launcher's world. All ranks meet, say what they have, and leave.

The first rank gets a check for each thing that a run needs of all hosts together: as many ranks as the job has, the
same versions, clocks that agree, the same plan, memory for what each rank keeps.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimogrid.core.base.errors import Problem
from mimogrid.core.base.units import in_bytes
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.program.digest import digest_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.device import device as devices
from mimogrid.shell.device import machine
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.hosts import HostRecord, hosts_text, version_problem
from mimogrid.shell.world.preflight import Check, device_problems, disk, too_small
from mimogrid.shell.world.world import meet, serve_rendezvous


def rehearse(place: RankPlace, job: Job, transport: str | None, folder: Path) -> list[Check]:
    """Return what a launcher's world has and what it needs, on rank 0, and nothing on others; all ranks call it.

    `folder` is where the run writes. Raises AbsentError for ranks that do not come in time.
    """
    world = meet(place, datetime.timedelta(seconds=job.spec.train.timeout_s))
    serve_rendezvous(world)
    records = world.hosts()
    world.compare_clocks("joined")
    world.store.set(f"rehearsal/{place.rank}", json.dumps(_said(place, job, transport)))
    world.wait_for_all("rehearsed")
    if place.rank != 0:
        world.mark(f"left/{place.rank}")
        return []
    said = [json.loads(world.store.get(f"rehearsal/{rank}")) for rank in range(world.size)]
    found = [*checks(job.topology, records, said, world.clock_problem()), *disk(job.topology, folder)]
    # This process may keep the store.
    world.store.wait([f"left/{rank}" for rank in range(1, world.size)], world.timeout)
    return found


def _said(place: RankPlace, job: Job, transport: str | None) -> dict[str, Any]:
    """Return what a rank says of its plan and of its device."""
    device = devices.choose(place, transport)
    problems = device_problems(job.topology, place.rank, device.name, device.memory_bytes)
    return {
        "digest": digest_of(job.program_of(job.step(0))),
        "device": device.name,
        "problem": next((problem.message for problem in problems), None),
        "available": machine.available_bytes() if device.memory_bytes is None else None,
    }


def checks(
    topology: Topology,
    records: Sequence[HostRecord],
    said: Sequence[Mapping[str, Any]],
    clocks: Problem | None,
) -> Iterator[Check]:
    """Yield the checks of a world by what its ranks have said, in the order of ranks."""
    size, needed = len(records), topology.world_size
    hosts = [record.host for record in records]
    is_short = too_small(size, needed) if size < needed else None
    fact = f"the job needs {needed} ranks, and the launcher started {size}: {hosts_text(hosts)}."
    yield Check("ranks", fact, is_short, is_final=True)
    versions = version_problem(records)
    same = ", ".join(f"{name} {version}" for name, version in records[0].versions.items())
    yield Check("versions", versions.message if versions else f"{same} everywhere.", versions, is_final=True)
    yield Check("clocks", clocks.message if clocks else "no difference of a second is seen.", clocks)
    yield _plan(hosts, said)
    yield _devices(said)
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, name in enumerate(hosts) if name == host]
        available = said[ranks[0]]["available"]
        if available is not None:
            yield _memory(topology, host, [rank for rank in ranks if rank in topology.ranks], available)


def _plan(hosts: Sequence[str], said: Sequence[Mapping[str, Any]]) -> Check:
    digests = [of["digest"] for of in said]
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return Check("plan", f"all ranks plan the same: digest {digests[0][:12]}.")
    fact = f"rank {other} on host '{hosts[other]}' plans another job than rank 0."
    remedy = "Start every rank with the same job file, overrides and data."
    return Check("plan", fact, Problem("plan", fact, remedy), is_final=True)


def _devices(said: Sequence[Mapping[str, Any]]) -> Check:
    names = ", ".join(dict.fromkeys(of["device"] for of in said))
    fact = next((of["problem"] for of in said if of["problem"]), None)
    if fact is None:
        return Check("devices", f"each rank has what its weights, gradients and optimizer need: {names}.")
    remedy = "Use more ranks along tp or pp, optimizer.sharded, or bf16; `mimogrid plan` finds what fits."
    return Check("devices", fact, Problem("memory", fact, remedy), is_final=True)


def _memory(topology: Topology, host: str, ranks: Sequence[int], available: int) -> Check:
    """Return whether a host whose ranks compute on its processors has the memory for them."""
    needed = sum(kept(topology, rank).bytes for rank in ranks)
    fact = (
        f"the {len(ranks)} ranks on '{host}' need at least {in_bytes(needed)} for weights, gradients and the "
        f"optimizer, and it has {in_bytes(available)} available."
    )
    remedy = "Start fewer ranks on this host, or use a smaller model."
    return Check("memory", fact, Problem("memory", fact, remedy) if needed > available else None)
