"""Layer split: how many layers each stage gets under the schedule `auto`.

Stages should take equally long, forward and backward together. Frozen layers with nothing trainable before them run
no backward, so they cost a third of the others. 24 frozen and 24 trained layers on four ranks are best split
24 | 8 | 8 | 8, which is 1.44 times as fast as 12 | 12 | 12 | 12 (Cornstarch, arXiv 2503.11367).

A module keeps its split if the job gives one, or gives costs of its stages. For the other modules the even and the
balanced split are timed on the clock of `tuning`, and the faster one goes into the spec of the topology.
"""

from collections.abc import Mapping, Sequence

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import share
from mimogrid.core.job.layouts import layouts_of
from mimogrid.core.job.placement import balanced, stages_of
from mimogrid.core.job.schedules import AUTO
from mimogrid.core.job.spec import JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.job.validation.towers import tower_problems
from mimogrid.core.pricing.assumed import assumed_of_layers
from mimogrid.core.schedule.tuning import best_named
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


def parse_job(spec: JobSpec, source: SourceFacts | None) -> Topology | tuple[Problem, ...]:
    """Validate a job, once. Return its topology with balanced layers, or every problem that it has.

    `source` is None if the source itself is wrong. Then there is no topology, and the problems are those of the rest
    of the job, if any.
    """
    even = _evenly_split(spec)
    problems = problems_of(even, source)
    if problems or source is None:
        return problems
    return balance_layers(assemble(even, source), _open_modules(spec))


def problems_of_layouts(spec: JobSpec, source: SourceFacts | None) -> tuple[Problem, ...]:
    """Return every problem of a job with several layouts under any of them; a layout's own have its place in front.

    `source` is None if the source itself is wrong.
    """
    own, *others = layouts_of(spec)
    if not others:
        return ()
    of_own = problems_of(_evenly_split(own.spec), source)
    return *of_own, *(
        _of_layout(layout.where, problem)
        for layout in others
        for problem in problems_of(attrs.evolve(_evenly_split(layout.spec), world_size=layout.ranks), source)
        if problem not in of_own
    )


def _of_layout(where: str, problem: Problem) -> Problem:
    """Return a problem of a job as that of a layout, whose `world_size` is written as `ranks`."""
    place, remedy = (text.replace("world_size", "ranks") for text in (problem.where, problem.remedy))
    return attrs.evolve(problem, where=f"{where}.{place}", remedy=remedy)


def _open_modules(spec: JobSpec) -> list[str]:
    return [name for name, module in spec.modules.items() if _is_open(spec, name, module)]


def _evenly_split(spec: JobSpec) -> JobSpec:
    return _with_splits(spec, {name: _even(spec.modules[name]) for name in _open_modules(spec)})


def balance_layers(topology: Topology, modules: Sequence[str]) -> Topology:
    """Return a topology in which the stages of some modules take equally long, if that makes a step faster.

    A balanced split leaves no stage without layers, as an even one, but perhaps one without those that deepstack needs.
    """
    fair = _with_splits(topology.spec, {name: _fair(topology, name) for name in modules})
    if fair == topology.spec or any(problem for name in modules for problem in tower_problems(name, fair)):
        return topology
    candidates = (assemble(fair, topology.source), topology)
    return min(candidates, key=lambda each: best_named(each).merit)


def topology_of(spec: JobSpec, source: SourceFacts) -> Topology:
    """Return the topology of a job, with balanced layers. Raises PlanError with every problem that it has."""
    parsed = parse_job(spec, source)
    if isinstance(parsed, Topology):
        return parsed
    raise PlanError(parsed)


def _is_open(spec: JobSpec, name: str, module: ModuleSpec) -> bool:
    """Whether a module has several stages, enough layers for them, and neither a split nor costs of its stages."""
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
    """Return layers per stage that differ by one at most."""
    assert not isinstance(module.options, Mapping)
    return tuple(len(share(i, stages_of(module), module.options.layers)) for i in range(stages_of(module)))


def _fair(topology: Topology, name: str) -> tuple[int, ...]:
    """Return layers per stage such that the slowest stage is as fast as possible."""
    module = topology.modules[name]
    seconds = [layer.forward + layer.whole_backward for layer in assumed_of_layers(module)]
    return balanced(seconds, len(module.stages))
