"""Checks that hold on any device: run on the CPU by every test run, and on a GPU by ``nox -s gpu``.

Each takes a pool and how the ranks compute and talk (`Where`), asserts, and returns what it measured.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

from layouts import job
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.schedule.actions import Action, Norm
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.parity import TOLERANCE, ParityReport
from mimogrid.shell.runtime.execute import RankContext, Timed, execute
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "job.toml"
WORLDS = ("enc(2,1,1)@0 lm(1,2,1)@2", "enc(2,1,2)@0 lm(2,2,1)@4")
"""One of 4 ranks and one of 8, in which tp, dp and pp all occur."""
ALONE = "enc(1,1,1)@0 lm(1,1,1)@0"


@attrs.frozen
class Where:
    """The rehearsal's transport, under which many ranks may share a device, and that of a rank with its own.

    None: the CPU.
    """

    shared: str | None
    own: str | None


Opened = Callable[[JobSpec], Job]


def first(said: Sequence[Any]) -> Any:
    """What the first rank that says anything says."""
    return next(one for one in said if one is not None)


def kinds(pool: Pool, opened: Opened, where: Where) -> dict[str, set[tuple[str, str]]]:
    """Return on which devices ranks compute, and with which backend they talk."""
    found = {}
    for name, layout, transport in (("shared", WORLDS[1], where.shared), ("own", ALONE, where.own)):
        opened_job = opened(job(layout))
        size = opened_job.topology.world_size
        found[name] = set(pool.run("devices_checked:kind", size, opened_job, transport))
    return found


def parity(pool: Pool, opened: Opened, where: Where, precision: str) -> dict[str, Any]:
    """Layouts have the loss and gradients of one process: to 1e-5 in fp32, within its own rounding in bf16."""
    found: dict[str, Any] = {}
    for layout, transport in (*((world, where.shared) for world in WORLDS), (ALONE, where.own)):
        opened_job = opened(job(layout, precision=precision))
        arguments = (opened_job, 1, transport)
        report: ParityReport = first(
            pool.run("mimogrid.shell.run.parity:in_world", opened_job.topology.world_size, *arguments)
        )
        assert report.passed, str(report)
        assert report.limit <= TOLERANCE.get(precision, math.inf)
        found[layout] = {"loss": report.loss, "gradients": report.gradients, "limit": report.limit}
    return found


def digits(pool: Pool, where: Where, folder: Path, steps: int) -> dict[str, Any]:
    """A run on real data learns."""
    opened_job = open_job(DIGITS, [f"train.steps={steps}", "train.evaluate=false"])
    arguments = (opened_job, where.shared, str(folder))
    report = first(pool.run("mimogrid.shell.run.train:in_world", opened_job.topology.world_size, *arguments))
    assert steps == report["steps"]
    assert report["losses"][-1] < report["losses"][0]
    return {"losses": [report["losses"][0], report["losses"][-1]], "samples_per_s": report["samples_per_s"]}


def checkpoints(pool: Pool, where: Where, folder: Path) -> dict[str, Any]:
    """A checkpoint that is written on one device, loaded on the CPU, and written there, is the same, and back."""
    steps = 2
    opened_job = open_job(DIGITS, [f"train.steps={steps}", "train.evaluate=false", "batch.global_size=16"])
    size = opened_job.topology.world_size
    pool.run("mimogrid.shell.run.train:in_world", size, opened_job, where.shared, str(folder / "run"))
    name = f"step-{steps:08}"
    written = [folder / "run" / "checkpoints" / name]
    for transport in (None, where.shared):
        to = folder / f"again-{len(written)}"
        pool.run("resaving:in_world", size, opened_job, written[-1], to, transport)
        written.append(to / name)
    files = [{path.name: path.read_bytes() for path in saved.glob("shard-*")} for saved in written]
    facts = [manifest.read_manifest(saved) | {"created": 0, "digest": ""} for saved in written]
    assert files[0] == files[1] == files[2]
    assert facts[0] == facts[1] == facts[2]
    return {"bytes": sum(map(len, files[0].values()))}


def leaks(pool: Pool, opened: Opened, where: Where) -> dict[str, Any]:
    """Worlds that come and go leave no memory of the device and no group behind."""
    opened_job = opened(job(WORLDS[0]))
    said = pool.run(
        "devices_checked:come_and_go", opened_job.topology.world_size, opened_job, where.shared, 3
    )
    for left in said:
        _, once, *rest = left
        assert all(later == once for later in rest), left
        assert all(groups == 0 for _, groups in left)
    return {"bytes_left": said[0][-1][0]}


def unsynchronized(pool: Pool, opened: Opened, where: Where) -> dict[str, Any]:
    """Computing and messages do not make the host wait for the device; only the agreement on the step does."""
    opened_job = opened(job(ALONE))
    actions = first(pool.run("devices_checked:without_waiting", 1, opened_job, where.own))
    assert actions > 1
    return {"actions": actions}


def layers(pool: Pool, opened: Opened, where: Where, expected: str) -> dict[str, Any]:
    """Modules in bf16 get the layers that are there."""
    opened_job = opened(job(ALONE, precision="bf16"))
    names = first(pool.run("devices_checked:classes", 1, opened_job, where.own))
    assert expected in names
    return {"classes": names}


# -- what runs on every rank -------------------------------------------------------------------------------


def kind(place: RankPlace, opened: Job, transport: str | None) -> tuple[str, str]:
    """Return on which device a rank computes, and with which backend it talks."""
    with open_session(place, opened, transport=transport) as session:
        assert session.runtime
        (weight, *_) = (w for buffer in session.runtime.buffers.values() for w in buffer.weights.values())
        return weight.device.type, session.device.backend


def come_and_go(place: RankPlace, opened: Job, transport: str | None, times: int) -> list[tuple[int, int]]:
    """Train a step in worlds one after the other; return the bytes and groups left after each."""
    left = []
    for _ in range(times):
        # Each world of a process meets over a file of its own.
        meeting = None if place.meeting is None else f"{place.meeting}-{len(left)}"
        _train(attrs.evolve(place, meeting=meeting), opened, transport)
        bytes_left = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        left.append((bytes_left, len(dist.distributed_c10d._world.pg_map)))
    return left


def _train(place: RankPlace, opened: Job, transport: str | None) -> None:
    with open_session(place, opened, transport=transport) as session:
        assert session.runtime
        train_step(session.runtime, 0, opened.step(0), opened.step(1))
        session.world.wait_for_all("trained")


def without_waiting(place: RankPlace, opened: Job, transport: str | None) -> int:
    """Train a step in which waiting for the device is an error up to the agreement; return the actions till then."""

    def strictly(actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
        end = next(i for i, action in enumerate(actions) if isinstance(action, Norm))
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode("error")
        try:
            timeline = execute(actions[:end], context)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.set_sync_debug_mode("default")
        return (*timeline, *execute(actions[end:], context, first=end))

    with open_session(place, opened, transport=transport) as session:
        assert session.runtime
        train_step(session.runtime, 0, opened.step(0), opened.step(1))  # fills what is kept from step to step
        timeline = train_step(session.runtime, 0, opened.step(0), opened.step(1), executor=strictly).timeline
        return sum(not isinstance(timed.action, Norm) for timed in timeline)


def classes(place: RankPlace, opened: Job, transport: str | None) -> list[str]:
    """Return the names of the classes that a rank's networks are made of."""
    with open_session(place, opened, transport=transport) as session:
        assert session.runtime
        networks = [runner.network for runner in session.runtime.stages.values()]
        return sorted({type(part).__name__ for network in networks for part in network.modules()})
