"""Fit: the first lines of `check`, `simulate` and `plan`: the precision, what ranks hold at most, whether that fits."""

from collections.abc import Iterator, Mapping
from typing import Any

from mimogrid.core.base.units import in_bytes
from mimogrid.core.job.precision import HALF
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.pricing.accelerators import Accelerator
from mimogrid.core.pricing.even import fullest_step
from mimogrid.core.pricing.machine import machine_for
from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.orders import Orders
from mimogrid.core.simulate.fullest import Fullest, fullest_ranks
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Topology


FASTER = 2.0
"""How many times as fast half precision is where a job without it is warned."""


def memory_of(step: Step, orders: Orders) -> dict[str, Fullest]:
    """Return, by module, the rank that holds most if every sample is as large as the largest of a step.

    Under a limit of tokens it is the rank that holds most if every microbatch is full.
    """
    fullest = fullest_step(step)
    return fullest_ranks(plan_step(fullest, orders.of(fullest.topology)))


def fit_lines(spec: JobSpec, memory: Mapping[str, Fullest]) -> Iterator[str]:
    """Yield what is said first of a job; `memory` has the fullest ranks by module, if they are known."""
    machine = machine_for(spec)
    on = f" on {machine.accelerator.name}, {in_bytes(machine.memory_bytes)} each" if machine else ""
    yield f"Precision {spec.precision}{on}."
    if memory:
        peaks = ", ".join(
            f"{name} {in_bytes(held.bytes)} (rank {held.rank})" for name, held in memory.items()
        )
        yield f"Memory per rank at most: {peaks}. {_whether_it_fits(memory, machine.memory_bytes if machine else None)}"
    if machine:
        yield from _slow(spec, machine.accelerator)


def microbatch_lines(topology: Topology, step: Step | None) -> Iterator[str]:
    """Yield how many microbatches steps have where a limit of tokens cuts them; `step` is the first, if it is known."""
    limit = topology.spec.batch.tokens_per_microbatch
    if limit:
        first = "" if step is None else f"{step.topology.most_microbatches} in step 0, "
        yield (
            f"Microbatches: {first}{topology.most_microbatches} at most, of {limit:,} tokens or fewer for each dp rank "
            f"of {' and '.join(topology.graph.texts)}."
        )


def microbatch_values(topology: Topology, step: Step | None) -> dict[str, Any]:
    """Return the same for a script; nothing where microbatches are counted."""
    if not topology.tokens_per_cell:
        return {}
    first = step.topology.most_microbatches if step else None
    return {"microbatches": {"first": first, "most": topology.most_microbatches}}


def fit_values(spec: JobSpec, memory: Mapping[str, Fullest]) -> dict[str, Any]:
    """Return the same for a script; `fits` is None where no kind of GPU is named."""
    machine = machine_for(spec)
    most = max((held.bytes for held in memory.values()), default=0)
    return {
        "precision": spec.precision,
        "gpu": spec.gpu.name,
        "memory_bytes": machine.memory_bytes if machine else None,
        "memory": {name: {"rank": held.rank, "bytes": held.bytes} for name, held in memory.items()},
        "fits": most <= machine.memory_bytes if machine and memory else None,
    }


def _whether_it_fits(memory: Mapping[str, Fullest], has_bytes: float | None) -> str:
    if has_bytes is None:
        return "With --gpu NAME it is said whether that fits."
    name, held = max(memory.items(), key=lambda each: each[1].bytes)
    short = held.bytes - has_bytes
    if short > 0:
        return f"Does not fit: rank {held.rank} of {name} is short by {in_bytes(short)}."
    return f"Fits, with {in_bytes(-short)} to spare."


def _slow(spec: JobSpec, gpu: Accelerator) -> Iterator[str]:
    """Warn of a precision that is far slower than half precision."""
    half, own = gpu.flops["bf16"], gpu.flops[spec.precision]
    if spec.precision not in HALF and half > FASTER * own:
        fact = f"{gpu.name} computes {half / own:.1f} x as fast in bf16 as in {spec.precision}"
        yield f'Warning: {fact}. At the top of the job file: precision = "bf16".'
