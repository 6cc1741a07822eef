"""Commands: each is given a job that is open, and what was said besides; it returns an exit code.

Whatever takes long to import, or needs torch, is imported by the command that uses it.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.program.verify import verify
from mimogrid.core.step.traffic import EdgeTraffic, edge_traffic
from mimogrid.core.topology.roles import RankRole, role_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.cli import start
from mimogrid.shell.cli.output import print_json, write
from mimogrid.shell.job.jobs import Job


def check(job: Job, given: argparse.Namespace) -> int:
    """Verify the program of step 0, and say what runs where and what crosses the edges."""
    edges: tuple[EdgeTraffic, ...] = ()
    if job.source is not None:
        step = job.step(0)
        faults = verify(plan_step(step, job.order))
        if faults:
            remedy = "This is a fault of mimogrid, not of the job: please report it with the job file."
            raise PlanError(Problem("program", fault, remedy) for fault in faults)
        edges = edge_traffic(step)
    if given.json:
        print_json({"ok": True, "problems": [], "edges": [attrs.asdict(edge) for edge in edges]})
    else:
        from mimogrid.shell.cli import roles as banner  # noqa: PLC0415 -- rich takes longer to import than to check a job

        banner.print_layout(job.topology, edges)
    return 0


def roles(job: Job, given: argparse.Namespace) -> int:
    """Say who does what."""
    topology = job.topology
    chosen = [role_of(topology, rank) for rank in _ranks(topology, given.rank)]
    if given.svg:
        from mimogrid.core.draw.ranks import rank_map_svg  # noqa: PLC0415 -- only what is used

        write(given.svg, [rank_map_svg(topology)])
    if given.json:
        print_json({"world_size": topology.world_size, "ranks": [_role_values(role) for role in chosen]})
    else:
        from mimogrid.shell.cli import roles as banner  # noqa: PLC0415

        banner.print_roles(topology, chosen)
    return 0


def _role_values(role: RankRole) -> dict[str, Any]:
    """Return a role for a script."""
    return {
        "rank": role.rank,
        "layout": role.layout.value,
        "stages": [
            {
                "module": info.module,
                "pp": info.pp,
                "first": info.is_first_stage,
                "last": info.is_last_stage,
                "position": dict(info.position),
            }
            for info in role.modules.values()
        ],
    }


def show(job: Job, given: argparse.Namespace) -> int:
    """Print the program of step 0."""
    program = _first_program(job)
    programs = {
        rank: [str(action) for action in program.of(rank)] for rank in _ranks(job.topology, given.rank)
    }
    if given.json:
        print_json({"programs": programs})
        return 0
    for rank, actions in programs.items():
        hosted = ", ".join(str(info.stage) for info in job.topology.role(rank).stages)
        print(f"rank {rank}    # {hosted or 'idles: it is in no grid'}")
        for action in actions:
            print(f"    {action}")
    return 0


def prove(job: Job, given: argparse.Namespace) -> int:
    """Verify the program of step 0, or one from a file, and say what is in it."""
    from mimogrid.shell.cli.verify import verdict  # noqa: PLC0415 -- only what is used

    found = verdict(_first_program(job), given.program, strict=given.strict)
    if found.problems and not given.json:
        raise PlanError(found.problems)
    if found.problems:
        problems = [attrs.asdict(problem) for problem in found.problems]
        print_json({"ok": False, "strict": found.strict, "problems": problems})
        return 2
    if given.json:
        print_json({"ok": True, **attrs.asdict(found)})
    else:
        print(found)
    return 0


def simulate(job: Job, given: argparse.Namespace) -> int:
    """Simulate a step."""
    from mimogrid.shell.cli import simulate as simulation  # noqa: PLC0415 -- only what is used

    return simulation.run(job, given)


def plan(job: Job, given: argparse.Namespace) -> int:
    """Search for the fastest layout."""
    from mimogrid.shell.cli import plan as planning  # noqa: PLC0415 -- only what is used

    return planning.run(job, given)


def train(job: Job, given: argparse.Namespace) -> int:
    """Train the job."""
    with _torch_is_needed():
        return start.train(
            job,
            resume=given.resume,
            changed=given.changed,
            transport=given.transport,
            as_json=given.json,
        )


def probe(job: Job, given: argparse.Namespace) -> int:
    """Measure what the job costs on this machine."""
    sizes = given.microbatch_sizes
    with _torch_is_needed():
        return start.probe(job, repeat=given.repeat, sizes=sizes, out=given.out, as_json=given.json)


def parity(job: Job, given: argparse.Namespace) -> int:
    """Compare the job's layout with the same model on one process."""
    with _torch_is_needed():
        return start.parity(job, steps=given.steps, as_json=given.json)


def inspect(job: Job | None, given: argparse.Namespace) -> int:
    """Say what is in checkpoints."""
    from mimogrid.shell.cli import inspect as inspection  # noqa: PLC0415 -- only what is used

    return inspection.run(job, given)


def export(_: None, given: argparse.Namespace) -> int:
    """Write the weights of a checkpoint for others."""
    with _torch_is_needed():
        from mimogrid.shell.cli import export as exporting  # noqa: PLC0415 -- imports torch

        return exporting.run(given)


@contextlib.contextmanager
def _torch_is_needed() -> Iterator[None]:
    """Say how to get what a command needs and is not installed. Raises WorldError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "megatron"}:
            raise
        message = f"this command needs {error.name}: pip install 'mimogrid[train]'"
        raise WorldError(message) from None


def _ranks(topology: Topology, rank: int | None) -> Sequence[int]:
    """Return all ranks, or the one that was asked for. Raises PlanError where there is no such rank."""
    world = range(topology.world_size)
    if rank is None:
        return world
    if rank not in world:
        message = f"rank {rank} is not in the world of {len(world)} ranks."
        raise PlanError([Problem("--rank", message, f"Use 0 to {len(world) - 1}.")])
    return (rank,)


def _first_program(job: Job) -> Program:
    """Return the program of step 0. Raises PlanError where its samples are not known."""
    return plan_step(job.step(0), job.order)
