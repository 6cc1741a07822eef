"""The ranks of a job: whether every dp rank has samples, and whether the world has the ranks of every grid."""

import math
from collections.abc import Iterable, Iterator

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.placement import place
from mimogrid.core.job.spec import JobSpec, ModuleSpec
from mimogrid.core.job.validation.checks import divisors
from mimogrid.core.job.validation.sizes import RANKS_MOST


def dp_problems(name: str, module: ModuleSpec, spec: JobSpec) -> Iterator[Problem]:
    """Check that every dp rank has a sample in every microbatch."""
    size, dp = spec.batch.global_size, module.grid.dp
    count = module.microbatches or spec.batch.microbatches
    if size < 1 or count < 1 or spec.batch.microbatches < 1:
        return
    if size % count:
        if module.microbatches:
            yield Problem(
                f"modules.{name}.microbatches",
                f"{size} samples of a step do not divide into {count} microbatches of module '{name}'.",
                f"Legal counts for {size} samples: {divisors(size)}.",
            )
        return
    if not spec.batch.tokens_per_microbatch:
        yield from _count_problems(name, module, spec, count)
    if size // count < dp:
        fewer = f"at most {size // dp} microbatches, " if size >= dp else ""
        yield Problem(
            f"modules.{name}.grid.dp",
            f"a microbatch of module '{name}' has {size // count} samples ({size} / {count}) "
            f"for dp={dp} dp ranks: {dp - size // count} dp ranks would have none.",
            f"Use dp <= {size // count}, {fewer}or batch.global_size >= {dp * count}.",
        )


def _count_problems(name: str, module: ModuleSpec, spec: JobSpec, count: int) -> Iterator[Problem]:
    """Check that a module's number of microbatches suits its chunks and the number of the job."""
    if module.chunks > 1 and count % module.grid.pp:
        yield Problem(
            f"modules.{name}.chunks",
            f"module '{name}' interleaves {module.chunks} chunks over pp={module.grid.pp}, "
            f"which {count} microbatches are not a multiple of.",
            f"Use a number of microbatches that divides by {module.grid.pp}, or chunks = 1.",
        )
    large, small = max(count, spec.batch.microbatches), min(count, spec.batch.microbatches)
    if large % small:
        yield Problem(
            f"modules.{name}.microbatches",
            f"module '{name}' makes {count} microbatches of a step, the job {spec.batch.microbatches}: "
            "their ratio is not an integer.",
            f"Use a divisor or a multiple of {spec.batch.microbatches}.",
        )


def balance_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check that samples which are assigned by cost can fill every cell: a microbatch on a lane of dp ranks."""
    counts = [module.microbatches or spec.batch.microbatches for module in spec.modules.values()]
    sizes = [module.grid.dp for module in spec.modules.values()]
    counted = spec.batch.balance == "cost" and not spec.batch.tokens_per_microbatch
    if not counted or min((*counts, *sizes), default=0) < 1:
        return
    microbatches, lanes = math.lcm(*counts), math.lcm(*sizes)
    if spec.batch.global_size < microbatches * lanes:
        yield Problem(
            "batch.balance",
            f"{spec.batch.global_size} samples of a step are assigned to {microbatches * lanes} cells: {microbatches} "
            f"microbatches on {lanes} lanes, the least common multiple of the dp sizes {_listed(sizes)}.",
            f'Use batch.global_size >= {microbatches * lanes}, dp sizes that divide each other, or balance = "none".',
        )


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(sizes))))


def world_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check that the world has the ranks of every grid."""
    grids = place(spec)
    count = max((grid.offset + grid.size for grid in grids.values()), default=0)
    if count > RANKS_MOST:
        yield Problem("modules", f"their grids take {count:,} ranks.", f"Use at most {RANKS_MOST:,}.")
    if spec.world_size is None:
        return
    if not 1 <= spec.world_size <= RANKS_MOST:
        yield Problem("world_size", f"is {spec.world_size}.", f"Use 1 to {RANKS_MOST:,} ranks.")
        return
    for name, grid in grids.items():
        if grid.offset + grid.size > spec.world_size:
            shape = " * ".join(f"{axis.name}={axis.size}" for axis in grid.axes)
            yield Problem(
                f"modules.{name}.grid",
                f"module '{name}' needs ranks {grid.offset}..{grid.offset + grid.size - 1} "
                f"({shape} at offset {grid.offset}), and the world has the ranks "
                f"0..{spec.world_size - 1}.",
                f"Set world_size = {grid.offset + grid.size} or more, or make the grid smaller.",
            )
