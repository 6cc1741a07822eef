"""Settle: what the schedule `auto` decides of a job before there are stages.

Stages should take equally long, forward and backward together. Frozen layers with nothing trainable before
them have no backward, so they count a third of the others: four ranks for 24 frozen and 24 trained layers
are best cut 24 | 8 | 8 | 8, which is 1.44 times as fast as 12 | 12 | 12 | 12 (Cornstarch, arXiv 2503.11367).

A module whose layers the job splits, or whose stages it prices, is left alone. For the others, the even and the
balanced split are tried on the clock of `schedule.tuning`, and the faster one is written into the spec: from
then on it is a job like any other.
"""

from collections.abc import Mapping

import attrs

from mimogrid.core.base.samples import share
from mimogrid.core.job.placement import balanced, stages_of
from mimogrid.core.job.schedules import AUTO
from mimogrid.core.job.spec import JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation import problems_of
from mimogrid.core.pricing.assumed import assumed_of_layers
from mimogrid.core.schedule.tuning import best_named
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


def balance_layers(spec: JobSpec, source: SourceFacts) -> JobSpec:
    """Return a job with the layers of each stage decided; as it is, where nothing is to be decided or it is wrong."""
    open_ = [name for name, module in spec.modules.items() if _is_open(spec, name, module)]
    if not open_:
        return spec
    even = _with_splits(spec, {name: _even(spec.modules[name]) for name in open_})
    if problems_of(even, source):
        return even
    topology = assemble(even, source)
    fair = _with_splits(spec, {name: _fair(topology, name) for name in open_})
    if fair == even:
        return even
    return min((fair, even), key=lambda each: best_named(assemble(each, source)).merit)


def _is_open(spec: JobSpec, name: str, module: ModuleSpec) -> bool:
    """Whether a module has several stages, enough layers for them, and nobody has said how to cut it."""
    costs = spec.schedule.costs
    priced = costs is not None and any(stage.startswith(f"{name}.") for stage in costs.stages)
    return (
        spec.schedule.name == AUTO
        and module.split is None
        and not isinstance(module.options, Mapping)
        and 1 < stages_of(module) <= module.options.layers
        and not priced
    )


def _with_splits(spec: JobSpec, splits: Mapping[str, tuple[int, ...]]) -> JobSpec:
    modules = {name: attrs.evolve(m, split=splits.get(name, m.split)) for name, m in spec.modules.items()}
    return attrs.evolve(spec, modules=modules)


def _even(module: ModuleSpec) -> tuple[int, ...]:
    """Cut the layers into parts that differ by one at most."""
    assert not isinstance(module.options, Mapping)
    return tuple(len(share(i, stages_of(module), module.options.layers)) for i in range(stages_of(module)))


def _fair(topology: Topology, name: str) -> tuple[int, ...]:
    """Cut the layers into parts that take equally long."""
    module = topology.modules[name]
    seconds = [layer.forward + layer.whole_backward for layer in assumed_of_layers(module)]
    return balanced(seconds, len(module.stages))
