"""Probe: the costs of a job's stages and edges on this machine, measured in the job's own world.

Every rank measures one thing after the other: actions, in steps whose ranks take turns (`turns`, `steps`); how ranks
slow each other down when they compute at once (`cores`); memory (`resident`); links, sums of gradients and gathers of
weights by themselves (`communication`). Each rank's `record` goes to the first rank of the job, which computes the
costs of stages from them (`stages`) and returns the `results`.
"""

import platform
from collections.abc import Mapping, Sequence

import torch

from mimogrid.core.job.costs import Costs, EdgeCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.simulate.memory import peak_bytes
from mimogrid.core.simulate.simulation import simulate
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.probe import resident
from mimogrid.shell.run.probe.clock import rounded
from mimogrid.shell.run.probe.communication import costs_of_edges, gathering_s, summing_s
from mimogrid.shell.run.probe.cores import allowed_cores, core_seconds, cores_at_once
from mimogrid.shell.run.probe.record import RankProbe
from mimogrid.shell.run.probe.results import Memory, Probed
from mimogrid.shell.run.probe.stages import StageProbe
from mimogrid.shell.run.probe.steps import in_turns, other_schedule
from mimogrid.shell.runtime.exchange import gather_objects
from mimogrid.shell.runtime.session import open_session


def in_world(place: RankPlace, job: Job, repeat: int, speaks: bool = False) -> Probed | None:
    """Measure a job, on every rank of its world; the first rank of the job returns the result.

    If it `speaks`, that rank says what it is at.
    """
    before = resident.fresh_peak()
    with open_session(place, job, speaks=speaks) as session:
        runtime = session.runtime
        if runtime is None:
            return None
        program = job.program_of(job.step(0))
        other = other_schedule(job, program)
        own, *others = in_turns(runtime, [job, other] if other else [job], repeat)
        core_s = None if session.device.is_asynchronous else core_seconds(runtime, job, repeat)
        grown = resident.peak() - before
        edges = costs_of_edges(session, runtime, program)
        sums = {stage: summing_s(runtime, stage, repeat) for stage in runtime.topology.stages}
        gathers = {stage: gathering_s(runtime, stage, repeat) for stage in runtime.topology.stages}
        ranks = gather_objects(
            runtime,
            RankProbe(
                rank=runtime.rank,
                host=platform.node(),
                own=own,
                others=others,
                sums=sums,
                gathers=gathers,
                core_s=core_s,
                peak=grown,
            ),
        )
        return _put_together(job, program, ranks, edges) if ranks else None


def _put_together(
    job: Job, program: Program, ranks: Sequence[RankProbe], edges: Mapping[str, EdgeCosts]
) -> Probed:
    topology = job.topology
    machine = (
        f"{platform.machine()} {platform.system()}, {allowed_cores()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    cores = cores_at_once(program, ranks)
    stages = {str(stage): StageProbe(program, stage, ranks, cores) for stage in topology.stages}
    ratios = {name: of.split_over_whole() for name, of in stages.items()}
    costs = Costs(
        stages={name: of.costs() for name, of in stages.items()},
        edges=edges,
        cores=None if cores is None else rounded(cores),
        origin=f"probed on {machine}",
    )
    planned = peak_bytes(simulate(program, costs))
    return Probed(
        samples={name: topology.samples_per_microbatch[name] for name in topology.modules},
        costs=costs,
        split={name: ratio for name, ratio in ratios.items() if ratio is not None},
        spread={name: of.spread() for name, of in stages.items()},
        memory={of.rank: Memory(peak=of.peak, planned=planned[of.rank]) for of in ranks},
    )
