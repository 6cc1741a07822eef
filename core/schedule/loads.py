"""Loads: what a rank reads from the source in a step, forward by forward, in the order in which it reads it.

It follows from the job and the descriptions of samples, so a rank knows what it will read before it computes: workers
load it meanwhile (`shell.runtime.ahead`). The first stage of a module that nothing feeds reads rows, that of a language
model tokens, and the last stage of a module with a loss targets. A stage that is both reads a sample twice, and it is
loaded once. What has no rows and no positions for a stage is not read.
"""

from collections import Counter
from collections.abc import Iterator

import attrs

from mimogrid.core.job.models import Gpt, Own, Regressor
from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.order import Order
from mimogrid.core.step.step import Share, Step
from mimogrid.core.topology.roles import RankRole
from mimogrid.core.topology.topology import Module


@attrs.frozen
class SampleLoad:
    """A sample that a forward reads for a module, and how many times it does."""

    sample_id: int
    module: str
    reads: int


def loads_of(step: Step, order: Order, role: RankRole) -> Iterator[tuple[SampleLoad, ...]]:
    """Yield what each forward of a rank in a step reads; forwards that read nothing are left out."""
    infos = {info.stage: info for info in role.stages}
    for action in order.actions:
        info = infos.get(action.stage)
        if info is None or action.kind is not Kind.FORWARD:
            continue
        module = order.topology.modules[action.stage.module]
        share = step.share(module.name, module.grid.position(role.rank)["dp"], action.microbatch)
        inputs = _inputs(module, share) if info.first else ()
        targets = _targets(module, share) if info.last else ()
        reads = Counter((*inputs, *targets))
        if reads:
            yield tuple(SampleLoad(sample_id, module.name, times) for sample_id, times in reads.items())


def _inputs(module: Module, share: Share) -> Iterator[int]:
    """Yield the samples that the first stage of a module reads."""
    if isinstance(module.model, Gpt):
        return _some(share, share.lengths)
    return iter(()) if module.inputs else _some(share, share.rows[module.name])


def _targets(module: Module, share: Share) -> Iterator[int]:
    """Yield the samples whose targets the last stage of a module reads."""
    match module.model:
        case Gpt() | Regressor():
            return _some(share, share.lengths)
        case Own() if module.inputs:
            return (sample.id for sample in share.samples)
        case _:
            return iter(())


def _some(share: Share, counts: tuple[int, ...]) -> Iterator[int]:
    return (sample.id for sample, count in zip(share.samples, counts, strict=True) if count)
