"""Tokens: what `[batch] tokens_per_microbatch` means for the grids of a job.

The tokens of a sample are its positions in a language model: text, and the rows that encoders give. A dp rank of a
language model has at most so many tokens in a microbatch. A step is cut into cells, one for each microbatch and lane
(`step.cells`), and a dp rank has a run of lanes. So a cell has at most the part of a lane.

>>> tokens_per_cell(JOB), lanes_of(JOB), microbatch_multiple(JOB)
(500, 4, 1)
"""

import math

from mimogrid.core.job.models import Gpt
from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec


JOB = JobSpec(
    modules={
        "vision": ModuleSpec(model="vit", options={}, feeds=("language",), grid=GridSpec(dp=4)),
        "language": ModuleSpec(
            model="gpt", options=Gpt(layers=1, hidden=8, heads=1, vocab=8), grid=GridSpec(dp=2)
        ),
    },
    data=DataSpec(source="synthetic"),
    batch=BatchSpec(global_size=8, tokens_per_microbatch=1000),
)
"""A job for examples."""


def lanes_of(spec: JobSpec) -> int:
    """Return the number of cells of a microbatch."""
    return math.lcm(*(module.grid.dp for module in spec.modules.values()))


def lanes_per_dp_rank(spec: JobSpec) -> int:
    """Return the most lanes that a dp rank of a language model has."""
    texts = [module for module in spec.modules.values() if isinstance(module.options, Gpt)]
    return max((lanes_of(spec) // module.grid.dp for module in texts), default=1)


def tokens_per_cell(spec: JobSpec) -> int:
    """Return the most tokens of a cell; 0: the microbatches of a step are counted."""
    return spec.batch.tokens_per_microbatch // lanes_per_dp_rank(spec)


def microbatch_multiple(spec: JobSpec) -> int:
    """Return what a number of microbatches must be a multiple of: interleaving goes round all pipeline ranks."""
    return math.lcm(*(module.grid.pp for module in spec.modules.values() if module.chunks > 1))


def most_microbatches(spec: JobSpec, sequence: int) -> int:
    """Return the most microbatches that a step may be cut into, if no sample has more tokens than `sequence`.

    A cell is closed because the next sample does not fit, so it has as many as fit of the longest.
    """
    cells = -(-spec.batch.global_size // (tokens_per_cell(spec) // sequence))
    return rounded_up(-(-cells // lanes_of(spec)), microbatch_multiple(spec))


def rounded_up(count: int, multiple: int) -> int:
    """Return the least multiple that is not less than a count.

    >>> rounded_up(5, 4)
    8
    """
    return -(-count // multiple) * multiple


def unread_sources(spec: JobSpec) -> tuple[str, ...]:
    """Return the source modules from which nothing leads to a language model, so that tokens do not bound their rows.

    The wiring of the job is legal.
    """
    leading = {name for name, module in spec.modules.items() if isinstance(module.options, Gpt)}
    fed = {target for module in spec.modules.values() for target in module.feeds}
    sources = [name for name in spec.modules if name not in fed and name not in leading]
    while more := {n for n, m in spec.modules.items() if n not in leading and leading.intersection(m.feeds)}:
        leading |= more
    return tuple(name for name in sources if name not in leading)
