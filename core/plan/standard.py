"""Standard layouts: what an expert would write first, and what a plan is compared with.

One grid for all modules: tp within a node, dp with a sharded update (ZeRO-1) over all other GPUs, no pipeline. The tp
is the largest that all modules can have; with less of it memory is scarcer.
"""

import math

import attrs

from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan.configs import ParallelShape
from mimogrid.core.plan.layouts import Question
from mimogrid.core.plan.search_space import SearchSpace


def standard_layouts(question: Question, spaces: dict[str, SearchSpace]) -> dict[str, JobSpec]:
    """Return the standard layout by its name; nothing where no grid of all modules is legal, and as pinned."""
    for tp in sorted(_common_tp(spaces), reverse=True):
        dp = _dp_size(len(question.samples), question.gpus // tp)
        spec = _unified(question, tp, dp)
        if dp and not problems_of(spec, question.facts) and not question.pins.broken_by(spec):
            return {f"one grid for all (tp={tp} dp={dp}, ZeRO-1)": spec}
    return {}


def _common_tp(spaces: dict[str, SearchSpace]) -> set[int]:
    """Return the sizes of tp, powers of two, that all modules can have without anything else."""
    legal = [
        {s.tp for s in space.shapes if s.cp == s.ep == 1 and s.tp & (s.tp - 1) == 0}
        for space in spaces.values()
    ]
    first, *rest = legal
    return first.intersection(*rest)


def _dp_size(samples: int, most: int) -> int:
    """Return the most dp ranks that have equally many samples."""
    return max((dp for dp in range(1, most + 1) if samples % dp == 0), default=0)


def _unified(question: Question, tp: int, dp: int) -> JobSpec:
    shape = ParallelShape(tp, sequence_parallel=tp > 1)
    modules = {
        name: attrs.evolve(
            module,
            grid=attrs.evolve(shape.grid(dp=dp, pp=1), offset=0),
            chunks=1,
            split=None,
            microbatches=None,
        )
        for name, module in question.spec.modules.items()
    }
    return attrs.evolve(
        question.spec,
        modules=modules,
        batch=question.batch(math.ceil(len(question.samples) / max(dp, 1))),
        schedule=attrs.evolve(question.spec.schedule, name="1f1b", costs=None),
        optimizer=attrs.evolve(question.spec.optimizer, sharded=True),
        world_size=question.gpus,
    )
